"""What figures read of a run: series of a metric, and lengths of the stored responses."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from luspo_jax.metrics import read_metrics

ACCURACY, LENGTH = "val-core/*", "val-aux/*/response_length/mean"
_DUMP = re.compile(r"step_(\d+)\.jsonl")


@dataclasses.dataclass(frozen=True)
class Responses:
    """Stored responses of one step.

    Attributes:
      step: number of the rollout step.
      lengths_B: tokens.
      rewards_B: of each.
      truncated: share that was cut at the limit.
    """

    step: int
    lengths_B: np.ndarray
    rewards_B: np.ndarray
    truncated: float


def run_rows(workdir: pathlib.Path) -> list[dict]:
    """Reads the metrics of a run.

    Raises:
      FileNotFoundError: the folder holds no run.
    """
    source = pathlib.Path(workdir) / "metrics.jsonl"
    if not source.is_file() or not (source.parent / "run.json").exists():
        raise FileNotFoundError(f"no metrics at {source}: is {workdir} the --workdir of a run?")
    return list(read_metrics(source))


def configuration(workdir: pathlib.Path) -> dict:
    """Returns the resolved configuration of a run, by field."""
    return json.loads((workdir / "run.json").read_text(encoding="utf-8")).get("config", {})


def series(rows: Sequence[dict], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps, finite values) of a metric, or of the first that matches a pattern with *."""
    head, star, tail = metric.partition("*")
    if star:  # one name for all rows: a row without it must not add another metric
        fitting = (k for row in rows for k in row if k.startswith(head) and k.endswith(tail))
        metric = next(fitting, metric)
    found = [(row["step"], row[metric]) for row in rows if metric in row]
    kept = [(step, value) for step, value in found if np.isfinite(value)]
    return tuple(np.array(x, np.float64) for x in zip(*kept, strict=True)) if kept else (
        np.zeros(0), np.zeros(0)
    )  # fmt: skip


def responses(workdir: pathlib.Path) -> list[Responses]:
    """Reads the stored responses of a run's steps, oldest first.

    Raises:
      FileNotFoundError: none are stored.
    """
    files = sorted((workdir / "rollouts").glob("step_*.jsonl"))
    found = []
    for path in files:
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        if rows:
            found.append(
                Responses(
                    int(_DUMP.fullmatch(path.name)[1]),
                    np.array([row["length"] for row in rows]),
                    np.array([row["reward"] for row in rows]),
                    float(np.mean([row["truncated"] for row in rows])),
                )
            )
    if not found:
        folder = workdir / "rollouts"
        raise FileNotFoundError(f"no responses in {folder}: output.dump_every says how often")
    return found
