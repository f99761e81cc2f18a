"""Rules for values, and the messages that refuse them: shared by fields, flags and names."""

import dataclasses
import difflib
import math
import textwrap
from collections.abc import Collection, Iterable
from typing import Any

_FEW = 40  # names that a message lists


class ConfigError(ValueError):
    """A configuration that cannot run; the message names each field and the remedy.

    Each argument is one problem.
    """

    def __str__(self) -> str:
        """Returns the problems, one per line."""
        return "\n".join(str(problem) for problem in self.args)


def nearest(name: Any, names: Iterable[str]) -> str:
    """Returns the hint after an unknown name: the closest of `names`, and all if they are few."""
    names = sorted(filter(None, names))
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = [f"did you mean {close[0]!r}?"] if close else []
    known = [f"known: {', '.join(names)}"] if len(names) <= _FEW else []
    return " ".join(hint + known) or "nothing has a name like it"


@dataclasses.dataclass(frozen=True)
class Number:
    """Finite numbers between two bounds.

    Attributes:
      low: lower bound.
      high: upper bound.
      open_low: whether `low` itself is excluded.
      open_high: whether `high` itself is excluded.
      also: allowed values outside the bounds.
      why: the reason, for the message.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    also: tuple[float, ...] = ()
    why: str = ""

    def allows(self, value: float) -> bool:
        """Returns whether a number satisfies the rule."""
        if not math.isfinite(value):
            return False
        low = self.low < value if self.open_low else self.low <= value
        high = value < self.high if self.open_high else value <= self.high
        return (low and high) or value in self.also

    def __str__(self) -> str:
        """Returns the rule in words, to follow "must be"."""
        also = "".join(f"{value:g}, or " for value in self.also)
        least, most = _plain(self.low), _plain(self.high)
        low = f"more than {least}" if self.open_low else f"at least {least}"
        high = f"less than {most}" if self.open_high else f"at most {most}"
        return f"{also}{low} and {high}" + (f": {self.why}" if self.why else "")


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of several names; with a `mark`, also any text that contains the mark once."""

    names: Collection[str]
    mark: str = ""

    def allows(self, value: str) -> bool:
        """Returns whether a name satisfies the rule."""
        return value in self.names or (self.mark != "" and value.count(self.mark) == 1)


@dataclasses.dataclass(frozen=True)
class Text:
    """Nonempty text; `remedy` says what to give."""

    remedy: str

    def allows(self, value: str) -> bool:
        """Returns whether the text is more than blanks."""
        return bool(value.strip())


Rule = Number | OneOf | Text

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def refusal(field: str, value: Any, kind: type, rule: Rule | None = None) -> str | None:
    """Returns a line that refuses the value of a field of type `kind`; None if it is allowed."""
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
    """Returns a line that refuses a dataclass field's value by type and RULES; None if allowed."""
    (kind,) = (field.type for field in dataclasses.fields(section) if field.name == name)
    if kind == bool | None and value is not None:
        kind = bool
    if kind not in _KINDS:  # an open section, another section, or unset
        return None
    return refusal(f"{prefix}{name}", value, kind, section.RULES.get(name))


def check_fields(section: Any, prefix: str = "", together: Iterable[str] = ()) -> None:
    """Checks the fields of a dataclass with RULES: field → rule for its value, besides its type.

    Args:
      section: an instance.
      prefix: put before a field's name, such as "rollout.".
      together: lines about values that conflict; read only if each value is valid by itself.

    Raises:
      ConfigError: with all lines, one per argument.
    """
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    found = (refused_field(type(section), *item, prefix) for item in values.items())
    problems = [line for line in found if line] or list(together)
    if problems:
        raise ConfigError(*problems)


def _is(value: Any, kind: type) -> bool:
    """Returns whether a value has a type; a whole number is a number, True is not."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def shown(value: Any) -> str:
    """Returns a value as one short line."""
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return textwrap.shorten(repr(value), 80)


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e12 else f"{value:g}"


# The noise of a token is keyed by 32-bit words.
SEED = Number(0, 2**32 - 1)
# Below the lower bound, float32 rounding hides the mass of the likeliest tokens.
TEMPERATURE = Number(1e-3, 1e3, why="responses colder than that are greedy: temperature 0")
