"""A user's process in front of a server of buckets on this machine."""

import pathlib

import fsspec
import pytest

from luspo_jax.hosts import buckets
from luspo_jax.hosts.buckets import Bucket
from tests.bucket_servers import BUCKET, environment


def bucket_of(
    scheme: str, port: int, patch: pytest.MonkeyPatch, folder: pathlib.Path, at: str = ""
) -> Bucket:
    """Returns an empty folder of a server's bucket, and gives this process a cache of its own.

    Args:
      scheme: gs or s3.
      port: of the server, or of a gate before it.
      patch: restores the environment.
      folder: of the test; the cache lies in it, and the bucket's folder has its name.
      at: address of the bucket's folder, if another.
    """
    for name, value in environment(scheme, port).items():
        patch.setenv(name, value)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    forget()
    return Bucket(at or f"{scheme}://{BUCKET}/{folder.name}")


def forget() -> None:
    """Drops fsspec's instances, which keep the server's address of their first use."""
    buckets.prepare()
    for name in ("gcs", "s3"):
        fsspec.get_filesystem_class(name).clear_instance_cache()
