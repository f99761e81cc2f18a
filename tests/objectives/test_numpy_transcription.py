"""Every preset against an independent float64 transcription of its formula."""

import numpy as np
import pytest

from luspo_jax.objectives import PRESETS
from tests.objectives import numpy_objectives
from tests.objectives.objective_cases import ALL, LOADED, case, whole_step

pytestmark = pytest.mark.usefixtures("strict_dtypes", "x64")


def test_every_preset_is_transcribed():
    assert set(PRESETS) == set(numpy_objectives.METHODS)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", [1, 4])
def test_loss_and_gradient(name, seed):
    arrays = case(seed, drift=0.5)
    base, terms = name.removesuffix("+terms"), name in LOADED
    value, grad_BT = whole_step(ALL[name], arrays)
    expected = numpy_objectives.loss(base, arrays, arrays["logprobs_BT"], terms=terms)
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)
    expected_BT = numpy_objectives.gradient(base, arrays, terms=terms)
    scale = np.abs(expected_BT).max()
    np.testing.assert_allclose(grad_BT, expected_BT, rtol=1e-7, atol=1e-7 * scale)
