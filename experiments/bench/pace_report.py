"""Turns of the benchmark of partial rollouts, and the table of what they took."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.bench import pace_sides, pace_work
from experiments.bench.pace_work import Law, Sizes
from experiments.sweeps.report import estimate, markdown_table

COLUMNS = ("busy", "used", "decode steps", "× synchronous", "age", "oldest", "read again",
           "given up", "length", "account")  # fmt: skip
MEASURED = ("seconds", "seconds × synchronous")  # of an engine

Numbers = dict[str, list[dict[str, float]]]  # pace → name → value, a repetition each


def measure(law: Law, sizes: Sizes, *, seeds: Iterable[int], model: Any = None) -> Numbers:
    """Plays every pace once with each seed.

    Args:
      law: of lengths.
      sizes: of steps.
      seeds: of prompts and noise.
      model: (config, params) that an engine samples from; None counts slots alone.
    """
    found: Numbers = {}
    config, params = model or (None, None)
    engine = pace_sides.engine_of(law, sizes, config) if model else None
    for seed in seeds:
        sampler = engine or pace_sides.Slots(
            pace_sides.drawn(law, sizes.group, seed), sizes, longest=law.longest
        )
        for pace, numbers in _repetition(law, sizes, seed, sampler, params).items():
            found.setdefault(pace, []).append(numbers)
    return found


def _repetition(law, sizes, seed, sampler, params):
    """Returns the numbers of every pace; they take turns, so that one's step is beside another's
    on a machine that others use."""
    paces = pace_work.paces(sizes.prompts)
    plays = [pace_work.play(sampler, law, sizes, p, seed=seed, params=params) for p in paces]
    turns = list(zip(*plays, strict=True))[sizes.warmup :]
    found = {
        str(pace): pace_work.summary(steps, sizes.slots)
        for pace, steps in zip(paces, zip(*turns, strict=True), strict=True)
    }
    base = found[str(paces[0])]
    for numbers in found.values():
        seconds = base["seconds"]
        numbers["× synchronous"] = numbers["decode steps"] / base["decode steps"]
        numbers["seconds × synchronous"] = numbers["seconds"] / seconds if seconds else math.nan
    return found


def table(found: Mapping[str, Sequence[Mapping[str, float]]], columns: Sequence[str]) -> str:
    """Formats means over repetitions, with 95 % intervals where there are several."""
    rows = [
        [pace, *(str(estimate([numbers[name] for numbers in own])) for name in columns)]
        for pace, own in found.items()
    ]
    return markdown_table(["pace", *columns], rows)


def record(law: Law, sizes: Sizes, found: Numbers) -> dict[str, Any]:
    """Returns a table's numbers as JSON values; NaN, which JSON lacks, is None."""
    return {
        "law": dataclasses.asdict(law),
        "mean_length": law.mean,
        "sizes": dataclasses.asdict(sizes),
        "paces": {
            pace: [
                {name: value if math.isfinite(value) else None for name, value in numbers.items()}
                for numbers in own
            ]
            for pace, own in found.items()
        },
    }
