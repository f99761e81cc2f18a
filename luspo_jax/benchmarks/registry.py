"""Benchmarks by name: dataset, prompt, scorer, and the fields by which results are split."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from luspo_jax.benchmarks.record import BenchmarkError, Record
from luspo_jax.benchmarks.verdicts import STRICT, Item, Line, RuleScorer, VisualBenchmark, figures
from luspo_jax.benchmarks.visual import VISUAL
from luspo_jax.hosts.values import nearest
from luspo_jax.rewards import Reward, Sample, Scorer


class Judge(Protocol):
    """Gives verdicts: `rewards.Scorer` or `verdicts.RuleScorer`; a context manager."""

    labels: Mapping[str, str]

    def score_batch(self, samples: Sequence[Sample]) -> list[Reward]:
        """Returns the verdict on each sample, in their order."""

    def __enter__(self) -> "Judge": ...

    def __exit__(self, *_) -> None: ...


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """An evaluation set, its prompt and its scorer.

    Attributes:
      name: its name.
      dataset: a name in luspo_jax.datasets.DATASETS.
      parts: the scorer: verifier → weight; the first one stands for accuracy.
      template: a name in luspo_jax.prompts.templates.TEMPLATES.
      system_prompt: a name in luspo_jax.prompts.templates.SYSTEM_PROMPTS.
      split_by: fields of an example's meta by which results are split.
      id_field: field of meta that names a problem in files from elsewhere; empty if they number
        problems.
      generated: whether the dataset needs no file.
      options: verifier → its options.
      dataset_options: of a generated dataset.
      images: whether problems show images.
      rule: judges responses and computes figures, in place of parts and `split_by`.
    """

    name: str
    dataset: str
    parts: Mapping[str, float]
    template: str
    system_prompt: str = ""
    split_by: tuple[str, ...] = ()
    id_field: str = ""
    generated: bool = False
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    dataset_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images: bool = False
    rule: VisualBenchmark | None = None

    @property
    def metric(self) -> str:
        """Returns the part of a verdict that defines accuracy."""
        return STRICT if self.rule else next(iter(self.parts))

    def question(self, item: Item) -> str:
        """Returns the question put to a model, before any template."""
        return self.rule.question(item) if self.rule else item.problem

    def judge(self, *, workers: int | None = None, time_limit: float) -> Judge:
        """Returns the scorer of responses; arguments as for `rewards.Scorer`."""
        if self.rule:
            return RuleScorer(self.rule, workers=workers, time_limit=time_limit)
        return Scorer(self.parts, options=self.options, workers=workers, time_limit=time_limit)

    def check(self, items: Iterable[Item]) -> None:
        """Reads every annotation the way its scorer will.

        Raises:
          BenchmarkError: an annotation that cannot be read, named in the message.
        """
        for item in items if self.rule else ():
            self.rule.read(item, "")

    def figures(self, records: Sequence[Record]) -> list[Line]:
        """Returns the benchmark's own figures; empty if it has none besides accuracy."""
        return figures(self.rule, records) if self.rule else []


def _contest(name: str) -> Benchmark:
    return Benchmark(name, name, {"dapo_math": 1.0}, "dapo")


def _boxed(name: str, dataset: str = "", **fields) -> Benchmark:
    return Benchmark(name, dataset or name, {"boxed_math": 1.0}, "boxed", **fields)


def _embedded(name: str) -> Benchmark:
    return Benchmark(name, name, {"gsm8k": 1.0}, "plain", generated=True)


def _visual(name: str) -> Benchmark:
    """Returns a benchmark asked and answered in the format of arXiv:2602.05261, figure 3."""
    return Benchmark(
        name, name, {}, "chat", "luspo_vl", id_field="id", images=True, rule=VISUAL[name]
    )


# Equal to ANSWER_PATTERN of `luspo_jax.datasets.shapes`; benchmarks do not import datasets.
_SHAPES = {"exact": {"pattern": r"####\s*(\S)"}}

BENCHMARKS = {
    entry.name: entry
    for entry in (
        _contest("aime24"),
        _contest("aime25"),
        _contest("amc23"),
        # The same problems for models that box their answers, as DeepSeek-R1's.
        _boxed("aime24_boxed", "aime24"),
        _boxed("aime25_boxed", "aime25"),
        _boxed("amc23_boxed", "amc23"),
        _boxed("gsm8k"),
        # Tasks for the models inside the package, to try a command out.
        _embedded("label_lookup"),
        _embedded("label_sums"),
        _boxed("math500", split_by=("subject", "level"), id_field="unique_id"),
        _boxed("minerva_math", split_by=("type",)),
        _boxed("olympiadbench", split_by=("subfield", "answer_type")),
        # Any of its tasks: --options names it.
        Benchmark(
            *("reasoning_gym", "reasoning_gym", {"reasoning_gym_solved": 1.0}, "answer_tag"),
            split_by=("task",),
            generated=True,
            dataset_options={"size": 500},
        ),
        Benchmark(
            *("shapes", "shapes", {"exact": 1.0}, "plain"),
            split_by=("kind",),
            generated=True,
            options=_SHAPES,
            images=True,
        ),
        *map(_visual, sorted(VISUAL)),
    )
}


def benchmark(name: str) -> Benchmark:
    """Returns the benchmark with a name.

    Raises:
      BenchmarkError: unknown; the message lists the nearest name and all of them.
    """
    if name not in BENCHMARKS:
        raise BenchmarkError(f"unknown benchmark {name!r}: {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def benchmarks(names: Iterable[str]) -> list[Benchmark]:
    """Returns the benchmarks with these names, in order.

    Raises:
      BenchmarkError: an unknown name, a repeated one, or none at all.
    """
    names = list(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BenchmarkError(f"benchmarks given twice: {', '.join(twice)}")
    if not names:
        raise BenchmarkError(f"no benchmark is named; known: {', '.join(BENCHMARKS)}")
    return [benchmark(name) for name in names]
