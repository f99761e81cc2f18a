"""Worker processes that decode image files, and the threads that wait for them."""

import concurrent.futures
import contextlib
import os
import queue
import selectors
import signal
import subprocess
import sys
import weakref

from luspo_jax.hosts.workers import ALARMS, WALL_FACTOR, read_frame, write_frame
from luspo_jax.images.pixels import Patching

_GRACE = 5.0  # seconds past the limit after which a silent worker is killed from outside


class Pool:
    """Threads that read files and caches, and processes that decode for them."""

    def __init__(self, settings: tuple, size: int):
        self._settings, self._size = settings, size
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(size):
            self._idle.put(None)

    def map(self, function, items):
        """Applies `function` to each item, in order."""
        if len(items) < 2 or self._size < 2:
            return map(function, items)
        with concurrent.futures.ThreadPoolExecutor(self._size) as threads:
            return list(threads.map(function, items))

    def ask(self, data: bytes) -> tuple:
        """Returns a worker's answer to a file's bytes, as `worker.answer`."""
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive():
                worker = Worker(*self._settings)
            return worker.ask(data)
        finally:
            self._idle.put(worker if worker is not None and worker.alive() else None)

    def close(self) -> None:
        """Ends every worker."""
        for _ in range(self._size):
            worker = self._idle.get()
            if worker is not None:
                worker.end()
            self._idle.put(None)


class Worker:
    """One worker process."""

    def __init__(self, patching: Patching, time_limit: float, memory_limit: int | None):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)
        }
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-c"),
                "from luspo_jax.images.worker import main; main()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C does not reach it: it ends when its input closes
        )
        self._limit = time_limit
        self.end = weakref.finalize(self, _kill, self._process)
        write_frame(self._process.stdin.fileno(), (patching, time_limit, memory_limit))

    def alive(self) -> bool:
        """Returns whether the worker is running."""
        return self._process.poll() is None

    def ask(self, data: bytes) -> tuple:
        """Returns the worker's answer; ends the worker if there is none."""
        wait = WALL_FACTOR * self._limit + _GRACE
        try:
            write_frame(self._process.stdin.fileno(), data)
            if self._answers_within(wait):
                return read_frame(self._process.stdout.fileno())
        except (EOFError, OSError):
            code = self._process.wait()
            self.end()
            if -code in ALARMS:
                return ("refused", "timeout", f"stopped at its limit of {self._limit:g} s")
            return ("refused", "crashed", f"the process that decoded it ended with code {code}")
        except BaseException:
            self.end()  # it may hold an unread answer
            raise
        self.end()
        return ("refused", "timeout", f"killed: no answer within {wait:g} s")

    def _answers_within(self, seconds: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return bool(selector.select(seconds))


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
