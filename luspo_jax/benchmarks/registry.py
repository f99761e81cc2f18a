"""The benchmarks by name: dataset, prompt, scorer, and the fields that results are split by."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from luspo_jax.benchmarks.record import BenchmarkError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """An evaluation set and how it is asked and scored.

    Attributes:
      name: its name.
      dataset: a name in luspo_jax.datasets.DATASETS.
      parts: the scorer: verifier → weight; the first one stands for accuracy.
      template: a name in luspo_jax.prompts.TEMPLATES.
      split_by: fields of an example's meta by which results are split.
      id_field: field of meta that names a problem in other people's files; empty where they
        count problems.
      generated: whether the dataset needs no file.
      options: verifier → its options.
    """

    name: str
    dataset: str
    parts: Mapping[str, float]
    template: str
    split_by: tuple[str, ...] = ()
    id_field: str = ""
    generated: bool = False
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The part that stands for accuracy."""
        return next(iter(self.parts))


def _contest(name: str) -> Benchmark:
    return Benchmark(name, name, {"dapo_math": 1.0}, "dapo")


def _boxed(name: str, **fields) -> Benchmark:
    return Benchmark(name, name, {"boxed_math": 1.0}, "boxed", **fields)


def _embedded(name: str) -> Benchmark:
    return Benchmark(name, name, {"gsm8k": 1.0}, "plain", generated=True)


BENCHMARKS = {
    entry.name: entry
    for entry in (
        _contest("aime24"),
        _contest("aime25"),
        _contest("amc23"),
        _boxed("gsm8k"),
        # Tasks of the models inside the package, to try a command out.
        _embedded("label_lookup"),
        _embedded("label_sums"),
        _boxed("math500", split_by=("subject", "level"), id_field="unique_id"),
        _boxed("minerva_math", split_by=("type",)),
        _boxed("olympiadbench", split_by=("subfield", "answer_type")),
    )
}


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
      BenchmarkError: there is none; the message has the nearest name and all of them.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise BenchmarkError(f"unknown benchmark {name!r}: {hint}known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def benchmarks(names: Iterable[str]) -> list[Benchmark]:
    """The benchmarks of several names, in their order.

    Raises:
      BenchmarkError: an unknown name, one that is given twice, or none at all.
    """
    names = list(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BenchmarkError(f"benchmarks given twice: {', '.join(twice)}")
    if not names:
        raise BenchmarkError(f"no benchmark is named; known: {', '.join(BENCHMARKS)}")
    return [benchmark(name) for name in names]
