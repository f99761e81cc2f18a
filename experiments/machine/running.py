"""Runs the checks of a machine in order, within a budget of time."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.machine.records import (
    ABSENT,
    FAIL,
    OK,
    SKIPPED,
    Absent,
    Check,
    Outcome,
    Rate,
    Record,
    Skipped,
)


@dataclasses.dataclass
class Known:
    """What a check may rest on.

    Attributes:
      config: the configuration that is advised on.
      config_name: its file.
      device: that is checked.
      deadline: on the clock of `time.monotonic`.
      tiny: whether the smallest sizes are used, as tests do.
      found: records of the checks that have ended.
    """

    config: Any
    config_name: str
    device: jax.Device
    deadline: float
    tiny: bool = False
    found: list[Record] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> float:
        """Returns the seconds that are left."""
        return self.deadline - time.monotonic()

    @property
    def on_cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.device.platform == "cpu"

    def of(self, kind: type) -> list[Any]:
        """Returns the records of a kind."""
        return [record for record in self.found if isinstance(record, kind)]

    def rate(self, kind: str, dtype: str | None = None) -> float:
        """Returns the best rate of a kind.

        Raises:
          Skipped: it was not measured.
        """
        rates = [
            one.per_second
            for one in self.of(Rate)
            if one.kind == kind and dtype in (None, one.dtype)
        ]
        if not rates:
            raise Skipped(f"needs the rate of {kind}, which was not measured")
        return max(rates)


def run(
    checks: Sequence[Check], known: Known, *, say: Callable[[str], Any] = print
) -> list[Outcome]:
    """Runs the checks; none that fails ends the others.

    Args:
      checks: in order.
      known: receives what is found.
      say: called with a line as each check ends.
    """
    outcomes, took, foreseen = [], 0.0, 0.0
    for number, check in enumerate(checks, 1):
        # A machine that was slower than foreseen so far will be.
        pace = max(1.0, took / foreseen) if foreseen else 1.0
        outcome = _outcome(check, known, pace)
        known.found += outcome.records
        outcomes.append(outcome)
        note = f": {outcome.note}" if outcome.note else ""
        if outcome.status in (OK, FAIL):
            took, foreseen = took + outcome.seconds, foreseen + check.about_s
            note += f" ({outcome.seconds:.1f} s)"
        say(f"[{number}/{len(checks)}] {check.part}: {check.name}: {outcome.status}{note}")
    return outcomes


def passed(outcomes: Sequence[Outcome]) -> bool:
    """Whether nothing has failed."""
    return all(outcome.status != FAIL for outcome in outcomes)


def _outcome(check, known, pace):
    def ended(status, note="", records=()):
        return Outcome(check.part, check.name, status, note, time.monotonic() - started, records)

    started = time.monotonic()
    about, left = pace * check.about_s, max(0.0, known.left)
    if left < about:
        return ended(SKIPPED, f"takes about {about:.0f} s, and {left:.0f} s are left")
    try:
        records = tuple(check.run(known))
    except Absent as reason:
        return ended(ABSENT, str(reason))
    except Skipped as reason:
        return ended(SKIPPED, str(reason))
    except Exception as error:  # Whatever a kernel raises is what is looked for.
        if out_of_memory(error):
            return ended(SKIPPED, f"out of memory: {_first_line(error)}")
        return ended(FAIL, f"{type(error).__name__}: {_first_line(error)}")
    if all(getattr(record, "passed", True) for record in records):
        return ended(OK, records=records)
    return ended(FAIL, "beyond the tolerance", records)


def out_of_memory(error: Exception) -> bool:
    """Whether jax says that something does not fit."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _first_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"
