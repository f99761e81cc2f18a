"""Accuracy under token budgets: stored responses are cut and judged again; nothing is sampled.

A response is right under a budget of b tokens if it is judged right when cut after b tokens. One of
at most b tokens keeps its verdict, so only longer ones are decoded and judged again.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from luspo_jax.benchmarks.intervals import accuracy_interval
from luspo_jax.rewards import Reward, Sample
from luspo_jax.rewards.answers.extraction import with_opening

AUTO = "auto"
_SMALLEST = 32  # the least automatic budget is at least this part of the limit


class _Judge(Protocol):
    def score_batch(self, samples: Sequence[Sample]) -> list[Reward]: ...


@dataclasses.dataclass(frozen=True)
class Judged:
    """A response with its verdict, ready to be cut.

    Attributes:
      prompt: its text; a `<think>` at the end belongs to the response.
      tokens: of the response, stop token included.
      sample: what was judged.
      verdict: on the whole response.
    """

    prompt: str
    tokens: Sequence[int]
    sample: Sample
    verdict: Reward


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracy under each budget.

    Attributes:
      budgets: tokens, ascending.
      accuracy: mean over problems of the share of responses that are right when cut.
      ci95: (low, high) of each, `intervals.accuracy_interval`.
      area: mean of the accuracy over log2 of the budget, from the least budget to the largest: the
        trapezoids over log2(b), divided by log2(largest / least); in [0, 1]. Of one budget, its
        accuracy.
      judged_again: cut responses that were judged again.
    """

    budgets: tuple[int, ...]
    accuracy: tuple[float, ...]
    ci95: tuple[tuple[float, float], ...]
    area: float
    judged_again: int

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Curve":
        """Restores what JSON makes of `dataclasses.asdict`."""
        ci95 = tuple(tuple(ends) for ends in stored["ci95"])
        lists = {name: tuple(stored[name]) for name in ("budgets", "accuracy")}
        return cls(**{**stored, **lists, "ci95": ci95})


def budgets(text: str, limit: int) -> tuple[int, ...]:
    """Reads budgets from a setting.

    Args:
      text: empty = none; "auto" = powers of two from limit / 32 on, and the limit; or ascending
        numbers of tokens, joined with commas.
      limit: longest response, in tokens.

    Raises:
      ValueError: anything else; the message says what is allowed.
    """
    if text == AUTO:
        powers = (1 << k for k in range(limit.bit_length()))
        return tuple(sorted({*(b for b in powers if b * _SMALLEST >= limit), limit}))
    try:
        found = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        found = (0,)
    if list(found) != sorted({*found}) or not all(1 <= b <= limit for b in found):
        raise ValueError(
            f'budgets="{text}" must be "{AUTO}" or ascending numbers of tokens such as '
            f'"1024,2048", none above the longest response ({limit})'
        )
    return found


def right_under(
    responses: Sequence[Judged],
    budgets: Sequence[int],
    judge: _Judge,
    decode: Callable[[Sequence[int]], str],
    metric: str,
) -> tuple[np.ndarray, int]:
    """Judges responses cut at each budget.

    A cut that takes no text, such as that of a stop token, keeps the verdict too. The whole work is
    one call of the judge.

    Args:
      responses: with their verdicts.
      budgets: tokens.
      judge: gives verdicts.
      decode: tokens → text.
      metric: the part of a verdict that says right (> 0.5).

    Returns:
      1 = right, 0 = wrong, NaN = no verdict [responses, budgets]; how many were judged again.
    """
    found = np.array([[_value(r.verdict, metric)] * len(budgets) for r in responses], np.float64)
    found = found.reshape(len(responses), len(budgets))
    places, samples = [], []
    for row, response in enumerate(responses):
        for column, budget in enumerate(budgets):
            if len(response.tokens) > budget:
                text = with_opening(response.prompt, decode(response.tokens[:budget]))
                if text != response.sample.response:
                    places.append((row, column))
                    samples.append(
                        dataclasses.replace(response.sample, response=text, length=budget)
                    )
    for place, verdict in zip(places, judge.score_batch(samples) if samples else [], strict=True):
        found[place] = _value(verdict, metric)
    return found, len(samples)


def curve(right_PSK: np.ndarray, budgets: Sequence[int], judged_again: int = 0) -> Curve:
    """Returns accuracies and their area.

    Args:
      right_PSK: 1 = right, 0 = wrong, NaN = left out, of each problem's responses under each budget
        [problems, samples, budgets].
      budgets: tokens, ascending.
      judged_again: passed on.
    """
    accuracy, ci95 = [], []
    for right_PS in np.moveaxis(right_PSK, 2, 0):
        total_P = (~np.isnan(right_PS)).sum(axis=1)
        right_P = np.nansum(right_PS, axis=1)
        some_P = total_P > 0
        if some_P.any():
            right_P, total_P = right_P[some_P].astype(np.int64), total_P[some_P]
            accuracy.append(float(np.mean(right_P / total_P)))
            ci95.append(accuracy_interval(right_P, total_P))
        else:
            accuracy.append(math.nan)
            ci95.append((math.nan, math.nan))
    area = accuracy[0]
    if len(budgets) > 1:
        place = np.log2(np.asarray(budgets, np.float64))
        area = float(np.trapezoid(accuracy, place) / (place[-1] - place[0]))
    return Curve(tuple(budgets), tuple(accuracy), tuple(ci95), area, judged_again)


def tokens_per_right(lengths: Sequence[int], right: Sequence[bool]) -> float:
    """Returns tokens of all responses over the number of right ones; ∞ if none is right."""
    hits = int(np.sum(right))
    return float(np.sum(lengths)) / hits if hits else math.inf


def _value(verdict: Reward, metric: str) -> float:
    return float(verdict.parts[metric] > 0.5) if verdict.judged else math.nan
