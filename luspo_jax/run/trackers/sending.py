"""Sends a run's numbers to its trackers, in threads: no tracker ends or delays a run.

A tracker may wait for a network for minutes or raise at any call. So each has a thread and a queue
of its own; what fails is told once, and counted. metrics.jsonl has every step whatever happens.
"""

import dataclasses
import json
import math
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from luspo_jax.hosts import files
from luspo_jax.run.trackers.tracker import About, Table, Tracker

MEMORY = "trackers.json"  # in the run's folder: tracker → the id of its run, its last step
_WAITING = 1024  # calls that wait for a tracker at most
_LONGEST = 300  # characters of an error
_CLOSING_S = 60.0  # that the end of a run waits for all trackers

Say = Callable[[str], None]


class Trackers:
    """The trackers of a run.

    Args:
      trackers: by name, not yet started.
      about: the run.
      say: called with a line for the user, from the thread that uses this object.
      closing_s: seconds that `close` waits at most.
    """

    def __init__(
        self,
        trackers: Mapping[str, Tracker],
        about: About,
        say: Say = lambda line: None,
        *,
        closing_s: float = _CLOSING_S,
    ):
        memory = _Memory(about.folder / MEMORY)
        self._closing_s = closing_s
        self._senders = [
            _Sender(name, tracker, about, memory, say) for name, tracker in trackers.items()
        ]

    def begin_after(self, step: int) -> None:
        """Says, before the first step is logged, that what is later than `step` is void."""
        for sender in self._senders:
            sender.begin_after(step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends the metrics of a step; trackers get those that are finite."""
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        for sender in self._senders:
            sender.log(step, finite)

    def table(self, step: int, table: Table) -> None:
        """Sends a table of completions, before the metrics of its step."""
        for sender in self._senders:
            sender.table(step, table)

    def close(self, *, failed: bool = False) -> None:
        """Ends all; waits for what they still have to do, but not for ever."""
        for sender in self._senders:
            sender.end(failed)
        until = time.monotonic() + self._closing_s
        for sender in self._senders:
            sender.wait(until)


class _Memory:
    """What is known of trackers from one start of a run to the next, in a file."""

    def __init__(self, path: pathlib.Path):
        self._path, self._lock = path, threading.Lock()
        try:
            self._known = files.read_json(path) if path.is_file() else {}
        except (OSError, ValueError):  # a tracker's run is not worth a run
            self._known = {}

    def get(self, name: str) -> tuple[str, int]:
        """Returns (id, last step) of a tracker's run; ("", −1) if there is none."""
        known = self._known.get(name) or {}
        return known.get("id", ""), known.get("step", -1)

    def set(self, name: str, run_id: str, step: int) -> None:
        with self._lock:
            self._known[name] = {"id": run_id, "step": step}
            text = json.dumps(self._known, indent=1) + "\n"
            files.write_text(self._path, text, durable=False)


class _Sender:
    """One tracker, its queue and its thread."""

    def __init__(self, name, tracker, about, memory, say):
        self._name, self._tracker, self._about = name, tracker, about
        self._memory, self._say = memory, say
        self._id, self._seen = memory.get(name)
        self._calls: queue.Queue = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker {name}")
        self._after, self._off, self._told, self._failed = -1, False, False, False
        self._problem, self._asked, self._done = "", 0, 0  # steps to log, and logged

    def begin_after(self, step: int) -> None:
        self._after = step
        if self._tracker.OVERWRITES or self._seen <= step:
            return
        self._say(
            f"{self._name} has steps up to {self._seen} of an earlier attempt, and does not take "
            f"a step again: those after {step} are computed anew and shown there as they were"
        )

    def log(self, step, numbers) -> None:
        self._send(step, lambda tracker: tracker.log(step, numbers), last=step)

    def table(self, step, table) -> None:
        self._send(step, lambda tracker: tracker.table(step, table), last=None)

    def _send(self, step, call, last) -> None:
        if self._tracker.OVERWRITES or step > self._seen:
            self._asked += last is not None
            if not self._off:
                self._put((call, last))
        self._tell()

    def _put(self, item) -> None:
        if not self._thread.ident:
            self._thread.start()
        try:
            self._calls.put_nowait(item)
        except queue.Full:
            self._problem = self._problem or f"it is more than {_WAITING} calls behind"

    def _tell(self) -> None:
        if self._problem and not self._told:
            self._told = True
            self._say(
                f"warning: tracker {self._name}: {self._problem}; the run goes on, and "
                "metrics.jsonl has every step"
            )

    def _work(self) -> None:
        """Makes the calls; all of it is in the thread."""
        try:
            about = dataclasses.replace(self._about, after=self._after)
            self._id = self._tracker.start(about, self._id)
            self._remember(self._seen)
        except Exception as error:
            self._off, self._problem = True, f"it could not be started ({_words(error)})"
        while (item := self._calls.get()) is not None:
            call, last = item
            if self._off:
                continue
            try:
                call(self._tracker)
                if last is not None:
                    self._done += 1
                    self._remember(last)
            except Exception as error:
                self._problem = self._problem or _words(error)
        if not self._off:
            try:
                self._tracker.close(failed=self._failed)
            except Exception as error:
                self._problem = self._problem or f"at its end: {_words(error)}"

    def _remember(self, step):
        if not self._tracker.OVERWRITES:
            self._memory.set(self._name, self._id, step)

    def end(self, failed: bool) -> None:
        self._failed = failed
        if self._thread.ident:
            self._put(None)

    def wait(self, until: float) -> None:
        if not self._thread.ident:
            return
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._problem = self._problem or "it has not sent everything in time"
        self._tell()
        lost = self._asked - self._done
        if lost:
            steps = f"{lost:,} step{'s' * (lost != 1)}"
            self._say(f"warning: tracker {self._name} lacks {steps}, which metrics.jsonl has")


def _words(error: Exception) -> str:
    """Returns an error on one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:_LONGEST]}" if said else type(error).__name__


def completions(records: Sequence, most: int) -> Table:
    """Returns the first responses as a table, with the fields that people read."""
    shown = list(records)[:most]
    columns = tuple(name for name in _SHOWN if shown and hasattr(shown[0], name))
    rows = [tuple(_cell(getattr(record, name)) for name in columns) for record in shown]
    return Table(columns, rows)


# Fields of metrics.RolloutRecord and of metrics.AnswerRecord.
_SHOWN = (
    "prompt", "response", "answer", "reference", "reward", "advantage", "length", "truncated",
    "exact",
)  # fmt: skip


def _cell(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
