"""The overlong penalty is piecewise linear: none, a slope over the buffer, a floor."""

import pytest

from luspo_jax.rewards.overlong import overlong, penalty
from luspo_jax.rewards.record import Sample


@pytest.mark.parametrize(
    ("length", "value"),
    [(0, 0), (79, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (101, -1), (10_000, -1)],
)
def test_dapo_penalty(length, value):
    assert penalty(length, max_length=100, buffer=20) == pytest.approx(value, abs=1e-12)


def test_the_paper_scales_it_by_0_3():
    lengths = range(0, 130, 7)
    full = [penalty(n, max_length=100, buffer=20) for n in lengths]
    scaled = [penalty(n, max_length=100, buffer=20, factor=0.3) for n in lengths]
    assert scaled == pytest.approx([0.3 * value for value in full], abs=1e-12)
    assert min(scaled) == pytest.approx(-0.3)


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_senseless_buffer_is_refused(buffer):
    with pytest.raises(ValueError, match="buffer"):
        penalty(5, max_length=100, buffer=buffer)


def test_the_verifier_reads_the_sample():
    assert overlong(buffer=20).check(Sample("", "", 90, 100)).value == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="max_length"):
        overlong(buffer=20).check(Sample("", "", 90))
