"""Reads a workdir, and changes nothing: all that `experiments.status` knows comes through here.

A workdir elsewhere than on a disk needs a class with what `LocalFolder` has, and a line in
`folder`.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping

from experiments.command import UsageError
from luspo_jax.hosts import buckets, lease, server_clock
from luspo_jax.hosts.buckets import Bucket, BucketError


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A file: bytes, and when it was last written, in seconds since 1970."""

    size: int
    written: float


class LocalFolder:
    """A folder on a disk or on storage that this host mounts.

    Attributes:
      marks: names in the folder of a checkpoint that is complete.
      may_be_sweep: whether sweeps are kept in such a place.
      late_s: seconds that a file may take from the host that wrote it to here.
    """

    marks = frozenset({"host", "state"})
    may_be_sweep = True
    late_s = 0.0

    def __init__(self, path: str | os.PathLike):
        self._path = pathlib.Path(path).absolute()

    def entries(self) -> dict[str, Entry] | None:
        """Returns all files below by their names, as in rollouts/step_000001.jsonl; None if the
        folder is not there. What vanishes meanwhile is left out."""
        if not self._path.is_dir():
            return None
        found = {}
        for root, _, names in os.walk(self._path):
            for name in names:
                path = pathlib.Path(root, name)
                try:
                    status = path.lstat()
                except OSError:
                    continue
                found[path.relative_to(self._path).as_posix()] = Entry(
                    status.st_size, status.st_mtime
                )
        return found

    def read(self, name: str) -> bytes | None:
        """Returns the bytes of a file; None if it is not there or cannot be read."""
        try:
            return (self._path / name).read_bytes()
        except OSError:
            return None

    def is_locked(self) -> bool | None:
        """Returns whether a run holds the folder; None if that cannot be known. No lock is taken.

        Of other hosts nothing is known, nor where the system does not list its locks.
        """
        try:
            lock = (self._path / ".lock").stat()
            listed = pathlib.Path("/proc/locks").read_text().splitlines()
        except OSError:
            return None
        device = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
        # A line is "1: FLOCK ADVISORY WRITE 708 08:01:13240 0 EOF"; "->" marks one who waits.
        held = any(
            "FLOCK" in words and "->" not in words and device in words
            for words in map(str.split, listed)
        )
        return held or None


class BucketFolder:
    """A run in a bucket: each look is one listing, and reads what has changed since the last.

    Times of objects are by the server's clock. They are moved to this host's by the time that the
    server states in an answer; where it states none, ages are as good as the two clocks agree.
    """

    marks = frozenset({"commit_success.txt"})
    may_be_sweep = False
    late_s = 15.0  # a mirror looks at its folder as often

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic):
        self._bucket, self._clock = Bucket(url), clock
        self._found: Mapping[str, buckets.Entry] = {}
        self._contents: dict[str, tuple[buckets.Entry, bytes | None]] = {}
        self._ahead_s: float | None = None
        self._beat: tuple[tuple[str, int] | None, float, bool] = (None, 0.0, False)

    def entries(self) -> dict[str, Entry] | None:
        """Returns all objects below by their names; None if there are none.

        Raises:
          BucketError: the bucket cannot be listed.
        """
        self._found = self._bucket.entries()
        if not self._found:
            return None
        if self._ahead_s is None:
            self._ahead_s = server_clock.ahead_s(self._bucket.url)
        ahead_s = self._ahead_s or 0.0
        return {name: Entry(e.size, e.written + ahead_s) for name, e in self._found.items()}

    def read(self, name: str) -> bytes | None:
        """Returns the bytes of an object of the last listing; None if it is not there."""
        entry = self._found.get(name)
        if entry is None:
            return None
        if name not in self._contents or self._contents[name][0] != entry:
            self._contents[name] = entry, self._bucket.read(name)
        return self._contents[name][1]

    def is_locked(self) -> bool | None:
        """Returns whether a run holds the folder; None if there is no lock, or none that is known.

        A run renews its lock. It lives if that is seen to happen, whatever the clocks say. Before
        that it lives if the lock was written lately, by the server's own time, and if the server
        does not state its time, until the lock was seen to stay the same for as long.
        """
        try:
            lock = lease.held(_Listed(self))
        except BucketError:
            return None
        if lock is None or lock.released:
            return None if lock is None else False
        beat, now = (lock.token, lock.beat), self._clock()
        before, since, renewed = self._beat
        if beat != before:
            since, renewed = now, before is not None
            self._beat = beat, since, renewed
        if renewed or self._ahead_s is None:
            return now - since <= lease.LEASE_S
        written = max(e.written for name, e in self._found.items() if _is_lock(name))
        return time.time() - self._ahead_s - written <= lease.LEASE_S


@dataclasses.dataclass(frozen=True)
class _Listed:
    """What `lease.held` reads of a bucket, from the last listing."""

    reader: BucketFolder

    @property
    def url(self) -> str:
        return self.reader._bucket.url

    def entries(self, below: str) -> list[str]:
        return [name for name in self.reader._found if name.startswith(f"{below}/")]

    def read(self, name: str) -> bytes | None:
        return self.reader.read(name)


def _is_lock(name):
    return name.startswith(f"{lease.FOLDER}/")


def folder(address: str) -> LocalFolder | BucketFolder:
    """Returns the reader of an address.

    Raises:
      UsageError: it is of a kind that is not known.
      BucketError: its package is not installed.
    """
    try:
        remote = buckets.is_bucket(address)
    except BucketError as error:
        raise UsageError(str(error)) from error
    if remote:
        return BucketFolder(address)
    return LocalFolder(os.path.expanduser(address))
