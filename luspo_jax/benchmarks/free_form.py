"""Compares free-form answers with references by the math verifier, in killable processes."""

import contextlib
import dataclasses
import re
from collections.abc import Sequence

from luspo_jax.rewards.answers.latex import squeeze, tidy
from luspo_jax.rewards.answers.math_equal import VERSION
from luspo_jax.rewards.answers.plain_numbers import exact_number, numbers_equal
from luspo_jax.rewards.math_answer import whole
from luspo_jax.rewards.record import Sample, Verdict
from luspo_jax.rewards.scorer import Scorer

# Part of the version of every benchmark that compares free-form answers.
VERIFIER = f"math_answer{VERSION}"
_FAILURES = 0.05  # share of time-outs and errors above which verdicts are not trusted
_ALTERNATIVES = re.compile(r"\bor\b")
_TIME_LIMIT = 20.0  # seconds of processor time per verdict; an evaluation can wait


@dataclasses.dataclass(frozen=True)
class Pair:
    """A reference and an answer to compare.

    Attributes:
      gold: the reference.
      prediction: the answer found in a response.
      tolerance: absolute error allowed in each number; None allows rounding only.
    """

    gold: str
    prediction: str
    tolerance: float | None = None


@dataclasses.dataclass(frozen=True)
class OneOf:
    """An answer that selects an option if its value equals that option's and no other's.

    Attributes:
      prediction: the answer found in a response.
      options: (letter, text) of each option.
      right: letters of the right ones.
    """

    prediction: str
    options: tuple[tuple[str, str], ...]
    right: frozenset[str]

    def pairs(self) -> list[Pair]:
        """Returns the pairs to compare."""
        return [Pair(option, self.prediction) for _, option in self.options]


def pair_verifier(*, workers: int | None = None, time_limit: float = _TIME_LIMIT) -> Scorer:
    """Returns the verifier of free-form answers; its processes start with the first pair.

    Args:
      workers: processes; by default one per core.
      time_limit: seconds of processor time per verdict.
    """
    return Scorer(
        {"math_answer": 1.0},
        options={"math_answer": {"extract": "whole"}},
        workers=workers,
        time_limit=time_limit,
        max_failure_rate=_FAILURES,
    )


def equal_pairs(pairs: Sequence[Pair], *, verifier: Scorer | None = None) -> list[Verdict]:
    """Returns the verdict on each pair: equal as written, or without name and unit.

    Args:
      pairs: pairs to compare.
      verifier: from `pair_verifier()`; if None, one is started and ended.

    Raises:
      TooManyFailures: time-outs and errors exceed 5 % of the latest verdicts.
    """
    verdicts: dict[Pair, Verdict] = {}
    for pair in pairs:
        quick = _quickly(pair)
        if quick is not None:
            verdicts[pair] = Verdict(float(quick), prediction=pair.prediction)
    rest = list(dict.fromkeys(pair for pair in pairs if pair not in verdicts))
    if rest:
        with contextlib.nullcontext(verifier) if verifier else pair_verifier() as scorer:
            verdicts |= _in_workers(scorer, rest)
    return [verdicts[pair] for pair in pairs]


def _in_workers(scorer: Scorer, pairs: Sequence[Pair]) -> dict[Pair, Verdict]:
    found = dict(zip(pairs, _score(scorer, pairs), strict=True))
    bare = {pair: _without_name_and_unit(pair) for pair, v in found.items() if v.value <= 0}
    again = {pair: other for pair, other in bare.items() if other != pair and other.prediction}
    for pair, verdict in zip(again, _score(scorer, list(again.values())), strict=True):
        if verdict.value > 0:
            found[pair] = dataclasses.replace(verdict, prediction=pair.prediction)
    return found


def _score(scorer: Scorer, pairs: Sequence[Pair]) -> list[Verdict]:
    samples = [Sample(p.prediction, p.gold, meta={"precision": p.tolerance}) for p in pairs]
    rewards = scorer.score_batch(samples) if samples else []
    return [
        Verdict(reward.value, reward.status, reward.prediction, reward.detail) for reward in rewards
    ]


def _quickly(pair: Pair) -> bool | None:
    """Returns the verdict if letters or plain numbers decide it; None if the verifier must."""
    gold, prediction = tidy(whole(pair.gold)), tidy(whole(pair.prediction))
    if not gold or not prediction:
        return False
    if squeeze(gold) == squeeze(prediction):
        return True
    a, b = exact_number(gold), exact_number(prediction)
    if a is not None and _ALTERNATIVES.search(prediction):
        return False  # the verifier would take the last one
    if a is None or b is None:
        return None
    if pair.tolerance is not None and abs(a - b) <= pair.tolerance * (1 + 1e-9):
        return True
    return numbers_equal(gold, prediction)


_NAME = re.compile(
    r"(?:[A-Za-z][A-Za-z.]+(?:\s+[A-Za-z.]+){0,5}|[A-Za-z](?:\.[A-Za-z])+\.?)\s*[=:]\s*"
)
_UNIT_WORDS = (
    "km|cm|mm|dm|nm|m|in|ft|yd|mi|kg|mg|g|ml|l|L|s|h|hr|hrs|min|km/h|m/s|cm/s|units?|metres?|meters?|"
    "inch|inches|foot|feet|litres?|liters?|degrees?|years?|hours?|minutes?|seconds?|days?|dollars?|"
    "percent|grams?|kilograms?|miles?|yards?"
)
_UNIT = re.compile(
    rf"(?<=[\d}})\s.])\s*(?:(?:square|cubic|sq\.?|cu\.?)\s*)?(?<![A-Za-z])(?:{_UNIT_WORDS})"
    r"\s*(?:\^\s*\{?\s*[23]\s*\}?|[²³])?\s*$"
)
# A word in braces after a number, 69{degrees}, but not the argument of a command.
_BRACED_WORD = re.compile(r"(?<![A-Za-z])\{\s*[A-Za-z ]{3,}\s*\}\s*$")
_TEXT_COMMAND = re.compile(r"\\(?:text|mbox)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\s*\^?\s*\{?\s*\\circ\s*\}?\s*$|\s*\\%\s*$|%\s*$")


def _without_name_and_unit(pair: Pair) -> Pair:
    return dataclasses.replace(
        pair, gold=_bare(whole(pair.gold)), prediction=_bare(whole(pair.prediction))
    )


def _bare(answer: str) -> str:
    """Removes the words before an answer's value and the unit after it: `Area $= 9 cm^2$` is 9."""
    text = _TEXT_COMMAND.sub(r" \1", tidy(tidy(answer).replace("$", " "))).strip()
    text = _NAME.sub("", text, count=1) if _NAME.match(text) else text.lstrip("= ")
    for pattern in (_BRACED_WORD, _UNIT, _DEGREES):
        text = pattern.sub("", text).rstrip(" .~")
    return text
