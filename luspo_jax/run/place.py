"""Where a run keeps its files: a folder, or a bucket with a scratch folder on each host.

In a bucket nothing can be appended, locked or renamed. So a run writes on its host, a mirror copies
what changes, and checkpoints go to the bucket directly. The bucket is the truth: a start takes from
it what it needs, and nothing from the scratch folder of an earlier one.
"""

import functools
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterable

import jax

from luspo_jax.hosts import buckets, files, processes
from luspo_jax.hosts.buckets import Bucket
from luspo_jax.hosts.lease import Lease
from luspo_jax.hosts.mirror import Mirror
from luspo_jax.run.trackers import sending as trackers

CHECKPOINTS = "checkpoints"
_BOARD = "processes"
NOTE = ".checkpointed"  # step of the last checkpoint written
# What a start reads from the bucket: what it goes on to write, or checks.
_NEEDED = ("run.json", "metrics.jsonl", trackers.MEMORY, NOTE)
_TRACED = re.compile(r"profile/(process_\d+/)?steps\.json")
_OF_STEPS = re.compile(r"(rollouts|answers)/step_(\d+)\.jsonl")


class Place:
    """A run's place, not yet in use.

    Args:
      workdir: as the user named it.

    Attributes:
      name: for messages: the absolute path, or the address.

    Raises:
      PlaceError: an address of another kind, or its package is not installed.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._bucket = Bucket(str(workdir)) if buckets.is_bucket(workdir) else None
        self.name = self._bucket.url if self._bucket else str(pathlib.Path(workdir).absolute())
        self._held, self._mirror, self._lock = None, None, None

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        """The folder of this host, where files are written; processes must be connected before."""
        if self._bucket is None:
            return pathlib.Path(self.name)
        return _scratch(self.name, jax.process_index())

    @property
    def board(self) -> pathlib.Path:
        """The folder of this host where, on the first one, the guard shows what processes do."""
        return self.folder if self._bucket is None else _scratch(self.name, 0)

    @property
    def shared(self) -> bool:
        """Whether all processes must see the folder: not if a bucket lies behind it."""
        return self._bucket is None

    @property
    def checkpoints(self) -> str:
        """Folder or address of the checkpoints."""
        return f"{self.name}/{CHECKPOINTS}"

    def top(self) -> set[str]:
        """Returns the names directly below, of files and folders."""
        if self._bucket is not None:
            return {name.split("/")[0] for name in self._bucket.entries()}
        return {path.name for path in self.folder.glob("*")}

    def read(self, name: str) -> bytes | None:
        """Returns the content of a file; None if it is not there."""
        if self._bucket is not None:
            return self._bucket.read(name)
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, in order."""
        if self._bucket is not None:
            paths = (name.split("/") for name in self._bucket.entries(CHECKPOINTS))
            committed = (path[1] for path in paths if path[2:] == ["commit_success.txt"])
            return sorted(int(step) for step in committed if step.isdecimal())
        return sorted(
            int(path.name)
            for path in (self.folder / CHECKPOINTS).glob("*")
            if path.name.isdecimal() and (path / "host").is_dir() and (path / "state").is_dir()
        )

    def hold(self) -> None:
        """Takes the place for this run; of several processes, the first takes it.

        Raises:
          PlaceError: another run uses it, or it cannot be written.
        """
        writes = processes.is_writer()
        if self._bucket is None:
            self._lock = files.take_lock(self.folder) if writes else None
            return
        self._lock = files.take_lock(self.folder)
        if writes:
            try:
                self._held = Lease(self._bucket)
            except BaseException:
                self._lock.close()
                raise
        for path in self.folder.iterdir():
            if path.name not in (".lock", _BOARD):  # a guard writes what processes do
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        found = self._fetched()
        self._mirror = Mirror(
            self.folder,
            self._bucket,
            hidden=(NOTE,),
            left_out=("wandb",),  # which W&B has
            may_write=self._held.confirm if self._held else lambda: None,
        )
        self._mirror.adopt(found)
        buckets.wait_long()

    def _fetched(self) -> Collection[str]:
        """Reads what a start needs; processes that do not write need only traces."""
        writes = processes.is_writer()
        own = f"process_{jax.process_index()}/"
        wanted = []
        for name in self._bucket.entries():
            traced = _TRACED.fullmatch(name)
            if (writes and name in _NEEDED) or (traced and traced[1] in (None, own)):
                wanted.append(name)
        for name in wanted:
            self._bucket.download(name, self.folder / name)
        return wanted

    def check(self) -> None:
        """Checks that the place is still this run's, and has what was written before is copied.

        Raises:
          PlaceError: it is not, or a copy failed; FileNotFoundError: the folder is gone.
        """
        if self._held is not None:
            self._held.check()
        if self._mirror is not None:
            self._mirror.nudge()
        if self._lock is not None and not os.path.samestat(
            os.fstat(self._lock.fileno()), (self.folder / ".lock").stat()
        ):
            raise FileNotFoundError(self.folder)

    def flush(self) -> None:
        """Waits until all files are where they are kept.

        Raises:
          PlaceError: they could not be copied.
        """
        if self._mirror is not None:
            self._mirror.flush()

    def drop_after(self, step: int) -> None:
        """Deletes in the bucket the responses of later steps, as a run that repeats them must."""
        if self._bucket is None or not processes.is_writer():
            return
        names = [n for folder in ("rollouts", "answers") for n in self._bucket.entries(folder)]
        self._bucket.delete(_later(names, step))

    def release(self, *, complete: bool = True) -> None:
        """Leaves the place to others.

        Args:
          complete: copy everything before, and delete the scratch folder after; else what is not
            copied yet stays there.

        Raises:
          PlaceError: it could not be copied; it stays in the scratch folder.
        """
        mirror, lease, lock = self._mirror, self._held, self._lock
        self._mirror = self._held = self._lock = None
        copied = False
        try:
            if mirror is not None:
                mirror.close(flush=complete)
                if complete and lease is not None:
                    self._drop_old_export()
                    # What the guard says last comes after this: what it said before is not true.
                    self._bucket.delete(self._bucket.entries(_BOARD))
                copied = complete
        finally:
            try:
                if lease is not None:
                    lease.close()
            finally:
                if lock is not None:
                    if copied:
                        shutil.rmtree(self.folder, ignore_errors=True)
                    lock.close()

    def _drop_old_export(self):
        """Deletes in the bucket what an earlier export left that the last one did not write."""
        if (self.folder / "export" / files.MARK).is_file():
            names = self._bucket.entries("export")
            self._bucket.delete([n for n in names if not (self.folder / n).exists()])


def _later(names: Iterable[str], step: int) -> list[str]:
    matches = ((name, _OF_STEPS.fullmatch(name)) for name in names)
    return [name for name, match in matches if match and int(match[2]) > step]


def _scratch(url: str, index: int) -> pathlib.Path:
    """Returns a process's folder for the files of an address, in the user's cache."""
    last = re.sub(r"[^A-Za-z0-9_.-]", "_", url.rpartition("/")[2])  # the title of figures
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    own = f"{digest}.process_{index}" if index else digest
    return files.user_cache() / "workdirs" / own / last
