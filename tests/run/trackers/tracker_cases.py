"""Trackers that remember and that raise; and a run whose steps are in part repeated."""

import threading

from luspo_jax.metrics import RolloutRecord, read_metrics
from luspo_jax.run.trackers.registry import TRACKERS
from luspo_jax.run.trackers.sending import Trackers
from luspo_jax.run.trackers.tracker import About
from luspo_jax.run.writers import MetricsWriter

COLUMNS = ("prompt", "response", "answer", "reward", "advantage", "length", "truncated")
ROW = ("1+1?", "∑ = 2 </td><script>", "2", 1.0, 0.5, 3, False)


def _record():
    prompt, response, answer, reward, advantage, length, truncated = ROW
    return RolloutRecord(
        prompt_id=3,
        sample_id=0,
        prompt=prompt,
        response=response,
        answer=answer,
        tokens=[1, 2, 3],
        reward=reward,
        parts={"exact": 1.0},
        status="ok",
        prediction="2",
        advantage=advantage,
        length=length,
        truncated=truncated,
    )


def _write(folder, name, after, steps):
    about = About(folder, "rl", "sweep", "member", {"seed": 3, "model.path": "m"})
    lines = []
    trackers = Trackers({name: TRACKERS[name]()}, about, lines.append)
    writer = MetricsWriter(folder, trackers=trackers, num_completions=1, console=None)
    writer.truncate_after(after)
    for step in steps:
        values = {"reward": step / 7, "val-core/toy/acc/mean@4": 0.5, "actor/lr": float("nan")}
        if step == 2:
            writer.show_completions(step, [_record()])
        writer.write(step, values)
    writer.close()
    assert not [line for line in lines if "warning" in line]


def interrupted_run(folder, name):
    """Writes steps 0–4, then goes on from step 2 to step 6; returns step → numbers of the file."""
    _write(folder, name, -1, range(5))
    _write(folder, name, 2, range(3, 7))
    rows = {row.pop("step"): row for row in read_metrics(folder / "metrics.jsonl")}
    assert list(rows) == list(range(7))
    for row in rows.values():
        del row["actor/lr"]  # not a number: no tracker gets it
    return rows


class Recorder:
    """A tracker that remembers what it is told."""

    PACKAGE, EXTRA = "json", ""

    def __init__(self, overwrites=False):
        self.OVERWRITES, self.calls, self.main = overwrites, [], threading.get_ident()

    def prepare(self):
        pass

    def _add(self, *call):
        assert threading.get_ident() != self.main
        self.calls.append(call)

    def start(self, about, known):
        self._add("start", about.after, known)
        return known or "new"

    def log(self, step, numbers):
        self._add("log", step, dict(numbers))

    def table(self, step, table):
        self._add("table", step, table)

    def close(self, *, failed):
        self._add("close", failed)


class Raising(Recorder):
    """Raises in one of its methods."""

    def __init__(self, where):
        super().__init__()
        self._where = where

    def _add(self, *call):
        super()._add(*call)
        if call[0] == self._where:
            raise OSError(28, "no space\nleft")
