"""Budget curves of an evaluation: its stored responses cut, judged again and drawn.

The curves lie beside the generations, so that a later command reports them without judging again.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.evaluation import storage
from luspo_jax.benchmarks import Record
from luspo_jax.benchmarks.budgets import Curve, Judged, curve, right_under
from luspo_jax.benchmarks.registry import Judge
from luspo_jax.benchmarks.statistics import by_problem, usable
from luspo_jax.hosts import figure_style, files
from luspo_jax.rewards import Sample
from luspo_jax.rewards.answers.extraction import with_opening

CURVES, FIGURE = "budgets.json", "budgets.png"


def under(
    records: Sequence[Record],
    sizes: Sequence[int],
    judge: Judge,
    decode: Callable[[Sequence[int]], str],
    metric: str,
) -> Curve:
    """Returns the accuracies of a benchmark's records cut at each size, in tokens.

    As elsewhere in an evaluation, a response without a verdict counts as not right.
    """
    groups = by_problem(usable(records))
    known = [Judged(r.prompt, r.tokens, sample(r), r.verdict) for g in groups.values() for r in g]
    right_BK, count = right_under(known, sizes, judge, decode, metric)
    right_PSK = np.nan_to_num(right_BK).reshape(len(groups), -1, len(sizes))
    return curve(right_PSK, sizes, count)


def sample(record: Record) -> Sample:
    """Returns what was judged of a stored response."""
    return Sample(
        with_opening(record.prompt, record.response),
        record.answer,
        record.length,
        None,
        record.meta,
        record.problem,
    )


def keep(folder: pathlib.Path, curves: Mapping[str, Curve]) -> None:
    """Stores curves by benchmark beside those of earlier commands, and draws all."""
    kept = read(folder) | dict(curves)
    files.write_json(folder / CURVES, {name: dataclasses.asdict(c) for name, c in kept.items()})
    _draw(folder / FIGURE, kept)


def read(folder: pathlib.Path) -> dict[str, Curve]:
    """Returns the stored curves by benchmark."""
    path = folder / CURVES
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {name: Curve.from_json(values) for name, values in stored.items()}


def forget(folder: pathlib.Path) -> bool:
    """Removes the curves, which other verdicts would belie; returns whether there were any."""
    found = (folder / CURVES).exists()
    for name in (CURVES, FIGURE):
        (folder / name).unlink(missing_ok=True)
    return found


def measure(
    folder: pathlib.Path,
    name: str,
    entry: Mapping[str, Any],
    sizes: Sequence[int],
    judge: Judge,
    decode: Callable[[Sequence[int]], str],
) -> Curve:
    """Returns the curve of a benchmark whose generations are complete.

    Args:
      folder: of the evaluation.
      name: of the benchmark.
      entry: its entry in the manifest.
      sizes: budgets in tokens, ascending.
      judge: its scorer.
      decode: tokens → text, of the evaluated model.
    """
    records = storage.read_benchmark(folder, name, entry)
    return under(records, sizes, judge, decode, entry["metric"])


def _draw(path: pathlib.Path, curves: Mapping[str, Curve]) -> None:
    """Draws accuracy over log2 of the budget with its 95 % intervals."""
    plt = figure_style.pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for index, (name, found) in enumerate(curves.items()):
        share = 100 * np.asarray(found.accuracy)
        low, high = 100 * np.asarray(found.ci95).T
        label = f"{name} (area {100 * found.area:.1f} %)"
        look, marker = figure_style.style(index), figure_style.MARKERS[index % 7]
        axis.plot(found.budgets, share, marker=marker, ms=4, label=label, **look)
        axis.fill_between(found.budgets, low, high, color=look["color"], alpha=0.14, lw=0)
    axis.set_xscale("log", base=2)
    ticks = _ticks(budget for found in curves.values() for budget in found.budgets)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="budget in tokens", ylabel="accuracy of responses cut there, %")
    axis.set_ylim(0, max(5.0, min(100.0, 1.05 * axis.get_ylim()[1])))
    axis.legend()
    figure_style.save(figure, path)


def _ticks(values: Iterable[int]) -> list[int]:
    """Returns the budgets, without those too near to a larger one for both labels to be read."""
    ticks = []
    for value in sorted(set(values), reverse=True):
        if not ticks or value <= ticks[-1] / 1.5:
            ticks.append(value)
    return ticks
