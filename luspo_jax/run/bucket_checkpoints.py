"""What Orbax's checkpoints in a bucket need beside Orbax."""

import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax.hosts import buckets
from luspo_jax.hosts.buckets import Bucket, BucketError

# Objects that change or come after the record: Orbax's marks, and the record itself.
_MARK = "commit_success.txt"
# The server's checksums of a checkpoint's objects, and ours of a checkpoint on a disk: copied to
# the other place, neither says anything.
SUMS = "checksums.bucket.json"
OF_DISK = "checksums.json"
_LATE = (_MARK, SUMS, "_CHECKPOINT_METADATA")


def opened(url: str) -> Bucket:
    """Returns the bucket of an address, with Orbax ready to write there.

    Raises:
      BucketError: its package is not installed, or this Orbax cannot write there.
    """
    bucket = Bucket(url)
    if url.startswith("s3://"):
        _teach_s3()
    return bucket


def drop_unfinished(bucket: Bucket) -> None:
    """Deletes checkpoints that lack Orbax's last mark: a killed run was writing them.

    One that is being copied here from a disk stays: it has our checksums.
    """
    steps: dict[str, set[str]] = {}
    for name in bucket.entries():
        step, _, below = name.partition("/")
        steps.setdefault(step, set()).add(below)
    for step, names in steps.items():
        if not names & {_MARK, OF_DISK}:
            bucket.delete([f"{step}/{name}" for name in names])


def kept_apart(state: Any) -> Any:
    """Returns the arrays of a state so that later steps cannot change them while they are written.

    Orbax copies what is on an accelerator to the host before it returns. On a CPU that copy is a
    view of the same memory, which the next update would write into.
    """
    if jax.default_backend() != "cpu":
        return state
    return jax.block_until_ready(
        jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, state)
    )


def record(bucket: Bucket, step: int) -> bytes:
    """Returns the server's checksums of a checkpoint's objects, as JSON: nothing is read again."""
    found = bucket.entries(str(step))
    tags = {
        name.partition("/")[2]: entry.tag
        for name, entry in sorted(found.items())
        if not name.endswith(_LATE)
    }
    return json.dumps({"of": bucket.url, "tags": tags}, indent=0).encode()


def differing(bucket: Bucket, step: int) -> list[str]:
    """Returns which objects of a checkpoint are missing or not as they were recorded.

    Of one that was copied here, only which are missing: another server may have other checksums.
    """
    found = bucket.entries(str(step))
    tags = {name.partition("/")[2]: entry.tag for name, entry in found.items()}
    for name in (SUMS, OF_DISK):
        if name in tags:
            stored = json.loads(bucket.read(f"{step}/{name}"))
            if name == SUMS and stored["of"] == bucket.url:
                return [name for name, tag in stored["tags"].items() if tags.get(name) != tag]
            return [name for name in stored.get("tags", stored) if name not in tags]
    return []


@functools.cache
def _teach_s3() -> None:
    """Makes Orbax write to s3:// as it writes to gs://.

    Orbax knows two kinds of paths: those of GCS, and local ones; TensorStore and etils, by which it
    writes, know S3 as well. An address of S3 becomes of the first kind here, with its own driver.

    Raises:
      BucketError: this version of Orbax has other names for these functions.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    names = {
        gcs_utils: ("_GCS_PATH_PREFIX", "get_kvstore_for_gcs"),
        tensorstore_utils: ("_use_gcs_driver", "_normalize_path"),
    }
    if not all(hasattr(module, name) for module, parts in names.items() for name in parts):
        import orbax.checkpoint

        raise BucketError(
            f"Orbax {orbax.checkpoint.__version__} cannot be taught s3:// as 0.12.8 can: install "
            "that version, or use gs:// or a folder"
        )
    of_gcs = gcs_utils.get_kvstore_for_gcs

    def of_either(path):
        if not path.startswith("s3://"):
            return of_gcs(path)
        name, _, below = path.removeprefix("s3://").partition("/")
        return {"driver": "s3", "bucket": name, "path": below, **_s3_settings()}

    gcs_utils._GCS_PATH_PREFIX = ("gs://", "s3://")
    gcs_utils.get_kvstore_for_gcs = of_either
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))
    tensorstore_utils._normalize_path = lambda path: _normalized(path)


def _s3_settings() -> dict[str, str]:
    """Returns what TensorStore does not read from the environment as boto does."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    found = {"endpoint": endpoint, "aws_region": region or ("us-east-1" if endpoint else None)}
    return {name: value for name, value in found.items() if value}


def _normalized(path: str) -> str:
    scheme, found, rest = path.partition("://")
    return f"{scheme}://{os.path.normpath(rest)}" if found else os.path.normpath(path)


def prepare(path: Any) -> None:
    """Makes an address ready for etils, by which Orbax and others read and write it."""
    if buckets.is_bucket(path):
        opened(str(path))
