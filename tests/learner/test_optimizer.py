"""The optimizer against hand computation."""

import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.learner import optimizer


@pytest.mark.parametrize(("step", "expected"), [(0, 0.05), (9, 0.5), (19, 1.0), (500, 1.0)])
def test_warmup_counts_rollout_steps(step, expected):
    assert optimizer.learning_rate(step, peak=1.0, warmup_steps=20) == pytest.approx(expected)


def test_no_warmup():
    assert optimizer.learning_rate(0, peak=0.3, warmup_steps=0) == 0.3


def test_adamw_first_step_by_hand():
    tx = optimizer.adamw(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
    params, grads = {"w": jnp.array([2.0, -1.0])}, {"w": jnp.array([0.5, -4.0])}
    new, _ = optimizer.apply(tx, params, grads, tx.init(params), rate=0.01)
    # Bias-corrected moments of a first step are g and g², so the direction is g/|g|.
    np.testing.assert_allclose(new["w"], [2 - 0.01 * (1 + 0.2), -1 - 0.01 * (-1 - 0.1)], rtol=1e-5)


def test_clipping_by_global_norm():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped, norm, was = optimizer.clip_by_global_norm(grads, 1.0)
    assert (float(norm), bool(was)) == (5.0, True)
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [0.6, 0.8], rtol=1e-6)
    same, norm, was = optimizer.clip_by_global_norm(grads, 0.0)
    assert (float(norm), bool(was)) == (5.0, False)
    assert same is grads
