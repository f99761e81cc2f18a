"""Every preset against an independent float64 transcription of its formula."""

import numpy as np
import numpy_objectives
import pytest
from objective_cases import ALL, LOADED, case, mean_metrics, whole_step

from luspo_jax.objectives import PRESETS

pytestmark = pytest.mark.usefixtures("strict_dtypes", "x64")

SEEDS = (1, 4)


def without_kinks(seed: int) -> dict[str, np.ndarray]:
    """A case with no token and no sequence near a clip bound, where differences would straddle."""
    return case(seed, drift=0.5)


def test_every_preset_is_transcribed():
    assert set(PRESETS) == set(numpy_objectives.METHODS)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradient(name, seed):
    arrays = without_kinks(seed)
    base, terms = name.removesuffix("+terms"), name in LOADED
    value, grad_BT = whole_step(ALL[name], arrays)
    expected = numpy_objectives.loss(base, arrays, arrays["logprobs_BT"], terms=terms)
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)
    expected_BT = numpy_objectives.gradient(base, arrays, terms=terms)
    scale = np.abs(expected_BT).max()
    np.testing.assert_allclose(grad_BT, expected_BT, rtol=1e-7, atol=1e-7 * scale)


@pytest.mark.parametrize("name", ["grpo", "luspo", "gmpo", "dppo_tv", "dppo_kl", "minirl"])
def test_the_cases_clip_on_both_sides(name):
    """Agreement would mean little if nothing were clipped, or everything."""
    means = [mean_metrics(PRESETS[name], without_kinks(seed)) for seed in SEEDS]
    assert 0 < sum(mean["clip_ratio/high_mean"] for mean in means) < len(SEEDS) / 2
    assert 0 < sum(mean["clip_ratio/low_mean"] for mean in means) < len(SEEDS) / 2
