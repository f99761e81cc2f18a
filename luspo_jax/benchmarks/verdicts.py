"""From responses to a benchmark's figures: readings, verdicts, accuracies, what is missing.

Two columns stand side by side. "strict" is ours. "vlmevalkit" repeats what VLMEvalKit's own code
(github.com/open-compass/VLMEvalKit, commit e8e78f05) does by rule, mistakes kept, so that a figure
can be laid beside published tables; where it asks a judge model, our extraction stands in for it.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from luspo_jax.benchmarks.free_form import Pair, equal_pairs
from luspo_jax.benchmarks.record import BenchmarkError


class Item(Protocol):
    """An annotated question, as `luspo_jax.datasets` reads it; `meta["id"]` names it."""

    problem: str
    answer: str
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a benchmark's rule makes of one response.

    Attributes:
      strict: right or wrong; a Pair where the math verifier decides; None where the annotation is
        such that no response can be right.
      vlmevalkit: right or wrong by VLMEvalKit's rule.
      extracted: the answer found; None where there is none.
    """

    strict: bool | Pair | None
    vlmevalkit: bool
    extracted: str | None = None


@dataclasses.dataclass(frozen=True)
class ItemVerdict:
    """The verdict on one item.

    Attributes:
      strict: right or wrong; None where the annotation is unusable.
      vlmevalkit: likewise by VLMEvalKit's rule.
      status: ok; unparsed; empty or missing prediction; unusable annotation; timeout; error.
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
      note: what the vlmevalkit column is for this set.
    """

    id: str
    version: str
    read: Callable[[Item, str], Reading]
    lines: Callable[[Sequence[Item], Sequence[ItemVerdict]], list[Line]]
    note: str

    @property
    def label(self) -> str:
        return f"{self.id}@{self.version}"


@dataclasses.dataclass(frozen=True)
class Scores:
    """All that scoring found.

    Attributes:
      scorer: `id@version`.
      note: what the vlmevalkit column is.
      lines: the figures.
      verdicts: id → verdict, in the order of the annotations.
      unknown: ids of predictions that no annotation has; they are left out.
    """

    scorer: str
    note: str
    lines: list[Line]
    verdicts: dict[str, ItemVerdict]
    unknown: list[str]

    def with_status(self, status: str) -> list[str]:
        """Ids of the items whose verdict has the status."""
        return [name for name, verdict in self.verdicts.items() if verdict.status == status]


def score(
    benchmark: VisualBenchmark,
    items: Sequence[Item],
    predictions: Mapping[str, str],
    *,
    workers: int | None = None,
) -> Scores:
    """Scores predictions against annotations.

    A missing or empty prediction counts as wrong in the strict column, and has a status of its own.

    Args:
      benchmark: the rule.
      items: the annotations, with distinct `meta["id"]`.
      predictions: id → response.
      workers: processes of the math verifier; by default one a core.

    Raises:
      BenchmarkError: no annotations, no predictions, none that belongs to an annotation, or two
        annotations with one id.
    """
    ids = [str(item.meta["id"]) for item in items]
    _check(benchmark, ids, predictions)
    responses = [predictions.get(name) or "" for name in ids]
    readings = [benchmark.read(*pair) for pair in zip(items, responses, strict=True)]
    pairs = [reading.strict for reading in readings if isinstance(reading.strict, Pair)]
    settled = dict(zip(pairs, equal_pairs(pairs, workers=workers), strict=True))
    verdicts = [
        _verdict(reading, settled, predictions.get(name))
        for name, reading in zip(ids, readings, strict=True)
    ]
    known = set(ids)
    return Scores(
        scorer=benchmark.label,
        note=benchmark.note,
        lines=benchmark.lines(items, verdicts),
        verdicts=dict(zip(ids, verdicts, strict=True)),
        unknown=[name for name in predictions if name not in known],
    )


def _check(benchmark: VisualBenchmark, ids: Sequence[str], predictions: Mapping[str, str]) -> None:
    if not ids:
        raise BenchmarkError(f"{benchmark.id}: there are no annotations")
    if not predictions:
        raise BenchmarkError(f"{benchmark.id}: there are no predictions")
    twice = [name for name, count in collections.Counter(ids).items() if count > 1]
    if twice:
        raise BenchmarkError(f"{benchmark.id}: two annotations have the id {twice[0]!r}")
    if not set(ids) & set(predictions):
        raise BenchmarkError(
            f"{benchmark.id}: no prediction has the id of an annotation; predictions have "
            f"{_some(predictions)}, annotations {_some(ids)}"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


def _verdict(reading: Reading, settled: Mapping, prediction: str | None) -> ItemVerdict:
    strict, status = reading.strict, "ok" if reading.extracted is not None else "unparsed"
    if isinstance(strict, Pair):
        judged = settled[strict]
        strict, status = judged.value > 0, judged.status
    vlmevalkit = reading.vlmevalkit
    if prediction is None:
        status, vlmevalkit = "missing", False
    elif not prediction.strip():
        status = "empty"
    if reading.strict is None:
        status = "unusable"
    elif status in ("missing", "empty", "unparsed"):
        strict = False
    return ItemVerdict(strict, vlmevalkit, status, reading.extracted)


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
