"""The written backward passes against automatic differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.models import layers
from luspo_jax.models.rope import frequencies

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "contracted"),
    [
        ((2, 3, 5), (5, 7), 1),
        ((2, 3, 7), (7, 5), 1),
        ((2, 3, 5), (5, 4, 2), 1),
        ((2, 3, 4, 2), (4, 2, 5), 2),
        ((2, 3, 4, 2), (4, 2, 3, 5), 2),
        ((3, 5), (5, 2), 1),
    ],
)
def test_projection_and_its_gradients(x_shape, kernel_shape, contracted):
    x, kernel = _normal(*x_shape), _normal(*kernel_shape, seed=1)

    def plain(x, kernel):
        return jnp.tensordot(x, kernel, contracted)

    expected, expected_vjp = jax.vjp(plain, x, kernel)
    got, got_vjp = jax.vjp(lambda x, kernel: layers.project(x, kernel, contracted), x, kernel)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    grad = _normal(*expected.shape, seed=2)
    for a, b in zip(got_vjp(grad), expected_vjp(grad), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_projection_sums_the_gradient_of_float32_weights_in_float32():
    y, vjp = jax.vjp(layers.project, jnp.ones((4097, 1), jnp.bfloat16), jnp.ones((1, 1)))
    dx, dkernel = vjp(jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert dkernel[0, 0] == 4097  # 4096 in bfloat16


def test_products_of_rounded_operands_are_summed_in_float32():
    """Value and both gradients, against float64 products of operands rounded to bfloat16."""
    rng = np.random.default_rng(0)
    x, kernel, grad = (
        rng.normal(size=s).astype(np.float32) for s in ((3, 70, 16), (16, 4, 9), (3, 70, 4, 9))
    )
    product = functools.partial(layers.project, precision=layers.BFLOAT16_PRODUCTS)
    y, back = jax.vjp(product, x, kernel)
    dx, dkernel = back(jnp.asarray(grad))
    rounded = [a.astype(jnp.bfloat16).astype(np.float64) for a in (x, kernel, grad)]
    for found, equation, pair in (
        (y, "btd,dhk->bthk", (0, 1)),
        (dx, "bthk,dhk->btd", (2, 1)),
        (dkernel, "btd,bthk->dhk", (0, 2)),
    ):
        wanted = np.einsum(equation, *(rounded[i] for i in pair))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
        exact = np.einsum(equation, *((x, kernel, grad)[i].astype(np.float64) for i in pair))
        assert np.abs(found - exact).max() > 1e-3 * np.abs(exact).max()


def test_rms_norm_is_float32_inside():
    x = jnp.asarray(_normal(3, 64) * 100, jnp.bfloat16)
    scale = jnp.asarray(_normal(64, seed=1))
    got = layers.rms_norm(x, scale, 1e-6)
    assert got.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale)
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8)


def test_recomputed_functions_keep_their_inputs_only():
    gate, up, scale = _normal(4, 8), _normal(4, 8, seed=1), _normal(8, seed=2)
    for function, inputs in [
        (layers.swiglu, (gate, up)),
        (lambda x, s: layers.rms_norm(x, s, 1e-6), (gate, scale)),
    ]:
        vjp = jax.vjp(function, *inputs)[1]
        kept = sum(leaf.size for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "size"))
        assert kept <= sum(x.size for x in inputs)
    expected = jax.grad(lambda g, u: jnp.sum(g * jax.nn.sigmoid(g) * u), argnums=(0, 1))(gate, up)
    got = jax.grad(lambda g, u: jnp.sum(layers.swiglu(g, u)), argnums=(0, 1))(gate, up)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_rotation_turns_pairs_by_position_over_frequency():
    positions_BT = jnp.array([[0, 1, 5]], jnp.int32)
    rotation = layers.rotation_of(positions_BT, frequencies(4, 100.0))
    x = jnp.asarray(_normal(1, 3, 1, 4))
    got = np.asarray(layers.rotate(x, rotation))[0, :, 0]
    pairs = np.asarray(x)[0, :, 0, :2] + 1j * np.asarray(x)[0, :, 0, 2:]
    turned = pairs * np.exp(1j * np.array([0, 1, 5])[:, None] * np.array([1.0, 0.1]))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-6)


def test_bias_gradient_of_many_bfloat16_tokens_is_summed_in_float32():
    rng = np.random.default_rng(0)
    grad = jnp.asarray(1 + 0.1 * rng.normal(size=(4, 16_384, 2, 3)), jnp.bfloat16)
    y, bias = jnp.zeros_like(grad), jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    out, vjp = jax.vjp(layers.add_bias, y, bias)
    np.testing.assert_array_equal(out[3, 7], bias.astype(jnp.bfloat16))
    dy, dbias = jax.jit(vjp)(grad)
    np.testing.assert_array_equal(dy, grad)
    assert dbias.dtype == jnp.float32
    np.testing.assert_allclose(dbias, np.asarray(grad, np.float64).sum((0, 1)), rtol=1e-6)
