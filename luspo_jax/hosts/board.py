"""Writes all posts of a run into a folder for people and `experiments.status` to read.

A thread writes, so that a slow disk does not look like death.
"""

import contextlib
import json
import pathlib
import threading
from collections.abc import Iterable
from typing import Any

from luspo_jax.hosts import files


class Board:
    """The files `<process>.json` of a folder, each whole or not at all."""

    def __init__(self, folder: str):
        self._folder = pathlib.Path(folder)
        self._due: dict[int, str] = {}
        self._shown: dict[int, str] = {}
        self._changed, self._idle = threading.Condition(), True
        threading.Thread(target=self._run, name="board", daemon=True).start()

    def show(self, posts: Iterable[dict[str, Any]]) -> None:
        """Has those written that have changed; returns at once."""
        with self._changed:
            for post in posts:
                shown = {name: value for name, value in post.items() if name != "guard"}
                self._due[post["process"]] = json.dumps(shown) + "\n"
            self._changed.notify_all()

    def finish(self, within_s: float) -> None:
        """Waits until all is written, or so long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._due and self._idle, within_s)

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due)
                index = next(iter(self._due))
                text, self._idle = self._due.pop(index), False
            if self._shown.get(index) != text:
                # The worker reports a disk that is full.
                with contextlib.suppress(OSError):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    files.write_text(self._folder / f"{index}.json", text, durable=False)
                    self._shown[index] = text
            with self._changed:
                self._idle = True
                self._changed.notify_all()
