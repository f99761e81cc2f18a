"""Accounts for response lengths: those that are sampled, those that end, and those trained on.

Whatever chooses among responses (group and response filters, partial rollouts, limits on age) may
choose by length without being asked to. Responses that end in a step are no fair measure of what is
sampled, since short ones end first; so the comparison is over a window of steps, and responses that
still run count as what they are: lengths known only to be greater than the tokens so far.

A cohort is all responses of the groups that were begun in one step. C in shape suffixes: cohorts; T
here: lengths 0 … longest in tokens.
"""

import collections
import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from luspo_jax.length.settings import LengthSettings

_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
_OLDEST_BIN = 4  # ages from here on share a bin
# Of a difference, before it warns: every step looks again, so that 0.95 would be reached by chance
# over and over.
_CONFIDENCE = 0.999


class Finished(NamedTuple):
    """A response that ended: the step its group was begun in, its tokens, whether it was cut."""

    begun: int
    length: int
    cut: bool


class Running(NamedTuple):
    """A response that has not ended: the step its group was begun in, and its tokens so far."""

    begun: int
    length: int


class Consumed(NamedTuple):
    """A response trained on: the step its group was begun in, tokens, steps since its first."""

    begun: int
    length: int
    age: int


class Cohort(NamedTuple):
    """What is known for good of a cohort: lengths of ended responses, tokens of dropped ones."""

    begun: int
    ended: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


class Batch(NamedTuple):
    """Lengths of one cohort's responses that one step trained on."""

    step: int
    begun: int
    lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AccountState:
    """Lengths of the last `account_window` steps.

    Attributes:
      start: the first step accounted for; None before it. Older cohorts are known in part only.
      cohorts: begun in the window, oldest first.
      consumed: trained on in the window, oldest first.
      flagged: whether lengths trained on had parted from lengths sampled when last compared.
    """

    start: int | None = None
    cohorts: tuple[Cohort, ...] = ()
    consumed: tuple[Batch, ...] = ()
    flagged: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "AccountState":
        """Restores the output of `to_json`."""
        cohorts = (
            Cohort(b, tuple(ended), tuple(dropped)) for b, ended, dropped in stored["cohorts"]
        )
        consumed = (Batch(step, b, tuple(lengths)) for step, b, lengths in stored["consumed"])
        return cls(stored["start"], tuple(cohorts), tuple(consumed), stored["flagged"])


class Window(NamedTuple):
    """Lengths trained on against lengths sampled, over a window of steps.

    Attributes:
      sampled: Kaplan–Meier mean of the lengths of the window's cohorts up to `horizon`, tokens.
      median: Kaplan–Meier median of the same; NaN if fewer than half have ended.
      consumed: mean of min(length, horizon) of the responses that the window trained on, tokens.
      horizon: greatest length or number of tokens so far in the window's cohorts; nothing is known
        of what lies beyond, so neither mean counts it.
      difference: consumed / sampled − 1.
      standard_error: of log(consumed / sampled).
      significant: whether that logarithm differs from 0, by Student's t at 99.9 %.
    """

    sampled: float
    median: float
    consumed: float
    horizon: int
    difference: float
    standard_error: float
    significant: bool


def account(
    state: AccountState,
    settings: LengthSettings,
    step: int,
    *,
    finished: Sequence[Finished],
    running: Sequence[Running],
    consumed: Sequence[Consumed],
    dropped: Sequence[Running] = (),
) -> tuple[AccountState, dict[str, float]]:
    """Adds a step to the account, and compares what is trained on with what is sampled.

    Every response is in `running` at the end of each step from its group's beginning until it is,
    once, in `finished` or in `dropped`; it is in `consumed` once or never. Warns when the two part
    (`length/account/flag`) and did not in the step before: the relative difference of means is
    greater than `account_limit`, and more than chance. Nothing is flagged before a full window that
    begins late enough for the oldest responses trained on in it: at the start of a run only short
    ones can have ended.

    Args:
      state: after the step before.
      settings: of the run.
      step: rollout steps taken before this one.
      finished: responses that ended in this step, whatever becomes of them.
      running: responses that were begun and have not ended, of this and of earlier steps.
      consumed: responses of the step's batch that carry gradient.
      dropped: responses given up in this step before they ended.

    Returns:
      The new state, and metrics by name.
    """
    start = step if state.start is None else state.start
    first = step - settings.account_window + 1
    # Of a cohort begun before the account, earlier endings are not known: it is left out.
    oldest = max(start, first)
    new = AccountState(
        start=start,
        cohorts=_with_ended(state.cohorts, finished, dropped, oldest),
        consumed=_with_consumed(state.consumed, consumed, step, first),
    )
    window = compared(new, [response for response in running if response.begun >= oldest])
    age = max((batch.step - batch.begun for batch in new.consumed), default=0)
    parted = window.significant and abs(window.difference) > settings.account_limit
    flagged = parted and first >= start + age
    if flagged and not state.flagged:
        warnings.warn(_told(window, settings), stacklevel=2)
    metrics = {
        **_step_metrics(step, finished, running, consumed, dropped),
        **_complete_metrics(new, running),
        "length/account/window/sampled_mean": window.sampled,
        "length/account/window/sampled_p50": window.median,
        "length/account/window/consumed_mean": window.consumed,
        "length/account/window/horizon": window.horizon,
        "length/account/window/relative_difference": window.difference,
        "length/account/window/standard_error": window.standard_error,
        "length/account/flag": flagged,
    }
    new = dataclasses.replace(new, flagged=flagged)
    return new, {name: float(value) for name, value in metrics.items()}


def kaplan_meier(ended_T: np.ndarray, running_T: np.ndarray) -> np.ndarray:
    """Estimates P(length > t) at each t from lengths of which some are known only from below.

    S(t) = Π_{u ≤ t} (1 − d_u / n_u), d_u = ended_T[u], n_u = Σ_{v ≥ u} (ended_T[v] + running_T[v])

    Kaplan and Meier, J. Amer. Statist. Assoc. 53 (1958) 457–481. Consistent if who still runs is
    decided by what is past and not by what would follow: the end of a step or an age limit may
    depend on lengths, but on none that has not been reached.

    Args:
      ended_T: number of responses that ended, by themselves or cut, with t tokens.
      running_T: number of responses that have t tokens and have not ended.
    """
    at_risk_T = np.cumsum((ended_T + running_T)[::-1])[::-1]
    return np.cumprod(1.0 - ended_T / np.maximum(at_risk_T, 1))


def restricted_mean(survival_T: np.ndarray) -> float:
    """Returns the mean of min(length, T−1) in tokens: Σ_{t < T−1} P(length > t)."""
    return float(survival_T[:-1].sum())


def compared(state: AccountState, running: Iterable[Running]) -> Window:
    """Compares the lengths that the window trained on with those of its cohorts.

    The standard error is the jackknife's over cohorts (Efron and Stein, Ann. Statist. 9 (1981)
    586–596): each is left out in turn, of what was sampled and of what was trained on. So it holds
    where responses to a prompt resemble each other, and where most of those sampled are trained on.
    It is of the ratio's logarithm, which is less skewed than the ratio where responses are few.

    Args:
      state: with the step's lengths.
      running: responses of the window's cohorts that have not ended.
    """
    ended = {cohort.begun: cohort.ended for cohort in state.cohorts}
    dropped = (Running(c.begun, length) for c in state.cohorts for length in c.dropped)
    censored = _by_cohort([*running, *dropped])
    trained = _by_cohort(Running(b.begun, length) for b in state.consumed for length in b.lengths)
    begun = sorted({*ended, *censored, *trained})
    horizon = max(itertools.chain(*ended.values(), *censored.values()), default=0)
    ended_CT, censored_CT = (_table(known, begun, horizon) for known in (ended, censored))
    totals_C = np.array([np.minimum(trained.get(b, ()), horizon).sum() for b in begun])
    counts_C = np.array([len(trained.get(b, ())) for b in begun])
    sums = [part.sum(0) for part in (ended_CT, censored_CT, totals_C, counts_C)]
    survival_T = kaplan_meier(*sums[:2])
    ratios_C = np.array(
        [
            _ratio(*(total - own for total, own in zip(sums, parts, strict=True)))
            for parts in zip(ended_CT, censored_CT, totals_C, counts_C, strict=True)
        ]
    )
    below = np.flatnonzero(survival_T <= 0.5)
    ratio, error = _ratio(*sums), _log_error(ratios_C)
    reach = scipy.stats.t.ppf((1 + _CONFIDENCE) / 2, len(begun) - 1) if len(begun) > 1 else math.nan
    return Window(
        sampled=restricted_mean(survival_T) if horizon else math.nan,
        median=float(below[0]) if len(below) else math.nan,
        consumed=sums[2] / sums[3] if sums[3] else math.nan,
        horizon=horizon,
        difference=ratio - 1,
        standard_error=error,
        significant=bool(ratio > 0 and abs(math.log(ratio)) > reach * error),
    )


def distances(consumed_B: Sequence[int], reference_B: Sequence[int]) -> dict[str, float]:
    """Returns how far the lengths trained on lie from others; NaN if there are none of either.

    Args:
      consumed_B: lengths trained on, in tokens.
      reference_B: lengths to compare with, in tokens.

    Returns:
      `difference` of the means in tokens; `w1`, the Wasserstein-1 distance in tokens;
      `w1_relative`, the same over the mean of the reference; `ks`, the Kolmogorov–Smirnov
      statistic.
    """
    if not (len(consumed_B) and len(reference_B)):
        return dict.fromkeys(("difference", "w1", "w1_relative", "ks"), math.nan)
    mean = np.mean(reference_B)
    w1 = scipy.stats.wasserstein_distance(consumed_B, reference_B)
    return {
        "difference": np.mean(consumed_B) - mean,
        "w1": w1,
        "w1_relative": w1 / mean if mean else math.nan,
        "ks": _kolmogorov_smirnov(consumed_B, reference_B),
    }


def _kolmogorov_smirnov(one_B, other_B):
    """Returns max |F − G|; scipy's function also computes a p-value, slowly or with warnings."""
    at = np.unique(np.concatenate([one_B, other_B]))
    below, others_below = (np.searchsorted(np.sort(x), at, "right") for x in (one_B, other_B))
    return np.max(np.abs(below / len(one_B) - others_below / len(other_B)))


def _with_ended(cohorts, finished, dropped, oldest):
    ended, given_up = _by_cohort(finished), _by_cohort(dropped)
    known = {cohort.begun: cohort for cohort in cohorts}
    begun = sorted(b for b in known.keys() | ended.keys() | given_up.keys() if b >= oldest)
    before = [known.get(b, Cohort(b)) for b in begun]
    return tuple(
        Cohort(c.begun, (*c.ended, *ended[c.begun]), (*c.dropped, *given_up[c.begun]))
        for c in before
    )


def _with_consumed(batches, consumed, step, first):
    new = sorted(_by_cohort(consumed).items())
    kept = [batch for batch in batches if batch.step >= first]
    return (*kept, *(Batch(step, begun, tuple(lengths)) for begun, lengths in new))


def _by_cohort(responses):
    """Returns the step in which they were begun → lengths."""
    lengths = collections.defaultdict(list)
    for response in responses:
        lengths[int(response.begun)].append(int(response.length))
    return lengths


def _table(known, begun, horizon):
    """Returns the number of responses of each length, a row per cohort."""
    rows = [np.bincount(np.array(known.get(b, ()), int), minlength=horizon + 1) for b in begun]
    return np.reshape(rows, (-1, horizon + 1))


def _ratio(ended_T, censored_T, total, count):
    """Returns the mean trained on over the mean sampled; NaN where one is missing."""
    sampled = restricted_mean(kaplan_meier(ended_T, censored_T))
    return float(total / count / sampled) if count and sampled else math.nan


def _log_error(ratios_C):
    """Returns the jackknife's standard error of a logarithm, from ratios without each cohort."""
    if not (len(ratios_C) > 1 and (ratios_C > 0).all()):
        return math.nan
    logs_C = np.log(ratios_C)
    return float(np.sqrt((len(logs_C) - 1) * np.mean((logs_C - logs_C.mean()) ** 2)))


def _step_metrics(step, finished, running, consumed, dropped):
    fresh = [response for response in (*running, *dropped) if response.begun == step]
    begun = [response.length for response in (*finished, *fresh) if response.begun == step]
    ended, trained = ([r.length for r in responses] for responses in (finished, consumed))
    ages = np.minimum([response.age for response in consumed], _OLDEST_BIN)
    return {
        **_summary("sampled", begun),
        "length/account/sampled/unfinished": len(fresh) / len(begun) if begun else math.nan,
        **_summary("finished", ended),
        "length/account/finished/clip_ratio": _mean([response.cut for response in finished]),
        **_summary("consumed", trained),
        **{f"length/account/{name}": v for name, v in distances(trained, ended).items()},
        **{
            f"length/account/consumed/age_{int(age)}/mean": np.mean(np.array(trained)[ages == age])
            for age in np.unique(ages)
        },
    }


def _complete_metrics(state, running):
    """Compares what was trained on so far of complete cohorts with all their responses."""
    open_ones = {response.begun for response in running}
    complete = {c.begun: c for c in state.cohorts if c.begun not in open_ones and not c.dropped}
    ended = [length for cohort in complete.values() for length in cohort.ended]
    trained = [n for batch in state.consumed if batch.begun in complete for n in batch.lengths]
    return {
        "length/account/complete/count": len(ended),
        "length/account/complete/mean": _mean(ended),
        **{f"length/account/complete/{name}": v for name, v in distances(trained, ended).items()},
    }


def _summary(population, lengths):
    levels = (
        np.quantile(lengths, [*_QUANTILES.values()]) if lengths else [math.nan] * len(_QUANTILES)
    )
    return {
        f"length/account/{population}/count": len(lengths),
        f"length/account/{population}/mean": _mean(lengths),
        **{
            f"length/account/{population}/{name}": level
            for name, level in zip(_QUANTILES, levels, strict=True)
        },
    }


def _mean(values):
    return np.mean(values) if len(values) else math.nan


def _told(window, settings):
    return (
        f"in the last {settings.account_window} steps the mean response trained on has "
        f"{window.consumed:.6g} tokens and the mean response sampled {window.sampled:.6g}, "
        f"{window.difference:+.1%} ± {window.standard_error:.1%}: what chooses among responses "
        f"chooses by length (length/account/*, length.account_limit={settings.account_limit:g})"
    )
