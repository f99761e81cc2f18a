"""The signs of life of one worker: a thread that posts what it does, and reads the others' posts.

The thread hands what it has read to the guard, which judges it. It raises nothing: a store that
cannot be reached is silence, which the guard notices.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from luspo_jax.hosts import peers

_NEWS_S = 0.5  # until a new phase is in the store


class TextStore(Protocol):
    """One text for each process; see `luspo_jax.hosts.store.Store`."""

    def put(self, index: int, text: str) -> None:
        """Replaces the text of a process."""

    def texts(self) -> list[str]:
        """Returns the texts of all processes that have put one."""

    def meet(self, label: str, timeout_s: float) -> None:
        """Waits until all processes are here; `label` names the place."""


class Signs:
    """Posts every `peers.BEAT_S` seconds, and soon after news."""

    def __init__(
        self,
        store: TextStore,
        index: int,
        post: Callable[[], dict[str, Any]],
        tell: Callable[..., None],
    ):
        """Starts the thread.

        Args:
          store: where all processes post.
          index: of this process.
          post: returns what to post now.
          tell: sends a message to the guard.
        """
        self._store, self._index, self._post, self._tell = store, index, post, tell
        self._changed = threading.Condition()
        self._due, self._ended = 0.0, False
        self._asked = self._answered = 0  # beats that somebody waits for
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Makes news known soon; phases that follow one another fast share a beat."""
        with self._changed:
            self._due = min(self._due, time.monotonic() + _NEWS_S)
            self._changed.notify_all()

    def now(self, within_s: float = 1.0) -> None:
        """Returns when the others can read what is to be posted now, or after so many seconds."""
        with self._changed:
            self._asked += 1
            mine, self._due = self._asked, 0.0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._answered >= mine or self._ended, within_s)

    def leave(self, timeout_s: float) -> None:
        """Waits for the others at the end of a run, then ends the signs of life."""
        with contextlib.suppress(Exception):  # the caller's own goodbye will tell
            self._store.meet("end", timeout_s)
            self._tell(left=True)
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(peers.BEAT_S)

    def _run(self):
        beat = 0
        next_read = 0.0
        while True:
            with self._changed:
                while not self._ended and (left := self._due - time.monotonic()) > 0:
                    self._changed.wait(left)
                if self._ended:
                    return
                self._due = time.monotonic() + peers.BEAT_S
                waiting = self._asked
            beat += 1
            with contextlib.suppress(Exception):  # of jax's runtime, in whatever class
                self._tell(asks=True)
                self._store.put(self._index, json.dumps(self._post() | {"beat": beat}))
                if time.monotonic() >= next_read:
                    next_read = time.monotonic() + peers.BEAT_S - _NEWS_S / 2
                    posts = [json.loads(text) for text in self._store.texts()]
                    self._tell(posts=[p for p in posts if p["process"] != self._index])
            with self._changed:
                self._answered = waiting
                self._changed.notify_all()
