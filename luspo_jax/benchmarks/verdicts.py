"""From responses to a benchmark's figures: readings, verdicts, accuracies, what is missing.

Two columns stand side by side. "strict" is ours. "vlmevalkit" repeats what VLMEvalKit's own code
(github.com/open-compass/VLMEvalKit, commit e8e78f05) does by rule, mistakes kept, so that a figure
can be laid beside published tables; where it asks a judge model, our extraction stands in for it.
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
    """An annotated question, as `luspo_jax.datasets` reads it; `meta["id"]` names it."""

    problem: str
    answer: str
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a benchmark's rule makes of one response.

    Attributes:
      strict: right or wrong; a Pair, or OneOf, where the math verifier decides; None where the
        annotation is such that no response can be right.
      vlmevalkit: right or wrong by VLMEvalKit's rule.
      extracted: the answer found; None where there is none.
    """

    strict: bool | Pair | OneOf | None
    vlmevalkit: bool
    extracted: str | None = None


@dataclasses.dataclass(frozen=True)
class ItemVerdict:
    """The verdict on one item.

    Attributes:
      strict: right or wrong; None where the annotation is unusable.
      vlmevalkit: likewise by VLMEvalKit's rule.
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
      table: what it is a figure of, as in `accuracy by subject`.
      group: the group; `all` for the whole.
      n: items behind it.
      strict: value; None where it is undefined.
      vlmevalkit: likewise.
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
      question: item → what a model is asked, its options included.
      note: what the vlmevalkit column is for this set.
      unit: field of meta that names the problem of which an item is a part or a variant; empty
        where items stand alone.
      whole: whether figures need all parts of a problem.
      caveats: items → what must be known of the figures of these items, in sentences.
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
        return f"{self.id}@{self.version}"


def score(
    benchmark: VisualBenchmark,
    items: Sequence[Item],
    responses: Sequence[str],
    *,
    verifier: Scorer | None = None,
) -> list[ItemVerdict]:
    """The verdict on the response to each item.

    An empty response is wrong in the strict column, and has a status of its own.

    Args:
      benchmark: the rule.
      items: the annotations.
      responses: one to each.
      verifier: `free_form.pair_verifier()`; where there is none, one is started and ended.

    Raises:
      BenchmarkError: an annotation that the rule cannot read.
      TooManyFailures: of the math verifier.
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
    """(right, status, letter) of an answer that may have the value of one option."""
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
    """Scores batches of samples by a benchmark's rule, where `rewards.Scorer` takes verifiers.

    The parts of a reward are the two columns, and its value is the strict one. Its status is one
    of `ItemVerdict`'s.

    Args:
      benchmark: the rule.
      workers: processes of the math verifier; by default one a core.
      time_limit: seconds of processor time that one comparison of answers may take.

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
        """The reward of each sample, in order; errors are those of `score`."""
        responses = [sample.response for sample in samples]
        verdicts = score(self._benchmark, samples, responses, verifier=self._verifier)
        return [_reward(verdict) for verdict in verdicts]

    def close(self) -> None:
        """End the worker processes; the next batch would start new ones."""
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
    """The benchmark's figures of responses that its `RuleScorer` judged.

    Of n responses a problem, each figure is that of the first ones, of the second ones … and then
    the mean of the n.

    Raises:
      BenchmarkError: records that make up no figures.
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
    """Of those that are defined."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def accuracy(
    table: str,
    items: Sequence[Item],
    verdicts: Sequence[ItemVerdict],
    groups: Callable[[Item], Iterable[str]] = lambda item: ("all",),
) -> list[Line]:
    """Accuracy of each group, in alphabetical order; an item may be in several.

    Items whose annotation is unusable count in the vlmevalkit column only.
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
    """The share of true values; None of none."""
    return sum(rights) / len(rights) if rights else None
