"""What a workdir says of its run: how far, how fast, how well, by whom, and whether it still goes.

Ages are by the time of this host and the one that stamps the files; where they differ, a watch sees
heartbeats change and goes by its own clock (`Beats`).
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.progress.reading import BucketFolder, LocalFolder
from luspo_jax.metrics import METRICS, MetricsError, whole_lines

RUNNING, FINISHED, SILENT, FAILED = "running", "finished", "silent", "failed"
UNSTARTED, GONE = "never started", "gone"
WELL = (RUNNING, FINISHED)
_LAST = 10  # steps that the time per step is taken from
# Without heartbeats silence is known by what a run writes: each step, once there are steps. Before
# the first one programs compile and the base policy is measured, and nothing is written.
_STEPS_SILENT = 3  # times the longest of the last steps
_FIRST_STEP_S = 3600.0
_DEAD_AFTER_S = 30.0  # hosts.dead_after_s, where run.json does not say it
_LOSS, _WHILE, _NAN = "held_out/loss", "1 while ", math.nan
_POST = (
    "process", "host", "pid", "attempt", "beat", "status", "step", "phase", "message"
)  # fmt: skip
# Files and folders whose times are signs of life; what others put beside them is none.
_OURS = (
    "run.json", "metrics.jsonl", ".checkpointed", ".lock", "finished.json", "checkpoints",
    "rollouts", "answers", "tensorboard", "processes", "profile", "export", "summary.png",
)  # fmt: skip
_PARTS = ("checkpoints", "rollouts", "export")


@dataclasses.dataclass(frozen=True)
class Point:
    """A value and the step after which it was measured."""

    step: int
    value: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """A measure of held-out problems: the first, the best and the last value."""

    first: Point
    best: Point
    last: Point


@dataclasses.dataclass(frozen=True)
class Process:
    """The heartbeat of a process.

    Attributes:
      index, host, pid: name it.
      status: running, done, preempted, failed, stopped or broken, as its guard wrote it; "dead" if
        it runs and gives no sign of life.
      step, phase: where it is or ended, steps counted from 1.
      age_s: since its last sign of life.
      message: why it ended.
    """

    index: int
    host: str
    pid: int
    status: str
    step: int
    phase: str
    age_s: float
    message: str


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known of a run; None or empty for what is not.

    Attributes:
      workdir: as it was named.
      state: one of the words at the head of this module.
      age_s: seconds since the last sign of life.
      notes: lines on what is missing, damaged or uncertain.
      step, num_steps: steps taken, and of the whole run.
      seconds_per_step: median of the last ten.
      ends_in_s: until the last step, evaluations included.
      values: last values by metric, with their steps.
      curves: held-out measures by metric.
      flags: metrics that warn, with what they say.
      processes: of a run of several.
      checkpoints: steps of the complete ones.
      best_checkpoint: the one of them whose policy did best on held-out problems.
      bytes: size of the workdir by part.
    """

    workdir: str
    state: str
    age_s: float | None = None
    notes: Sequence[str] = ()
    step: int | None = None
    num_steps: int | None = None
    seconds_per_step: float | None = None
    ends_in_s: float | None = None
    values: Mapping[str, Point] = dataclasses.field(default_factory=dict)
    curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    processes: Sequence[Process] = ()
    checkpoints: Sequence[int] = ()
    best_checkpoint: int | None = None
    bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Beats:
    """When each process's heartbeat was last seen to change, by the clock of this host."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._seen: dict[tuple[str, int], tuple[Any, float | None]] = {}

    def age(self, workdir: str, post: Mapping[str, Any], written_s: float) -> float:
        """Returns seconds since a process's last sign of life.

        Args:
          workdir: of the run.
          post: of the heartbeat file.
          written_s: the age of that file, which is all that a first look has.
        """
        key, beat = (workdir, post["process"]), (post["attempt"], post["beat"])
        before, changed = self._seen.get(key, (beat, None))
        if before != beat:
            changed = self._clock()
        self._seen[key] = beat, changed
        return max(0.0, written_s) if changed is None else self._clock() - changed


def progress(
    workdir: str,
    folder: LocalFolder | BucketFolder,
    beats: Beats,
    *,
    now: float | None = None,
) -> Progress:
    """Returns what a workdir says.

    Args:
      workdir: its name, for the result.
      folder: its reader.
      beats: of earlier looks.
      now: seconds since 1970; None asks the clock.
    """
    now = time.time() if now is None else now
    entries = folder.entries()
    if entries is None:
        return Progress(workdir, GONE)
    notes: list[str] = []
    config = _config(folder.read("run.json"), notes)
    rows = _rows(folder.read("metrics.jsonl"), notes)
    dead_after_s = config.get("hosts.dead_after_s", _DEAD_AFTER_S) + folder.late_s
    posts = _posts(folder, entries, dead_after_s, notes)
    if not (rows or posts or "run.json" in entries):
        return Progress(workdir, UNSTARTED)
    known = Progress(workdir, "", notes=notes, bytes=_bytes(entries))
    ours = (e.written for name, e in entries.items() if name.split("/")[0] in _OURS)
    seconds = [row["timing_s/step"] for row in rows if "timing_s/step" in row][-_LAST:]
    checkpoints = _checkpoints(entries, folder.marks)
    known = dataclasses.replace(
        known,
        age_s=max(0.0, now - max(ours)),
        step=max((row["step"] for row in rows), default=None),
        num_steps=config.get("num_steps"),
        seconds_per_step=statistics.median(seconds) if seconds else None,
        values=_values(rows),
        curves=_curves(rows),
        processes=[
            _process(post, beats.age(workdir, post, now - written), dead_after_s)
            for post, written in posts
        ],
        checkpoints=checkpoints,
        best_checkpoint=_best_checkpoint(checkpoints, rows),
    )
    state = _state(known, entries, rows, folder.is_locked())
    return dataclasses.replace(
        known,
        state=state,
        flags=_flags(known.values),
        ends_in_s=_ends_in_s(known, config) if state == RUNNING else None,
    )


def members(folder: LocalFolder | BucketFolder) -> list[str]:
    """Returns the folders of a sweep's members, as in members/luspo/seed_0; none of a run."""
    if not folder.may_be_sweep:
        return []
    paths = (name.split("/") for name in folder.entries() or () if name.startswith("members/"))
    return sorted({"/".join(path[:3]) for path in paths if len(path) > 3})


def _config(content: bytes | None, notes: list[str]) -> Mapping[str, Any]:
    if content is None:
        notes.append("run.json is not there: the number of steps is not known")
        return {}
    try:
        return dict(json.loads(content)["config"])
    except (ValueError, KeyError, TypeError) as error:
        notes.append(f"run.json is damaged ({error}): the number of steps is not known")
        return {}


def _rows(content: bytes | None, notes: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if content is None:
        return rows
    try:
        rows.extend(row for _, row in whole_lines(content, "metrics.jsonl"))
    except MetricsError as error:
        notes.append(str(error))
    if content and not content.endswith(b"\n"):
        notes.append("metrics.jsonl: its last line is half written, and left out")
    return rows


def _posts(folder, entries, dead_after_s, notes):
    """Returns the heartbeats of the latest start, each with the time it was written."""
    found = []
    for name in sorted(n for n in entries if n.startswith("processes/") and n.endswith(".json")):
        try:
            post = json.loads(folder.read(name) or b"")
            found.append(({field: post[field] for field in _POST}, entries[name].written))
        except (ValueError, KeyError, TypeError) as error:
            notes.append(f"{name} is no heartbeat ({type(error).__name__}: {error})")
    newest, written = max(found, key=lambda pair: pair[1], default=({}, 0.0))
    metrics = entries.get("metrics.jsonl")
    if metrics and metrics.written > written + dead_after_s:
        return []  # of an earlier start: the run goes on as one process, which has none
    return [pair for pair in found if pair[0]["attempt"] == newest["attempt"]]


def _process(post, age_s, dead_after_s):
    dead = post["status"] == "running" and age_s > dead_after_s
    shown = {name: post[name] for name in _POST if name not in ("process", "attempt", "beat")}
    return Process(
        index=post["process"], age_s=age_s, **(shown | ({"status": "dead"} if dead else {}))
    )


def _state(known, entries, rows, locked):
    statuses = {process.status for process in known.processes}
    if statuses & {"failed", "stopped", "broken"}:
        return FAILED
    if statuses & {"dead", "preempted"}:
        return SILENT
    if "running" in statuses:
        return RUNNING
    if locked:
        return RUNNING
    complete = known.num_steps is not None and (known.step or 0) >= known.num_steps
    kept = known.num_steps in known.checkpoints or not known.checkpoints
    if statuses or "finished.json" in entries or (complete and kept):
        return FINISHED
    if locked is False:
        known.notes.append("no run holds its lock: it was given back, or is not renewed any more")
        return SILENT
    steps = [_seconds(row) for row in rows[-_LAST:] if "timing_s/step" in row]
    if known.age_s > (max(_DEAD_AFTER_S, _STEPS_SILENT * max(steps)) if steps else _FIRST_STEP_S):
        return SILENT
    known.notes.append("no process of this host holds its lock: another host has it, or it ended")
    return RUNNING


def _seconds(row):
    return row["timing_s/step"] + row.get("timing_s/testing", 0.0)


def _ends_in_s(known, config):
    """Estimates the time until the last step, with the evaluations on the way."""
    if None in (known.step, known.num_steps, known.seconds_per_step):
        return None
    left = range(known.step + 1, known.num_steps + 1)
    every, testing = config.get("eval.every", 0), known.values.get("timing_s/testing")
    tests = sum(step == known.num_steps or (every > 0 and step % every == 0) for step in left)
    return len(left) * known.seconds_per_step + (tests * testing.value if testing else 0.0)


def _values(rows):
    return {
        name: Point(row["step"], float(value))
        for row in rows
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def _curves(rows):
    """Returns the course of each held-out measure; of a loss the least is best."""
    names = sorted({n for row in rows for n in row if n.startswith("val-core/") or n == _LOSS})
    curves = {}
    for name in names:
        points = [
            Point(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, _NAN))
        ]
        if points:
            best = min(points, key=lambda p: _better(name, p.value))
            curves[name] = Curve(points[0], best, points[-1])
    return curves


def _better(name, value):
    """Returns what is the smaller, the better a held-out value is."""
    return value if name == _LOSS else -value


def _checkpoints(entries, marks):
    """Returns the steps of complete checkpoints: others have other names, or lack a part."""
    parts: dict[str, set[str]] = {}
    for path in (name.split("/") for name in entries if name.startswith("checkpoints/")):
        if len(path) > 2 and path[1].isdecimal():
            parts.setdefault(path[1], set()).add(path[2])
    return sorted(int(step) for step, names in parts.items() if names >= marks)


def _best_checkpoint(checkpoints, rows):
    scores = {
        row["step"]: _better(name, row[name])
        for row in rows
        for name in row
        if row["step"] in checkpoints and (name.startswith("val-core/") or name == _LOSS)
    }
    return min(scores, key=scores.get, default=None)


def _flags(values):
    """Returns the metrics that warn now: those declared as 1 while something is wrong."""
    flags = {
        name: METRICS[name].meaning.removeprefix(_WHILE)
        for name, point in values.items()
        if name in METRICS and METRICS[name].meaning.startswith(_WHILE) and point.value == 1
    }
    skipped = values.get("actor/skipped_updates")
    if skipped and skipped.value > 0:
        flags["actor/skipped_updates"] = f"{skipped.value:.0f} updates were not finite"
    return flags


def _bytes(entries):
    sizes = dict.fromkeys((*_PARTS, "rest"), 0)
    for name, entry in entries.items():
        part = name.split("/")[0]
        sizes[part if part in _PARTS else "rest"] += entry.size
    return sizes
