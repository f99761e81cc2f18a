"""Rows moved by gathers in both directions."""

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.ops.moves import moved


def test_the_transpose_is_the_other_move():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(5, 3)), rng.normal(size=(7, 3))
    at = np.array([4, 5, 0, 5, 2, 3, 5])  # 5 for none; row 1 is not wanted
    back = np.array([2, 7, 4, 5, 0])
    plain = np.concatenate([x, np.zeros((1, 3))])[at]
    np.testing.assert_allclose(moved(x, at, back), plain, atol=1e-6)
    got = jax.grad(lambda x: jnp.sum(weights * moved(x, at, back)))(x)
    want = np.zeros_like(x)
    np.add.at(want, at[at < 5], weights[at < 5])
    np.testing.assert_allclose(got, want, atol=1e-6)
    twice = jax.grad(lambda w: jnp.sum(jax.vjp(lambda x: moved(x, at, back), x)[1](w)[0] ** 2))
    np.testing.assert_allclose(
        twice(jnp.asarray(weights)), 2 * np.where((at < 5)[:, None], weights, 0), atol=1e-5
    )
