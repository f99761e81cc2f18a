"""A run's length state: the exponent it steers, and whether changes of length pay.

All values are plain numbers on the host, saved in the checkpoint, so that a resumed run steers like
an uninterrupted one.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from luspo_jax.length.settings import LengthSettings


@dataclasses.dataclass(frozen=True)
class LengthState:
    """Running length statistics of a run.

    Attributes:
      alpha_shift: shift added to the objective's `length_alpha`.
      length: running mean of the mean response length, tokens; None before the first step.
      pressure: running mean of the run's own length pressure per unit of gradient mass.
      slope: running mean of that pressure's derivative in α.
      measured_shift: running mean of `alpha_shift` at those measurements.
      history: (mean length, accuracy) of the last two windows' steps, oldest first.
    """

    alpha_shift: float = 0.0
    length: float | None = None
    pressure: float | None = None
    slope: float | None = None
    measured_shift: float | None = None
    history: tuple[tuple[float, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values; floats survive exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "LengthState":
        """Restores the output of `to_json`."""
        history = tuple((float(length), float(right)) for length, right in stored["history"])
        return cls(**{**stored, "history": history})


@dataclasses.dataclass(frozen=True)
class Degeneration:
    """Whether length grew, or collapsed, over the last window while accuracy did not grow.

    Attributes:
      growth: relative growth of the mean length from the window before to the last one.
      gain: growth of the mean accuracy.
      flagged: growth above the setting and gain below it.
      collapsed: a fall of length beyond the setting and gain below it.
    """

    growth: float
    gain: float
    flagged: bool
    collapsed: bool

    @property
    def direction(self) -> int:
        """Where length degenerates to: 1 = longer, −1 = shorter, 0 = it does not."""
        return int(self.flagged) - int(self.collapsed)


def observed(
    state: LengthState, settings: LengthSettings, *, mean_length: float, accuracy: float
) -> LengthState:
    """Updates the state with a rollout's mean length and accuracy; ignores non-finite values."""
    if not (math.isfinite(mean_length) and math.isfinite(accuracy)):
        return state
    history = (*state.history, (float(mean_length), float(accuracy)))[-2 * settings.window :]
    length = _mixed(state.length, float(mean_length), settings.smoothing)
    return dataclasses.replace(state, history=history, length=length)


def degeneration(state: LengthState, settings: LengthSettings) -> Degeneration:
    """Compares the last window with the one before; nothing is flagged before both are full."""
    window = settings.window
    if len(state.history) < 2 * window:
        return Degeneration(0.0, 0.0, False, False)
    before, last = state.history[:window], state.history[window:]
    (length_0, right_0), (length_1, right_1) = (
        [math.fsum(values) / window for values in zip(*part, strict=True)]
        for part in (before, last)
    )
    growth = length_1 / length_0 - 1 if length_0 > 0 else 0.0
    gain = right_1 - right_0
    unpaid = gain < settings.gain
    return Degeneration(
        growth, gain, unpaid and growth > settings.growth, unpaid and growth < -settings.fall
    )


def measured(
    state: LengthState, settings: LengthSettings, *, pressure: float, slope: float
) -> LengthState:
    """Updates the state with the run's own pressure at α and its slope in α.

    Non-finite measurements are ignored.
    """
    if not (math.isfinite(pressure) and math.isfinite(slope)):
        return state
    return dataclasses.replace(
        state,
        pressure=_mixed(state.pressure, float(pressure), settings.smoothing),
        slope=_mixed(state.slope, float(slope), settings.smoothing),
        measured_shift=_mixed(state.measured_shift, state.alpha_shift, settings.smoothing),
    )


def steered(
    state: LengthState, settings: LengthSettings, *, start: float, direction: int
) -> LengthState:
    """Moves α by at most `alpha_rate`, within [alpha_low, alpha_high].

    Band: in proportion to the relative distance of the running mean length from the band. Pressure:
    a secant step towards zero pressure from the α at which it was measured, so that steps between
    two measurements head for one point instead of repeating the same move. Whether a larger α
    lengthens responses depends on the task, so both modes use the sign of the measured slope;
    without a measurement, a larger α is assumed to lengthen. While length degenerates and the
    mitigation is "scale", α always decreases (length grows) or increases (it collapses).

    Args:
      state: the state after the step's observation.
      settings: the controls.
      start: the objective's `length_alpha`.
      direction: of `Degeneration`.
    """
    rate, slope = settings.alpha_rate, state.slope
    move = 0.0
    if direction and settings.mitigation == "scale":
        move = -rate * direction
    elif settings.steer == "band" and state.length is not None:
        error = _outside(state.length, settings.target_low, settings.target_high)
        move = rate * max(-1.0, min(1.0, error)) * (-1.0 if (slope or 0.0) < 0 else 1.0)
    elif settings.steer == "pressure" and state.measured_shift is not None and slope:
        zero = state.measured_shift - state.pressure / slope
        move = max(-rate, min(rate, zero - state.alpha_shift))
    # In shifts, not in α: adding and subtracting the start would move α by rounding alone.
    low, high = settings.alpha_low - start, settings.alpha_high - start
    return dataclasses.replace(state, alpha_shift=min(high, max(low, state.alpha_shift + move)))


def _outside(length, low, high):
    """Returns the relative distance to the band: positive below it, negative above."""
    if length < low:
        return (low - length) / low
    return (high - length) / high if length > high else 0.0


def _mixed(old, new, smoothing):
    return new if old is None else smoothing * old + (1 - smoothing) * new
