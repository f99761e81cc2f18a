"""What a value may be, and the words that refuse it: written once, for fields, flags and names."""

import dataclasses
import difflib
import math
import textwrap
from collections.abc import Collection, Iterable
from typing import Any

_FEW = 40  # names that a message lists


class ConfigError(ValueError):
    """A configuration that cannot run; the message names each field and the remedy.

    It may be made of several problems, each an argument.
    """

    def __str__(self) -> str:
        """The problem, or a line for each."""
        return "\n".join(str(problem) for problem in self.args)


def nearest(name: Any, names: Iterable[str]) -> str:
    """The words after an unknown name: the closest of `names`, and all of them if they are few."""
    names = sorted(filter(None, names))
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = [f"did you mean {close[0]!r}?"] if close else []
    known = [f"known: {', '.join(names)}"] if len(names) <= _FEW else []
    return " ".join(hint + known) or "nothing has a name like it"


@dataclasses.dataclass(frozen=True)
class Number:
    """Finite numbers between two bounds.

    Attributes:
      low: least.
      high: greatest.
      open_low: whether `low` itself is left out.
      open_high: whether `high` itself is left out.
      also: values outside the bounds that are allowed too.
      why: the reason, for the message.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    also: tuple[float, ...] = ()
    why: str = ""

    def allows(self, value: float) -> bool:
        """Whether a number is one of these."""
        if not math.isfinite(value):
            return False
        low = self.low < value if self.open_low else self.low <= value
        high = value < self.high if self.open_high else value <= self.high
        return (low and high) or value in self.also

    def __str__(self) -> str:
        """The rule in words, to follow "must be"."""
        also = "".join(f"{value:g}, or " for value in self.also)
        least, most = _plain(self.low), _plain(self.high)
        low = f"more than {least}" if self.open_low else f"at least {least}"
        high = f"less than {most}" if self.open_high else f"at most {most}"
        return f"{also}{low} and {high}" + (f": {self.why}" if self.why else "")


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of several names; with a `mark`, also any text that holds it once."""

    names: Collection[str]
    mark: str = ""

    def allows(self, value: str) -> bool:
        """Whether a name is one of these."""
        return value in self.names or (self.mark != "" and value.count(self.mark) == 1)


@dataclasses.dataclass(frozen=True)
class Text:
    """Text that must not be empty; `remedy` says what to give."""

    remedy: str

    def allows(self, value: str) -> bool:
        """Whether there is any text."""
        return bool(value.strip())


Rule = Number | OneOf | Text

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def refusal(field: str, value: Any, kind: type, rule: Rule | None = None) -> str | None:
    """One line that refuses the value of a field of type `kind`; None where it is allowed."""
    if not _is(value, kind):
        return f"{field}={shown(value)} must be {_KINDS[kind]}"
    if rule is None or rule.allows(value):
        return None
    if isinstance(rule, OneOf):
        return f"{field}={shown(value)} does not exist: {nearest(value, rule.names)}"
    if isinstance(rule, Text):
        return f"{field} is empty: {rule.remedy}"
    return f"{field}={value} must be {rule}"


def refused_field(section: type, name: str, value: Any, prefix: str = "") -> str | None:
    """One line that refuses the value of a dataclass's field, by its type and the class's RULES."""
    (kind,) = (field.type for field in dataclasses.fields(section) if field.name == name)
    if kind == bool | None and value is not None:
        kind = bool
    if kind not in _KINDS:  # names that are the user's, another section, or unset
        return None
    return refusal(f"{prefix}{name}", value, kind, section.RULES.get(name))


def check_fields(section: Any, prefix: str = "", together: Iterable[str] = ()) -> None:
    """Checks the fields of a dataclass that has RULES: field → what it may be beside its type.

    Args:
      section: an instance.
      prefix: what comes before a field's name, such as "rollout.".
      together: lines about values that do not go together; read where each value is sound.

    Raises:
      ConfigError: with all lines, each an argument.
    """
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    found = (refused_field(type(section), *item, prefix) for item in values.items())
    problems = [line for line in found if line] or list(together)
    if problems:
        raise ConfigError(*problems)


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a kind; a whole number is a number, True is none."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def shown(value: Any) -> str:
    """A value in one short line."""
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return textwrap.shorten(repr(value), 80)


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e12 else f"{value:g}"


# The noise of a token is keyed by words of 32 bits.
SEED = Number(0, 2**32 - 1)
# Below the least, float32 no longer tells the mass of the likeliest tokens from their rounding.
TEMPERATURE = Number(1e-3, 1e3, why="responses colder than that are greedy: temperature 0")
