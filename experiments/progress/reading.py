"""Reads a workdir, and changes nothing: all that `experiments.status` knows comes through here.

A workdir elsewhere than on a disk needs a class with the three methods of `LocalFolder`, and a line
in `folder`.
"""

import dataclasses
import os
import pathlib

from experiments.command import UsageError


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A file: bytes, and when it was last written, in seconds since 1970."""

    size: int
    written: float


class LocalFolder:
    """A folder on a disk or on storage that this host mounts."""

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

    def is_locked(self) -> bool:
        """Returns whether a process of this host holds the folder's lock; no lock is taken.

        False says nothing of other hosts, nor where the system does not list its locks.
        """
        try:
            lock = (self._path / ".lock").stat()
            listed = pathlib.Path("/proc/locks").read_text().splitlines()
        except OSError:
            return False
        device = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
        # A line is "1: FLOCK ADVISORY WRITE 708 08:01:13240 0 EOF"; "->" marks one who waits.
        return any(
            "FLOCK" in words and "->" not in words and device in words
            for words in map(str.split, listed)
        )


def folder(address: str) -> LocalFolder:
    """Returns the reader of an address.

    Raises:
      UsageError: it is no path.
    """
    scheme, found, _ = address.partition("://")
    if found:
        raise UsageError(f"{address}: {scheme}:// cannot be read yet: name a folder, or a copy")
    return LocalFolder(os.path.expanduser(address))
