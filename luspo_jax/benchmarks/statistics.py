"""Statistics of an evaluation's records: avg@n, pass@k, maj@k, lengths, subsets."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax.benchmarks.budgets import tokens_per_right
from luspo_jax.benchmarks.intervals import accuracy_interval, paired_interval
from luspo_jax.benchmarks.record import UNUSABLE, BenchmarkError, Record
from luspo_jax.benchmarks.voting import Mode, majority_at_k, mode

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SHORTEST_BIN = 64  # tokens


@dataclasses.dataclass(frozen=True)
class Summary:
    """Results of a model on a benchmark.

    Responses without a verdict (statuses timeout and error) count as not right; `statuses` counts
    them. Problems with an unusable annotation count in `statuses` only.

    Attributes:
      num_problems, num_samples: number of problems, and of responses to each.
      accuracy: avg@n, the mean over problems of the share of right responses.
      accuracy_ci95: (low, high), `intervals.accuracy_interval`.
      pass_at: k → pass@k, unbiased.
      majority_at: k → maj@k.
      statuses: status → number of verdicts.
      truncated: share of responses truncated at the limit; None if unknown.
      completed: the same as `accuracy` of responses that are right and ended by themselves; None if
        it is not known of all how they ended.
      completed_ci95: its interval.
      tokens_per_right: tokens of all responses over the number of right ones; None if a length is
        unknown or none is right.
      lengths: mean, quantiles, mean of right and of wrong responses, in tokens; empty if unknown.
      by_length: bin of tokens → accuracy and number of responses in it.
      modes: bin of tokens → means over the problems with responses in it: of their accuracy, of
        `voting.Mode`'s fields, and the number of problems; empty if no response has an answer.
      by_field: field → value → accuracy, interval, number of problems.
    """

    num_problems: int
    num_samples: int
    accuracy: float
    accuracy_ci95: tuple[float, float]
    pass_at: dict[int, float]
    majority_at: dict[int, float]
    statuses: dict[str, int]
    truncated: float | None
    completed: float | None
    completed_ci95: tuple[float, float] | None
    tokens_per_right: float | None
    lengths: dict[str, float | None]
    by_length: dict[str, dict[str, float]]
    modes: dict[str, dict[str, float | None]]
    by_field: dict[str, dict[str, dict[str, Any]]]


def summary(records: Sequence[Record], *, metric: str, split_by: Iterable[str] = ()) -> Summary:
    """Computes the statistics of a benchmark's records.

    Args:
      records: the same number for each problem, in any order.
      metric: the part of the verdict that defines accuracy.
      split_by: fields of meta to split by.

    Raises:
      BenchmarkError: no records, or different numbers per problem.
    """
    every, records = records, usable(records)
    problems = by_problem(records)
    right = right_counts(problems, metric)
    size = len(next(iter(problems.values())))
    ks = powers(size)
    votes = [
        majority_at_k([r.verdict.prediction for r in group], [r.right(metric) for r in group], ks)
        for group in problems.values()
    ]
    passes = [[pass_at_k(size, count, k) for k in ks] for count in right]
    cut = [r.truncated for r in records if r.truncated is not None]
    return Summary(
        num_problems=len(problems),
        num_samples=size,
        accuracy=float(np.mean(right) / size),
        accuracy_ci95=accuracy_interval(right, [size] * len(right)),
        pass_at=dict(zip(ks, np.mean(passes, axis=0).tolist(), strict=True)),
        majority_at=dict(zip(ks, np.mean(votes, axis=0).tolist(), strict=True)),
        statuses=dict(sorted(collections.Counter(r.verdict.status for r in every).items())),
        truncated=float(np.mean(cut)) if cut else None,
        **_completed(problems, metric),
        tokens_per_right=_tokens_per_right(records, metric),
        lengths=_lengths(records, metric),
        by_length=_by_length(records, metric),
        modes=_modes(problems, metric),
        by_field={field: _by_field(problems, right, field) for field in split_by},
    )


def usable(records: Sequence[Record]) -> list[Record]:
    """Drops the records of problems whose annotation allows no right response."""
    return [record for record in records if record.verdict.status != UNUSABLE]


def by_problem(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Maps each problem to its records by sample, in the order of the problems' ids.

    Raises:
      BenchmarkError: no records, a response that occurs twice, or unequal numbers.
    """
    groups: dict[int, list[Record]] = collections.defaultdict(list)
    for record in records:
        groups[record.problem_id].append(record)
    if not groups:
        raise BenchmarkError("there are no responses to summarise")
    for problem_id, group in groups.items():
        group.sort(key=lambda record: record.sample_id)
        if len({record.sample_id for record in group}) < len(group):
            raise BenchmarkError(f"problem {problem_id} has the same sample twice")
    sizes = collections.Counter(len(group) for group in groups.values())
    if len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        odd = [f"{i} has {len(group)}" for i, group in groups.items() if len(group) != usual]
        raise BenchmarkError(
            f"problems need equally many responses: most have {usual}, but problem "
            + ", ".join(odd[:10])
        )
    return dict(sorted(groups.items()))


def right_counts(problems: Mapping[int, Sequence[Record]], metric: str) -> list[int]:
    """Counts the right responses to each problem."""
    return [sum(r.right(metric) for r in group) for group in problems.values()]


def pass_at_k(n: int, right: int, k: int) -> float:
    """Returns pass@k = 1 − C(n − c, k) / C(n, k), unbiased for k ≤ n.

    It is the probability that k of the n responses, drawn without replacement, include a right one
    (arXiv:2107.03374, equation 1).
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(f"need 1 ≤ k ≤ n and 0 ≤ right ≤ n, not k={k}, n={n}, right={right}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def powers(n: int) -> list[int]:
    """Returns 1, 2, 4 … up to n, and n itself."""
    return sorted({*(1 << i for i in range(n.bit_length())), n})


@dataclasses.dataclass(frozen=True)
class Difference:
    """Accuracy of one evaluation minus another's, problem by problem.

    Attributes:
      difference: difference of the accuracies.
      ci95: (low, high), `intervals.paired_interval`.
      better, worse, equal: number of problems.
    """

    difference: float
    ci95: tuple[float, float]
    better: int
    worse: int
    equal: int


def difference(ours: Sequence[Record], theirs: Sequence[Record], *, metric: str) -> Difference:
    """Returns ours minus theirs; the numbers of responses may differ, the problems may not.

    Raises:
      BenchmarkError: the problems differ.
    """
    sides = [by_problem(usable(ours)), by_problem(usable(theirs))]
    if sides[0].keys() != sides[1].keys():
        alone = sorted(sides[0].keys() ^ sides[1].keys())
        raise BenchmarkError(f"not the same problems; only one side has {alone[:10]}")
    counts = [
        (right_counts(side, metric), [len(group) for group in side.values()]) for side in sides
    ]
    shares = [np.divide(right, total) for right, total in counts]
    gaps = shares[0] - shares[1]
    signs = np.sign(np.where(np.abs(gaps) < 1e-12, 0.0, gaps))
    return Difference(
        difference=float(gaps.mean()),
        ci95=paired_interval(*counts),
        better=int((signs > 0).sum()),
        worse=int((signs < 0).sum()),
        equal=int((signs == 0).sum()),
    )


def _lengths(records: Sequence[Record], metric: str) -> dict[str, float | None]:
    known = [r for r in records if r.length is not None]
    if not known:
        return {}
    lengths = np.array([r.length for r in known], np.float64)
    right = np.array([r.right(metric) for r in known])

    def mean(rows: np.ndarray) -> float | None:
        return float(lengths[rows].mean()) if rows.any() else None

    spots = {f"q{q * 100:02.0f}": float(np.quantile(lengths, q)) for q in QUANTILES}
    return {"mean": float(lengths.mean()), **spots, "right": mean(right), "wrong": mean(~right)}


def _completed(problems: Mapping[int, Sequence[Record]], metric: str) -> dict[str, Any]:
    groups = list(problems.values())
    if any(record.truncated is None for group in groups for record in group):
        return {"completed": None, "completed_ci95": None}
    whole = [sum(r.right(metric) and not r.truncated for r in group) for group in groups]
    totals = [len(group) for group in groups]
    return {
        "completed": float(np.mean(np.divide(whole, totals))),
        "completed_ci95": accuracy_interval(whole, totals),
    }


def _tokens_per_right(records: Sequence[Record], metric: str) -> float | None:
    if any(record.length is None for record in records):
        return None
    found = tokens_per_right([r.length for r in records], [r.right(metric) for r in records])
    return found if math.isfinite(found) else None


def _bin(length: int) -> int:
    """Returns the upper edge of a length's bin, a power of two: the same for every evaluation."""
    return max(_SHORTEST_BIN, 1 << (length - 1).bit_length())


def _modes(
    problems: Mapping[int, Sequence[Record]], metric: str
) -> dict[str, dict[str, float | None]]:
    """Computes the modes of each problem's answers in a length bin, and their means."""
    bins: dict[int, list[tuple[float, Mode]]] = collections.defaultdict(list)
    known = any(r.verdict.prediction is not None for group in problems.values() for r in group)
    for group in problems.values() if known else ():
        parts = collections.defaultdict(list)
        for record in group:
            if record.length is not None:
                parts[_bin(record.length)].append(record)
        for edge, part in parts.items():
            right = [record.right(metric) for record in part]
            found = mode([record.verdict.prediction for record in part], right)
            bins[edge].append((float(np.mean(right)), found))

    def mean(values: Iterable[float | None]) -> float | None:
        some = [value for value in values if value is not None]
        return float(np.mean(some)) if some else None

    return {
        f"≤{edge}": {
            "accuracy": mean(accuracy for accuracy, _ in found),
            "mode_accuracy": mean(one.accuracy for _, one in found),
            "distinct": mean(one.distinct for _, one in found),
            "differ": mean(one.differ for _, one in found),
            "problems": len(found),
        }
        for edge, found in sorted(bins.items())
    }


def _by_length(records: Sequence[Record], metric: str) -> dict[str, dict[str, float]]:
    """Computes accuracy in length bins."""
    bins: dict[int, list[bool]] = collections.defaultdict(list)
    for record in records:
        if record.length is not None:
            bins[_bin(record.length)].append(record.right(metric))
    return {
        f"≤{edge}": {"accuracy": float(np.mean(hits)), "responses": len(hits)}
        for edge, hits in sorted(bins.items())
    }


def _by_field(
    problems: Mapping[int, Sequence[Record]], right: Sequence[int], field: str
) -> dict[str, dict[str, Any]]:
    parts: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for count, group in zip(right, problems.values(), strict=True):
        parts[str(group[0].meta.get(field, "unknown"))].append((count, len(group)))
    return {
        value: {
            "accuracy": float(np.mean([count / total for count, total in counts])),
            "ci95": accuracy_interval(*zip(*counts, strict=True)),
            "problems": len(counts),
        }
        for value, counts in sorted(parts.items())
    }
