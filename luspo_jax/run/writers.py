"""Writes the metrics and responses of a run, and computes the speed of a step."""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from tqdm import tqdm

from luspo_jax.experience.groups import Rollouts
from luspo_jax.hosts import files, processes
from luspo_jax.metrics import (
    AnswerRecord,
    RolloutRecord,
    StepMetrics,
    declared,
    json_line,
    lines_and_records,
)
from luspo_jax.run import fields
from luspo_jax.run.build import Run
from luspo_jax.run.memory import peak_memory
from luspo_jax.run.sft.build import SftRun
from luspo_jax.run.trackers import registry
from luspo_jax.run.trackers.registry import TENSORBOARD, TRACKERS
from luspo_jax.run.trackers.sending import Trackers, completions
from luspo_jax.run.trackers.tracker import About
from luspo_jax.run.workdir import Workdir

ROLLOUTS, ANSWERS = "rollouts", "answers"  # folders: of training, and to held-out prompts


def console_line(step: int, num_steps: int | None, values: Mapping[str, float]) -> str:
    """Formats a step as one line: reward, length, truncation, clipping, gradient, time."""
    shown = (
        ("reward", "reward", "{:.3f}"),
        ("sft/loss", "loss", "{:.4f}"),
        ("response_length/mean", "length", "{:.1f}"),
        ("response_length/clip_ratio", "truncated", "{:.1%}"),
        ("actor/pg_clipfrac", "clipped", "{:.1%}"),
        ("actor/entropy", "entropy", "{:.2f}"),
        ("actor/grad_norm", "|g|", "{:.3g}"),
        ("timing_s/step", "time", "{:.2f} s"),
        ("held_out/loss", "held out", "{:.4f} nats a token"),
        ("answers/length/mean", "answers", "{:.1f} tokens"),
    )
    of = f"/{num_steps}" if num_steps else ""
    fields = [f"{label} {form.format(values[n])}" for n, label, form in shown if n in values]
    accuracies = [n for n in values if n.startswith("val-core/")]
    fields += [f"{name.removeprefix('val-core/')} {values[name]:.3f}" for name in accuracies]
    return " | ".join([f"step {step}{of}", *fields])


class MetricsWriter:
    """Writes each step to metrics.jsonl, the console and the trackers.

    Args:
      workdir: folder of the run.
      trackers: of the run; None for none.
      num_steps: steps of the whole run, for the console.
      num_completions: responses of a step that trackers show at most.
      console: called with the console line; None for no console.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        trackers: Trackers | None = None,
        num_steps: int | None = None,
        num_completions: int = 0,
        console: Callable[[str], None] | None = print,
    ):
        self._workdir = pathlib.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._num_steps, self._console = num_steps, console
        self._trackers, self._num_completions = trackers, num_completions

    @property
    def path(self) -> pathlib.Path:
        """The jsonl file."""
        return self._workdir / "metrics.jsonl"

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of a step.

        Raises:
          KeyError: a name that is not declared.
        """
        for name in values:
            declared(name)
        numbers = {name: float(value) for name, value in values.items()}
        _append(self.path, json_line(step, numbers))
        if self._trackers is not None:
            self._trackers.log(step, numbers)
        if self._console is not None:
            self._console(console_line(step, self._num_steps, numbers))

    def truncate_after(self, step: int) -> None:
        """Deletes everything after a step, as a resumed run must."""
        if self.path.exists():
            kept = [
                line.decode() + "\n"
                for line, record in lines_and_records(self.path)
                if record["step"] <= step
            ]
            if not self.path.read_bytes().endswith(b"\n") and self._console is not None:
                self._console(f"{self.path}: its last line was cut off, and is dropped")
            files.write_text(self.path, "".join(kept))
        folders = (self._workdir / folder for folder in (ROLLOUTS, ANSWERS))
        for path in (path for folder in folders for path in folder.glob("step_*.jsonl")):
            number = path.stem.removeprefix("step_")
            if number.isdecimal() and int(number) > step:  # other files are not ours
                path.unlink()
        if self._trackers is not None:
            self._trackers.begin_after(step)

    def write_rollouts(
        self, step: int, records: Iterable[RolloutRecord | AnswerRecord], folder: str = ROLLOUTS
    ) -> pathlib.Path:
        """Writes a step's responses to FOLDER/step_NNNNNN.jsonl, whole or not at all."""
        path = self._workdir / folder / f"step_{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in records)
        files.write_text(path, "".join(lines))
        return path

    def show_completions(self, step: int, records: Iterable[RolloutRecord | AnswerRecord]) -> None:
        """Shows the first responses of a step in the trackers; before its metrics are written."""
        if self._trackers is not None and self._num_completions:
            self._trackers.table(step, completions(records, self._num_completions))

    def close(self) -> None:
        """Ends the trackers; during an exception, as of a run that did not come to its end."""
        if self._trackers is not None:
            self._trackers.close(failed=sys.exc_info()[0] is not None)


class SilentWriter:
    """Replaces MetricsWriter in processes that write nothing."""

    def truncate_after(self, step: int) -> None:
        """Does nothing."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def write_rollouts(
        self, step: int, records: Iterable[RolloutRecord | AnswerRecord], folder: str = ROLLOUTS
    ) -> None:
        """Does nothing."""

    def show_completions(self, step: int, records: Iterable[RolloutRecord | AnswerRecord]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _append(path: pathlib.Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writer(run: Run | SftRun, workdir: Workdir, bar: tqdm) -> MetricsWriter | SilentWriter:
    """Returns the process's writer; times, throughput and memory are those of process 0."""
    if not processes.is_writer():
        return SilentWriter()
    output = run.settings.output
    about = About(
        workdir.path,
        output.project or "luspo_jax",
        output.group,
        output.run_name or pathlib.PurePath(workdir.name).name,
        {k: v for k, v in fields.flat(run.config).items() if v is not None},
    )
    made = {name: TRACKERS[name]() for name in registry.names(output.trackers)}
    if output.tensorboard:
        made["tensorboard"] = TENSORBOARD()
    for tracker in made.values():
        tracker.prepare()
    return MetricsWriter(
        workdir.path,
        trackers=Trackers(made, about, bar.write) if made else None,
        num_completions=output.num_completions,
        num_steps=run.settings.num_steps,
        console=bar.write,
    )


def speed_metrics(metrics: StepMetrics, rollouts: Rollouts) -> dict[str, float]:
    """Returns tokens and seconds of a step, prompts and responses, and the peak memory so far."""
    tokens = int(rollouts.lengths_B.sum()) + sum(len(p.tokens) for p in rollouts.prompts)
    return token_speed(metrics, tokens)


def token_speed(metrics: StepMetrics, tokens: int) -> dict[str, float]:
    """Returns the speed of a step of so many tokens, and the peak memory so far."""
    seconds = metrics.result()["timing_s/step"]
    return {
        "perf/total_num_tokens": tokens,
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / seconds / jax.device_count(),
        "perf/max_memory_allocated_gb": peak_memory() / 1e9,
    }
