"""Steering of the length scale on made-up runs: directions, bounds, and what is remembered."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from luspo_jax.length import steering
from luspo_jax.length.settings import LengthSettings
from luspo_jax.length.steering import Degeneration, LengthState

BAND = LengthSettings(
    steer="band", target_low=20.0, target_high=30.0, alpha_low=0.2, alpha_high=1.4, alpha_rate=0.1
)
PRESSURE = LengthSettings(steer="pressure", every=1, alpha_low=0.0, alpha_high=1.5)
CLOSE = 1e-12  # α is the sum of two floats

finite = st.floats(allow_nan=False, allow_infinity=False)
any_float = st.floats()


def _steered(state, settings=BAND, *, start=1.0, direction=0):
    return steering.steered(state, settings, start=start, direction=direction)


@st.composite
def settings_and_start(draw):
    low, high = sorted(draw(st.lists(st.floats(-2, 2), min_size=2, max_size=2, unique=True)))
    settings = LengthSettings(
        every=1,
        steer=draw(st.sampled_from(["none", "band", "pressure"])),
        mitigation=draw(st.sampled_from(["none", "penalty", "scale"])),
        target_low=draw(st.floats(1, 50)),
        target_high=draw(st.floats(50, 100)),
        alpha_low=low,
        alpha_high=high,
        alpha_rate=draw(st.floats(1e-3, 5)),
        smoothing=draw(st.floats(0, 0.99)),
    )
    return settings, draw(st.floats(low, high))


# --- bounds ------------------------------------------------------------------------------------


@given(
    settings_and_start(),
    st.lists(
        st.tuples(any_float, any_float, any_float, any_float, st.integers(-1, 1)), max_size=20
    ),
)
def test_alpha_stays_inside_its_bounds_and_below_its_rate(chosen, steps):
    """Whatever is observed and measured, NaN and infinities included."""
    settings, start = chosen
    state = LengthState()
    for length, accuracy, pressure, slope, direction in steps:
        state = steering.observed(state, settings, mean_length=length, accuracy=accuracy)
        before = state.alpha_shift
        state = _steered(state, settings, start=start, direction=direction)
        assert abs(state.alpha_shift - before) <= settings.alpha_rate + CLOSE
        alpha = start + state.alpha_shift
        assert settings.alpha_low - CLOSE <= alpha <= settings.alpha_high + CLOSE
        state = steering.measured(state, settings, pressure=pressure, slope=slope)
    assert all(v is None or math.isfinite(v) for v in _numbers(state))


def _numbers(state):
    yield from (state.alpha_shift, state.length, state.pressure, state.slope, state.measured_shift)
    for pair in state.history:
        yield from pair


# --- band --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "slope", "direction"),
    [
        (10.0, None, 1),
        (10.0, 0.0, 1),
        (10.0, 2.0, 1),
        (10.0, -2.0, -1),  # here a larger α shortens
        (45.0, None, -1),
        (45.0, 2.0, -1),
        (45.0, -2.0, 1),
    ],
)
def test_band_moves_alpha_the_way_that_brings_length_back(length, slope, direction):
    before = LengthState(alpha_shift=-0.1, length=length, slope=slope)
    move = _steered(before).alpha_shift - before.alpha_shift
    assert move * direction > 0
    # In proportion: half a band's bound away, half of the rate.
    assert move == pytest.approx(direction * 0.5 * BAND.alpha_rate)


@given(st.floats(20, 30), st.floats(-0.79, 0.39), st.none() | finite)
def test_inside_the_band_alpha_rests_exactly(length, shift, slope):
    before = LengthState(alpha_shift=shift, length=length, slope=slope)
    assert _steered(before) == before


def test_far_outside_the_band_alpha_moves_by_its_rate_up_to_its_bound():
    state = LengthState(length=1e9)
    seen = []
    for _ in range(12):
        state = _steered(state)
        seen.append(1.0 + state.alpha_shift)
    assert seen == pytest.approx([max(0.2, 1 - 0.1 * k) for k in range(1, 13)])


def test_before_anything_is_known_alpha_rests():
    assert _steered(LengthState()) == LengthState()
    assert _steered(LengthState(), PRESSURE) == LengthState()


@pytest.mark.parametrize("sense", [1.0, -1.0])
def test_band_brings_the_length_of_a_made_up_run_into_the_band(sense):
    """Length relaxes to what α makes of it; a measured slope says which way that is."""
    settings = dataclasses.replace(BAND, smoothing=0.5, alpha_low=-2.0, alpha_high=2.0)
    state, length = LengthState(slope=sense), 60.0
    for _ in range(200):
        state = steering.observed(state, settings, mean_length=length, accuracy=0.5)
        state = _steered(state, settings)
        length += 0.3 * (60 + 40 * sense * state.alpha_shift - length)
    assert settings.target_low <= length <= settings.target_high * (1 + 1e-3)
    resting = state.alpha_shift
    assert _steered(state, settings).alpha_shift == pytest.approx(resting, abs=1e-4)


# --- pressure ----------------------------------------------------------------------------------


def _run(settings, pressure_of, *, steps=300, start=1.0):
    """α after each step of a run whose pressure and slope are `pressure_of(α)`."""
    state, seen = LengthState(), []
    for step in range(steps):
        state = _steered(state, settings, start=start)
        alpha = start + state.alpha_shift
        seen.append(alpha)
        if step % settings.every == 0:
            pressure, slope = pressure_of(alpha)
            state = steering.measured(state, settings, pressure=pressure, slope=slope)
    return seen


@pytest.mark.parametrize("smoothing", [0.0, 0.7, 0.95])
@pytest.mark.parametrize("every", [1, 2, 10])
@pytest.mark.parametrize("zero", [0.35, 1.2])
@pytest.mark.parametrize("slope", [-0.01, 3.0])
def test_pressure_finds_the_zero_of_a_line_without_overshoot(slope, zero, every, smoothing):
    """Steps between two measurements must not repeat a move, nor old measurements pull past."""
    settings = dataclasses.replace(PRESSURE, every=every, smoothing=smoothing)
    seen = _run(settings, lambda alpha: (slope * (alpha - zero), slope))
    assert seen[-1] == pytest.approx(zero, abs=1e-9)
    assert min(1.0, zero) - 1e-9 <= min(seen)
    assert max(seen) <= max(1.0, zero) + 1e-9


@given(st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3), st.floats(-3, 3), st.integers(1, 7))
def test_pressure_goes_to_the_zero_or_to_the_bound_nearest_to_it(slope, zero, every):
    settings = dataclasses.replace(PRESSURE, every=every)
    seen = _run(settings, lambda alpha: (slope * (alpha - zero), slope), steps=80)
    assert seen[-1] == pytest.approx(min(1.5, max(0.0, zero)), abs=1e-6)


def test_pressure_finds_the_zero_of_a_curve():
    settings = dataclasses.replace(PRESSURE, every=2)
    seen = _run(settings, lambda alpha: (math.exp(alpha) - math.exp(0.5), math.exp(alpha)))
    assert seen[-1] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("pressure", "slope"), [(1.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)]
)
def test_without_a_usable_measurement_alpha_rests(pressure, slope):
    assert set(_run(PRESSURE, lambda _: (pressure, slope), steps=20)) == {1.0}


def test_a_measurement_that_is_not_finite_changes_nothing():
    state = steering.measured(LengthState(), PRESSURE, pressure=2.0, slope=1.0)
    for odd in (math.nan, math.inf, -math.inf):
        assert steering.measured(state, PRESSURE, pressure=odd, slope=1.0) == state
        assert steering.measured(state, PRESSURE, pressure=1.0, slope=odd) == state


# --- degeneration ------------------------------------------------------------------------------

WINDOW = LengthSettings(window=3, growth=0.1, fall=0.2, gain=0.02)


def _after(steps, settings=WINDOW):
    state = LengthState()
    for length, accuracy in steps:
        state = steering.observed(state, settings, mean_length=length, accuracy=accuracy)
    return state


@pytest.mark.parametrize(
    ("later", "flagged"),
    [
        ((12.0, 0.5), True),
        ((12.0, 0.4), True),
        ((12.0, 0.6), False),  # longer, and better for it
        ((10.5, 0.5), False),  # growth below the setting
        ((8.0, 0.3), False),
    ],
)
def test_degeneration_is_growth_without_gain(later, flagged):
    found = steering.degeneration(_after([(10.0, 0.5)] * 3 + [later] * 3), WINDOW)
    assert found.flagged == flagged
    assert found.growth == pytest.approx(later[0] / 10 - 1)
    assert found.gain == pytest.approx(later[1] - 0.5)


def test_nothing_is_flagged_before_both_windows_are_full():
    steps = [(10.0 * 2**k, 0.5) for k in range(6)]
    for known in range(6):
        found = steering.degeneration(_after(steps[:known]), WINDOW)
        assert found == Degeneration(0.0, 0.0, False, False)
        assert found.direction == 0
    assert steering.degeneration(_after(steps), WINDOW).flagged


@pytest.mark.parametrize(
    ("later", "collapsed"),
    [
        ((7.0, 0.5), True),  # accuracy stalls
        ((7.0, 0.4), True),
        ((7.0, 0.51), True),  # gains less than the setting
        ((7.0, 0.6), False),  # a plain improvement: shorter and better
        ((8.5, 0.3), False),  # a fall within the setting
        ((12.0, 0.3), False),
        ((0.0, 0.0), True),
    ],
)
def test_collapse_is_a_fall_of_length_without_gain(later, collapsed):
    found = steering.degeneration(_after([(10.0, 0.5)] * 3 + [later] * 3), WINDOW)
    assert found.collapsed == collapsed
    assert found.direction == (-1 if collapsed else int(later[0] > 11))
    assert found.growth == pytest.approx(later[0] / 10 - 1)
    whole = dataclasses.replace(WINDOW, fall=1.0)
    assert not steering.degeneration(_after([(10.0, 0.5)] * 3 + [later] * 3), whole).collapsed


@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 1)), min_size=6, max_size=9),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(-0.5, 0.5),
)
def test_degeneration_is_its_numpy_transcription(steps, growth, fall, gain):
    settings = LengthSettings(window=3, growth=growth, fall=fall, gain=gain)
    found = steering.degeneration(_after(steps, settings), settings)
    before, last = np.reshape(steps[-6:], (2, 3, 2)).mean(axis=1)
    change, better = last[0] / before[0] - 1, last[1] - before[1]
    near = 1e-9  # of a limit: either side is right
    if min(abs(change - growth), abs(change + fall), abs(better - gain)) > near:
        expected = int(better < gain) * (int(change > growth) - int(change < -fall))
        assert found.direction == expected
    assert (found.growth, found.gain) == pytest.approx((change, better), abs=1e-9)


def test_degeneration_compares_the_last_two_windows_only():
    steps = [(1.0, 0.0)] * 5 + [(10.0, 0.5)] * 6
    assert len(_after(steps).history) == 6
    assert not steering.degeneration(_after(steps), WINDOW).flagged


def test_observations_that_are_not_finite_change_nothing():
    state = _after([(10.0, 0.5)] * 6)
    for odd in (math.nan, math.inf, -math.inf):
        assert steering.observed(state, WINDOW, mean_length=odd, accuracy=0.5) == state
        assert steering.observed(state, WINDOW, mean_length=10.0, accuracy=odd) == state


def test_empty_responses_do_not_divide_by_zero():
    assert not steering.degeneration(_after([(0.0, 0.5)] * 6), WINDOW).flagged


@pytest.mark.parametrize("steer", ["none", "band", "pressure"])
def test_mitigation_by_scale_lowers_alpha_whatever_steers(steer):
    settings = dataclasses.replace(BAND, steer=steer, every=1, mitigation="scale")
    # Band and pressure both ask for a larger α.
    state = LengthState(length=5.0, pressure=-1.0, slope=1.0, measured_shift=0.0)
    moved = _steered(state, settings, direction=1).alpha_shift
    assert moved == pytest.approx(-settings.alpha_rate)
    assert _steered(state, settings, direction=0).alpha_shift >= 0
    other = dataclasses.replace(settings, mitigation="penalty")
    assert _steered(state, other, direction=1) == _steered(state, other, direction=0)
    for _ in range(20):
        state = _steered(state, settings, direction=1)
    assert 1.0 + state.alpha_shift == pytest.approx(settings.alpha_low)


@pytest.mark.parametrize("steer", ["none", "band", "pressure"])
def test_mitigation_by_scale_raises_alpha_while_length_collapses(steer):
    settings = dataclasses.replace(BAND, steer=steer, every=1, mitigation="scale")
    # Band and pressure both ask for a smaller α.
    state = LengthState(length=1000.0, pressure=1.0, slope=1.0, measured_shift=0.0)
    assert _steered(state, settings, direction=0).alpha_shift <= 0
    moved = _steered(state, settings, direction=-1).alpha_shift
    assert moved == pytest.approx(settings.alpha_rate)
    other = dataclasses.replace(settings, mitigation="penalty")
    assert _steered(state, other, direction=-1) == _steered(state, other, direction=0)
    for _ in range(20):
        state = _steered(state, settings, direction=-1)
    assert 1.0 + state.alpha_shift == pytest.approx(settings.alpha_high)


# --- memory ------------------------------------------------------------------------------------


@given(
    st.builds(
        LengthState,
        alpha_shift=finite,
        length=st.none() | finite,
        pressure=st.none() | finite,
        slope=st.none() | finite,
        measured_shift=st.none() | finite,
        history=st.lists(st.tuples(finite, finite), max_size=6).map(tuple),
    )
)
@example(LengthState())
def test_json_keeps_every_bit(state):
    restored = LengthState.from_json(json.loads(json.dumps(state.to_json())))
    assert restored == state
    # Equality takes −0.0 for 0.0; the texts of floats do not.
    assert repr(restored) == repr(state)


def test_a_state_from_before_the_measured_shift_restores():
    """Such a run steers on from its next measurement."""
    stored = {
        "alpha_shift": 0.25,
        "length": 12.5,
        "pressure": 1.0,
        "slope": 2.0,
        "history": [[1, 0]],
    }
    state = LengthState.from_json(stored)
    assert state == LengthState(0.25, 12.5, 1.0, 2.0, None, ((1.0, 0.0),))
    assert _steered(state, PRESSURE) == state
    assert steering.measured(state, PRESSURE, pressure=1.0, slope=2.0).measured_shift == 0.25


@given(st.lists(st.tuples(finite, finite, finite, finite), min_size=4, max_size=12))
def test_a_restored_state_steers_as_the_one_that_went_on(steps):
    def run(restart):
        state, seen = LengthState(), []
        for step, (length, accuracy, pressure, slope) in enumerate(steps):
            if step == restart:
                state = LengthState.from_json(json.loads(json.dumps(state.to_json())))
            state = steering.observed(state, PRESSURE, mean_length=length, accuracy=accuracy)
            state = _steered(state, PRESSURE)
            state = steering.measured(state, PRESSURE, pressure=pressure, slope=slope)
            seen.append(state)
        return seen

    assert run(restart=3) == run(restart=None)
