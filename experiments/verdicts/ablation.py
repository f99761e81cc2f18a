"""Verdicts of the verifier without one of its rules, for each rule that gave an opinion.

Runs in worker processes, as a user's reward. A rule without an opinion cannot have changed the
verdict, so only the others are turned off, one at a time.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import math_verify

from luspo_jax.rewards import Sample, Verdict
from luspo_jax.rewards.answers import latex, math_equal, plain_numbers, symbolic, words
from luspo_jax.rewards.math_answer import EXTRACTIONS
from luspo_jax.rewards.math_answer import check as judge


class _Rule(NamedTuple):
    """A rule: its location, its silent value, and its table, if any."""

    module: object
    attribute: str
    silence: object = None
    place: int | None = None


# Rules outside the tables.
_DECIDERS = {
    "decimal_commas_agree": _Rule(math_equal, "decimal_commas_agree", False),
    "cut_off_agrees": _Rule(math_equal, "cut_off_agrees", False),
    "parts of lists, tuples, matrices": _Rule(math_equal, "_parts"),
    "formulas": _Rule(math_equal, "formulas_equal", False),
    "formulas: values": _Rule(symbolic, "equal_values"),
    "formulas: Math-Verify at the end": _Rule(math_verify, "verify", False),
    "decimals that round formulas": _Rule(math_equal, "_rounds", False),
    "phrases of one meaning": _Rule(words, "_meaning"),
    "running text is no formula": _Rule(math_equal, "is_running_text", False),
}
# Tables of functions that return None if they have no opinion.
_TABLES = (
    (math_equal, "WORD_RULES"),
    (math_equal, "RULES"),
    (plain_numbers, "_READERS"),
)


def rules() -> dict[str, _Rule]:
    """Returns every rule that can be turned off, by name."""
    found = {
        function.__name__.strip("_"): _Rule(module, table, None, place)
        for module, table in _TABLES
        for place, function in enumerate(getattr(module, table))
    }
    found |= _DECIDERS
    for place, (pattern, _) in enumerate(latex._REWRITES):
        found[f"rewrite {pattern.pattern}"] = _Rule(latex, "_REWRITES", None, place)
    return found


class _Heard:
    """Wraps a function or a pattern and records when it gives an opinion."""

    def __init__(self, original, silence, note: Callable[[], None]):
        self._original, self._silence, self._note = original, silence, note

    def __call__(self, *arguments, **named):
        result = self._original(*arguments, **named)
        if result is not self._silence:
            self._note()
        return result

    def sub(self, new: str, answer: str) -> str:
        result = self._original.sub(new, answer)
        if result != answer:
            self._note()
        return result


def _heard(entry, rule: _Rule, note: Callable[[], None]):
    """Wraps a table's entry, or a function, to record when it gives an opinion."""
    if isinstance(entry, tuple):
        return (_Heard(entry[0], None, note), *entry[1:])
    return _Heard(entry, rule.silence, note)


@contextlib.contextmanager
def listening(known: dict[str, _Rule]) -> Iterator[set[str]]:
    """Collects the names of the rules that give an opinion within the context."""
    spoken: set[str] = set()
    tables: dict[tuple, list] = {}
    with contextlib.ExitStack() as stack:
        for name, rule in known.items():
            original = getattr(rule.module, rule.attribute)
            note = lambda name=name: spoken.add(name)  # noqa: E731
            if rule.place is None:
                new = _heard(original, rule, note)
                stack.enter_context(mock.patch.object(rule.module, rule.attribute, new))
            else:
                table = tables.setdefault((rule.module, rule.attribute), list(original))
                table[rule.place] = _heard(table[rule.place], rule, note)
        for (module, attribute), table in tables.items():
            stack.enter_context(mock.patch.object(module, attribute, tuple(table)))
        yield spoken


def without(rule: _Rule):
    """Returns a context in which a rule is turned off."""
    if rule.place is None:
        new = lambda *_, **__: rule.silence  # noqa: E731
    else:
        table = getattr(rule.module, rule.attribute)
        new = (*table[: rule.place], *table[rule.place + 1 :])
    return mock.patch.object(rule.module, rule.attribute, new)


def check(response: str, answer: str, meta) -> Verdict:
    """Returns the verdict; its prediction is a JSON list of the rules whose absence changes it."""
    known = rules()
    sample = Sample(response, answer, meta=meta)
    extract = EXTRACTIONS[meta["extract"]]
    with listening(known) as spoken:
        verdict = judge(sample, extract=extract)
    changing = []
    for name in sorted(spoken):
        with without(known[name]):
            if judge(sample, extract=extract).value != verdict.value:
                changing.append(name)
    return Verdict(verdict.value, prediction=json.dumps(changing))
