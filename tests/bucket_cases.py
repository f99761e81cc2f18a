"""A user's process in front of a server of buckets on this machine."""

import pathlib

import pytest

from luspo_jax.hosts.buckets import Bucket
from tests.bucket_servers import BUCKET, connect


def bucket_of(scheme: str, port: int, patch: pytest.MonkeyPatch, folder: pathlib.Path) -> Bucket:
    """Returns an empty folder of a server's bucket, and gives this process a cache of its own.

    Args:
      scheme: gs or s3.
      port: of the server, or of a gate before it.
      patch: restores the environment.
      folder: of the test; the cache lies in it, and the bucket's folder has its name.
    """
    connect(patch, scheme, port)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return Bucket(f"{scheme}://{BUCKET}/{folder.name}")
