"""From responses to a benchmark's figures: readings, verdicts, accuracies, caveats.

There are two columns. "strict" is ours. "vlmevalkit" repeats the rules in VLMEvalKit's own code
(github.com/open-compass/VLMEvalKit, commit e8e78f05), mistakes included, so that a figure can be
compared with published tables; where it asks a judge model, our extraction replaces it.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from luspo_jax.benchmarks.free_form import OneOf, Pair, equal_pairs, pair_verifier
from luspo_jax.benchmarks.record import UNUSABLE, Record
from luspo_jax.rewards import Reward, Sample, Scorer

STRICT, VLMEVALKIT = "strict", "vlmevalkit"  # the columns, and the parts of a reward


class Item(Protocol):
    """An annotated question as read by `luspo_jax.datasets`; `meta["id"]` names it."""

    problem: str
    answer: str
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A benchmark rule's reading of one response.

    Attributes:
      strict: right or wrong; a Pair or OneOf if the math verifier decides; None if the annotation
        allows no right response.
      vlmevalkit: right or wrong by VLMEvalKit's rule.
      extracted: the answer found; None if there is none.
    """

    strict: bool | Pair | OneOf | None
    vlmevalkit: bool
    extracted: str | None = None


@dataclasses.dataclass(frozen=True)
class ItemVerdict:
    """The verdict on one item.

    Attributes:
      strict: right or wrong; None if the annotation is unusable.
      vlmevalkit: the same by VLMEvalKit's rule.
      status: ok; unparsed; empty (response); unusable (annotation); timeout; error.
      extracted: the answer found.
    """

    strict: bool | None
    vlmevalkit: bool
    status: str
    extracted: str | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """One figure in both columns.

    Attributes:
      table: the figure's table, as in `accuracy by subject`.
      group: the group; `all` for the whole.
      n: number of items.
      strict: value; None if undefined.
      vlmevalkit: the same by VLMEvalKit's rule.
      unit: "share" (0 … 1) or "count".
    """

    table: str
    group: str
    n: int
    strict: float | None
    vlmevalkit: float | None
    unit: str = "share"


@dataclasses.dataclass(frozen=True)
class VisualBenchmark:
    """A named, versioned scoring rule for one evaluation set.

    Attributes:
      id: name of the rule.
      version: changes whenever any verdict or figure can change.
      read: (item, response) → Reading.
      lines: (items, verdicts) → figures.
      question: item → the question put to a model, options included.
      note: meaning of the vlmevalkit column for this set.
      unit: field of meta that names the problem an item is a part or variant of; empty if items
        stand alone.
      whole: whether figures need all parts of a problem.
      caveats: items → caveats on the figures of these items, in sentences.
    """

    id: str
    version: str
    read: Callable[[Item, str], Reading]
    lines: Callable[[Sequence[Item], Sequence[ItemVerdict]], list[Line]]
    question: Callable[[Item], str]
    note: str
    unit: str = ""
    whole: bool = False
    caveats: Callable[[Sequence[Item]], list[str]] = lambda items: []

    @property
    def label(self) -> str:
        """The scorer with its version, as results carry it."""
        return f"{self.id}@{self.version}"


def score(
    benchmark: VisualBenchmark,
    items: Sequence[Item],
    responses: Sequence[str],
    *,
    verifier: Scorer | None = None,
) -> list[ItemVerdict]:
    """Returns the verdict on the response to each item.

    An empty response is wrong in the strict column and has its own status.

    Args:
      benchmark: the rule.
      items: the annotations.
      responses: one per item.
      verifier: `free_form.pair_verifier()`; if None, one is started and ended.

    Raises:
      BenchmarkError: an annotation that the rule cannot read.
      TooManyFailures: raised by the math verifier.
    """
    readings = [benchmark.read(*pair) for pair in zip(items, responses, strict=True)]
    pairs = [pair for reading in readings for pair in _pairs(reading.strict)]
    settled = dict(zip(pairs, equal_pairs(pairs, verifier=verifier), strict=True))
    return [
        _verdict(reading, settled, response)
        for reading, response in zip(readings, responses, strict=True)
    ]


def _pairs(strict) -> list[Pair]:
    if isinstance(strict, OneOf):
        return strict.pairs()
    return [strict] if isinstance(strict, Pair) else []


def _one_of(choice: OneOf, settled: Mapping) -> tuple[bool, str, str | None]:
    """Returns (right, status, letter) of an answer that may have the value of one option."""
    judged = [settled[pair] for pair in choice.pairs()]
    failed = [verdict.status for verdict in judged if verdict.status in ("timeout", "error")]
    equal = [c for (c, _), v in zip(choice.options, judged, strict=True) if v.value > 0]
    if failed or len(equal) != 1:
        return False, failed[0] if failed else "unparsed", None
    return equal[0] in choice.right, "ok", equal[0]


def _verdict(reading: Reading, settled: Mapping, response: str) -> ItemVerdict:
    strict, extracted = reading.strict, reading.extracted
    status = "ok" if extracted is not None else "unparsed"
    if isinstance(strict, Pair):
        judged = settled[strict]
        strict, status = judged.value > 0, judged.status
    elif isinstance(strict, OneOf):
        strict, status, extracted = _one_of(strict, settled)
    if not response.strip():
        status = "empty"
    if reading.strict is None:
        status = UNUSABLE
    elif status in ("empty", "unparsed"):
        strict = False
    return ItemVerdict(strict, reading.vlmevalkit, status, extracted)


class RuleScorer:
    """Scores batches of samples by a benchmark's rule; `rewards.Scorer` uses verifiers instead.

    The parts of a reward are the two columns, and its value is the strict one. Its status is one
    of `ItemVerdict`'s.

    Args:
      benchmark: the rule.
      workers: processes of the math verifier; by default one per core.
      time_limit: seconds of processor time per comparison of answers.

    Attributes:
      labels: the rule's name → `id@version`.
    """

    def __init__(
        self, benchmark: VisualBenchmark, *, workers: int | None = None, time_limit: float = 20.0
    ):
        self._benchmark = benchmark
        self._verifier = pair_verifier(workers=workers, time_limit=time_limit)
        self.labels = {benchmark.id: benchmark.label}

    def score_batch(self, samples: Sequence[Sample]) -> list[Reward]:
        """Returns the reward of each sample, in order; errors as for `score`."""
        responses = [sample.response for sample in samples]
        verdicts = score(self._benchmark, samples, responses, verifier=self._verifier)
        return [_reward(verdict) for verdict in verdicts]

    def close(self) -> None:
        """Ends the worker processes; the next batch starts new ones."""
        self._verifier.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _reward(verdict: ItemVerdict) -> Reward:
    strict = float(bool(verdict.strict))
    parts = {STRICT: strict, VLMEVALKIT: float(verdict.vlmevalkit)}
    return Reward(strict, verdict.status, parts, verdict.extracted)


def figures(benchmark: VisualBenchmark, records: Sequence[Record]) -> list[Line]:
    """Computes the benchmark's figures from responses that its `RuleScorer` judged.

    With n responses per problem, each figure is computed on the first responses, on the second ones
    … and then averaged.

    Raises:
      BenchmarkError: records that do not add up to figures.
    """
    by_sample: dict[int, list[Record]] = collections.defaultdict(list)
    for record in sorted(records, key=lambda record: record.problem_id):
        by_sample[record.sample_id].append(record)
    passes = [
        benchmark.lines(found, [_of_record(record) for record in found])
        for found in by_sample.values()
    ]
    return [_mean_line(lines) for lines in zip(*passes, strict=True)]


def _of_record(record: Record) -> ItemVerdict:
    verdict = record.verdict
    unusable = verdict.status == UNUSABLE
    return ItemVerdict(
        strict=None if unusable else verdict.parts[STRICT] > 0.5,
        vlmevalkit=verdict.parts[VLMEVALKIT] > 0.5,
        status=verdict.status,
        extracted=verdict.prediction,
    )


def _mean_line(lines: Sequence[Line]) -> Line:
    strict, kit = ([getattr(line, column) for line in lines] for column in (STRICT, VLMEVALKIT))
    return dataclasses.replace(lines[0], strict=_mean(strict), vlmevalkit=_mean(kit))


def _mean(values: Sequence[float | None]) -> float | None:
    """Averages the defined values."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def accuracy(
    table: str,
    items: Sequence[Item],
    verdicts: Sequence[ItemVerdict],
    groups: Callable[[Item], Iterable[str]] = lambda item: ("all",),
) -> list[Line]:
    """Computes the accuracy of each group, in alphabetical order; an item may be in several.

    Items with an unusable annotation count in the vlmevalkit column only.
    """
    members = collections.defaultdict(list)
    for item, verdict in zip(items, verdicts, strict=True):
        for group in groups(item):
            members[group].append(verdict)
    return [
        Line(
            table,
            group,
            len(found),
            share([v.strict for v in found if v.strict is not None]),
            share([v.vlmevalkit for v in found]),
        )
        for group, found in sorted(members.items())
    ]


def share(rights: Sequence[bool]) -> float | None:
    """Returns the share of true values; None if there are none."""
    return sum(rights) / len(rights) if rights else None
