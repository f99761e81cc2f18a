"""Copies a folder of this host to a bucket in the background, as it changes."""

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Callable, Collection, Iterator

from luspo_jax.hosts.buckets import Bucket
from luspo_jax.hosts.files import MARK

# Seconds between two looks: at least, as buckets let an object be written about once a second, and
# at most, for files that are written between steps.
_PAUSE_S, _IDLE_S = 1.0, 15.0
_LAST = ("metrics.jsonl", "run.json")  # written after what they speak of


class Mirror:
    """Keeps a bucket equal to a folder; a thread does the work.

    A file goes when its size or time has changed, and an object goes when its file is deleted that
    this mirror sent. Names that start with a dot are scratch, but for those in `hidden`.

    Args:
      folder: of this host.
      bucket: its copy.
      hidden: names with a dot that belong to the copy.
      left_out: folders that do not.
      may_write: called before each look; raises to stop.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        bucket: Bucket,
        *,
        hidden: Collection[str] = (),
        left_out: Collection[str] = (),
        may_write: Callable[[], None] = lambda: None,
    ):
        self._folder, self._bucket = folder, bucket
        self._hidden, self._left_out, self._may_write = {MARK, *hidden}, left_out, may_write
        self._sent: dict[str, tuple[int, int]] = {}  # name → size and time of what was sent
        self._wake, self._state = threading.Event(), threading.Condition()
        self._asked = self._done = 0  # looks asked for, and those that are over
        self._hurry = self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def adopt(self, names: Collection[str]) -> None:
        """Takes the files of these names as sent: they were just read from the bucket."""
        self._sent |= {name: _stamp(self._folder / name) for name in names}

    def nudge(self) -> None:
        """Says that something has changed; returns at once.

        Raises:
          PlaceError: an earlier copy failed.
        """
        self._raise()
        self._wake.set()

    def flush(self) -> None:
        """Waits until everything that is in the folder now is in the bucket.

        Raises:
          PlaceError: it could not be copied.
        """
        with self._state:
            self._asked += 1
            mine, self._hurry = self._asked, True
            self._wake.set()
            self._state.wait_for(lambda: self._done >= mine or self._error is not None)
        self._raise()

    def close(self, *, flush: bool = True) -> None:
        """Copies what is left, unless told not to, and ends the thread.

        Raises:
          PlaceError: it could not be copied.
        """
        try:
            if flush and self._thread.is_alive():
                self.flush()
        finally:
            self._closing = True
            self._wake.set()
            self._thread.join()

    def _raise(self):
        if self._error is not None:
            raise self._error

    def _work(self):
        try:
            while True:
                self._wake.wait(_IDLE_S)
                self._wake.clear()
                if self._closing:
                    return
                with self._state:
                    mine, self._hurry = self._asked, False
                self._look()
                with self._state:
                    self._done = mine
                    self._state.notify_all()
                    wait = not self._hurry
                if wait:
                    self._pause()
        except BaseException as error:
            with self._state:
                self._error = error
                self._state.notify_all()

    def _pause(self):
        """Waits until the next look may be taken, unless someone waits for it."""
        until = time.monotonic() + _PAUSE_S
        while time.monotonic() < until and not (self._hurry or self._closing):
            time.sleep(0.02)

    def _look(self):
        self._may_write()
        there = dict(self._files())
        for name in sorted(there, key=lambda name: (name in _LAST, name)):
            if self._sent.get(name) != there[name]:
                with contextlib.suppress(FileNotFoundError):  # deleted since
                    self._bucket.upload(name, self._folder / name)
                    self._sent[name] = there[name]
        gone = [name for name in self._sent if name not in there]
        self._bucket.delete(gone)
        for name in gone:
            del self._sent[name]

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for root, folders, names in os.walk(self._folder):
            folders[:] = [n for n in folders if not n.startswith(".") and n not in self._left_out]
            for name in names:
                path = pathlib.Path(root, name)
                if not name.startswith(".") or name in self._hidden:
                    with contextlib.suppress(FileNotFoundError):
                        yield path.relative_to(self._folder).as_posix(), _stamp(path)


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
