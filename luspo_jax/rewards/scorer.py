"""Scores batches: cheap verifiers run in this process, the others in workers that can be killed."""

import collections
import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence

from luspo_jax.hosts.workers import WALL_FACTOR, read_frame, write_frame
from luspo_jax.rewards.record import Reward, Sample, Verdict, combine, run
from luspo_jax.rewards.registry import Options, Parts, verifiers

_GRACE = 5.0  # seconds past the limit after which a silent worker is killed from outside
_WINDOW = 1_000  # latest samples that the failure rate covers
_FEWEST_FAILURES = 10  # fewer than this many failures never stop a run


class TooManyFailures(RuntimeError):
    """Too many verdicts are timeouts or errors to trust the rewards."""


class Scorer:
    """Scores batches of samples by a weighted sum of verifiers.

    Args:
      parts: name → weight, or such pairs; a name is a key of REWARDS or `module:function`.
      options: name → that reward's options.
      workers: worker processes for isolated verifiers; by default one per core, at most 16.
      time_limit: seconds of processor time allowed for one verdict of an isolated verifier; the
        wall-clock limit is three times as long.
      max_failure_rate: share of timeouts and errors among the latest samples above which scoring
        stops.
      memory_limit: bytes of address space per worker; None = no limit.
      recycle_after: verdicts after which a worker's child process is replaced.

    Attributes:
      labels: name → `id@version` of each verifier, to store with every result.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        options: Options | None = None,
        workers: int | None = None,
        time_limit: float = 5.0,
        max_failure_rate: float = 0.05,
        memory_limit: int | None = 4 << 30,
        recycle_after: int = 1_000,
    ):
        self._weights = dict(parts)
        self._verifiers = verifiers(self._weights, options)
        self._max_failure_rate = max_failure_rate
        self._recent = collections.deque(maxlen=_WINDOW)
        self.labels = {name: check.label for name, check in self._verifiers.items()}
        isolated = [name for name, check in self._verifiers.items() if check.isolated]
        settings = {
            "parts": isolated,
            "options": {name: dict(options[name]) for name in isolated if name in (options or {})},
            "time_limit": time_limit,
            "memory_limit": memory_limit,
            "recycle_after": recycle_after,
        }
        self._pool = _Pool(settings, workers or min(16, _cores()))

    def score_batch(self, samples: Sequence[Sample]) -> list[Reward]:
        """Returns the reward of each sample, in order.

        Raises:
          TooManyFailures: timeouts and errors exceed the allowed rate.
        """
        tasks = []
        verdicts: list[dict[str, Verdict]] = [{} for _ in samples]
        for row, sample in enumerate(samples):
            for name, check in self._verifiers.items():
                if check.isolated:
                    tasks.append((row, name))
                else:
                    verdicts[row][name] = run(check, sample)
        isolated = self._pool.run([(name, samples[row]) for row, name in tasks])
        for (row, name), verdict in zip(tasks, isolated, strict=True):
            verdicts[row][name] = verdict
        rewards = [combine(self._weights, found) for found in verdicts]
        self._check_failures(rewards)
        return rewards

    def _check_failures(self, rewards: list[Reward]) -> None:
        self._recent.extend(not reward.judged for reward in rewards)
        failures = sum(self._recent)
        if failures < _FEWEST_FAILURES or failures <= self._max_failure_rate * len(self._recent):
            return
        reasons = collections.Counter(reward.detail for reward in rewards if not reward.judged)
        listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        raise TooManyFailures(
            f"{failures} of the last {len(self._recent)} rewards are timeouts or errors, more than "
            f"max_failure_rate = {self._max_failure_rate:g} allows. In this batch: {listed}"
        )

    def close(self) -> None:
        """Ends the worker processes; the next batch starts new ones."""
        self._pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _cores() -> int:
    """Returns the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class _Worker:
    """One worker process and its current task."""

    def __init__(self, settings: dict):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from luspo_jax.rewards.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C does not reach it
        )
        self._limit = settings["time_limit"]
        self._end = weakref.finalize(self, _kill, self._process)
        self._ready = False
        self.task: int | None = None
        self.deadline = float("inf")
        write_frame(self._process.stdin.fileno(), settings)

    def fileno(self) -> int:
        """Returns the descriptor that becomes readable when there is an answer."""
        return self._process.stdout.fileno()

    def give(self, task: int, payload) -> None:
        """Sends a task; the first call waits until the process has imported what it needs."""
        if not self._ready:
            self._await_start()
        self.task, self.deadline = task, time.monotonic() + WALL_FACTOR * self._limit + _GRACE
        write_frame(self._process.stdin.fileno(), payload)

    def _await_start(self) -> None:
        try:
            failure = read_frame(self.fileno())
        except EOFError:
            failure = f"it ended with exit code {self._process.wait()}"
        if failure is not None:
            raise RuntimeError(f"a reward worker did not start: {failure}")
        self._ready = True

    def take(self) -> Verdict:
        """Returns the answer to the task; raises EOFError if the process is gone."""
        verdict = read_frame(self.fileno())
        self.task, self.deadline = None, float("inf")
        return verdict

    def end(self) -> int:
        """Kills the process and everything it started; returns its exit code."""
        self._end()
        return self._process.returncode


def _kill(process: subprocess.Popen) -> None:
    """Ends a worker with its child: by SIGTERM, so that it reaps the child, or else by force."""
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdin.close()
    process.stdout.close()


class _Pool:
    """Worker processes, started on demand; each has one task at a time."""

    def __init__(self, settings: dict, size: int):
        self._settings, self._size = settings, size
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def run(self, tasks: list) -> list[Verdict]:
        """Returns the verdict on each task, in order."""
        if not tasks:
            return []
        with self._lock:
            try:
                return self._run(tasks)
            except BaseException:
                self.close()  # a worker may hold an answer that nobody will read
                raise

    def _run(self, tasks: list) -> list[Verdict]:
        while len(self._workers) < min(self._size, len(tasks)):
            self._workers.append(_Worker(self._settings))
        verdicts: list[Verdict | None] = [None] * len(tasks)
        waiting = collections.deque(range(len(tasks)))
        busy: set[_Worker] = set()
        while waiting or busy:
            for worker in [w for w in self._workers if w not in busy][: len(waiting)]:
                task = waiting.popleft()
                busy.add(self._give(worker, task, tasks[task]))
            for worker in self._answered(busy):
                busy.discard(worker)
                task = worker.task
                verdicts[task] = self._take(worker)
        return verdicts

    def _give(self, worker: _Worker, task: int, payload) -> _Worker:
        """Sends a task to a worker, or to its successor if it has died since its last one."""
        try:
            worker.give(task, payload)
        except BrokenPipeError:
            worker = self._replace(worker)
            worker.give(task, payload)
        return worker

    def _replace(self, worker: _Worker) -> _Worker:
        worker.end()
        successor = _Worker(self._settings)
        self._workers[self._workers.index(worker)] = successor
        return successor

    def _answered(self, busy: set[_Worker]) -> list[_Worker]:
        """Returns the busy workers that have an answer, have died, or are past their deadline."""
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker, selectors.EVENT_READ)
            wait = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            ready = [key.fileobj for key, _ in selector.select(wait)]
        now = time.monotonic()
        return ready or [worker for worker in busy if worker.deadline <= now]

    def _take(self, worker: _Worker) -> Verdict:
        overdue = worker.deadline <= time.monotonic()
        try:
            if not overdue:
                return worker.take()
        except EOFError:
            pass
        except Exception as error:  # the verifier wrote to the answer stream
            self._replace(worker)
            return Verdict(0.0, "error", detail=f"its answer cannot be read: {error}"[:500])
        self._replace(worker)
        if overdue:
            return Verdict(0.0, "timeout", detail="killed: it did not answer in time")
        return Verdict(0.0, "error", detail=f"the worker process died (exit code {worker.end()})")

    def close(self) -> None:
        """Ends every worker."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
