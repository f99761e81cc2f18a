"""SIGTERM asks a run to save what it has and to end: a scheduler sends it before it takes a host.

A run of one process that samples stops at once, with the policy and the stream of prompts of the
step's beginning. One that trains ends its step first, because an update gives its old state away.
Processes of one run agree at the beginning of each step, as none can leave the others in a
collective; so their step must be shorter than the scheduler's grace, or the last checkpoint counts.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

from luspo_jax.hosts import processes
from luspo_jax.hosts.guard import Preempted


class Notice:
    """Listens for SIGTERM; a context manager. Outside the main thread nothing can listen."""

    def __init__(self):
        self.received = False
        self._open = False

    def __enter__(self) -> "Notice":
        self._old = None
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *error) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def agreed(self) -> bool:
        """Whether any process of the run was asked to end; all must call."""
        return any(processes.gather(self.received))

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, SIGTERM raises `Preempted` at once, in a run of one process."""
        alone = len(processes.members()) == 1
        if alone and self.received:
            raise Preempted
        self._open = alone
        try:
            yield
        finally:
            self._open = False

    def _take(self, _number, _frame):
        self.received = True
        if self._open:
            self._open = False  # a second signal must not disturb what is saved now
            raise Preempted
