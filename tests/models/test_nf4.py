"""NF4 against a NumPy transcription, and against what bitsandbytes rounds the same matrix to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.models import nf4


def _reference(w, block=nf4.BLOCK):
    """W [in, out], an output at a time: nearest level of each share of a block's largest."""
    levels = np.asarray(nf4.LEVELS, np.float32)
    out = np.empty_like(w)
    for column in range(w.shape[1]):
        for start in range(0, w.shape[0], block):
            part = w[start : start + block, column]
            largest = np.abs(part).max() or np.float32(1)
            nearest = np.abs((part / largest)[:, None] - levels[None]).argmin(axis=1)
            out[start : start + block, column] = levels[nearest] * np.abs(part).max()
    return out


@pytest.mark.parametrize("inputs", [64, 128, 100, 7])
def test_it_is_the_nearest_level_of_each_block(inputs):
    w = np.random.default_rng(inputs).normal(size=(inputs, 5)).astype(np.float32)
    w[:, 2] = 0
    made = nf4.quantise(jnp.asarray(w), 1, 0)
    assert made.values.dtype == jnp.uint4
    assert made.largest.shape == (-(-inputs // 64), 5)
    np.testing.assert_array_equal(nf4.dense(made), _reference(w))


def test_stacked_matrices_of_several_axes():
    w = np.random.default_rng(1).normal(size=(3, 10, 8, 2, 3)).astype(np.float32)
    made = nf4.quantise(jnp.asarray(w), 2, 1)
    assert made.largest.shape == (3, 2, 2, 3)
    for got, layer in zip(np.asarray(nf4.dense(made)), w, strict=True):
        expected = _reference(layer.reshape(80, 6)).reshape(layer.shape)
        np.testing.assert_array_equal(got, expected)


def test_rounding_twice_changes_nothing():
    w = jnp.asarray(np.random.default_rng(2).normal(size=(128, 4)), jnp.float32)
    once = nf4.dense(nf4.quantise(w, 1, 0))
    np.testing.assert_array_equal(nf4.dense(nf4.quantise(once, 1, 0)), once)


def test_it_is_what_bitsandbytes_computes():
    torch = pytest.importorskip("torch", reason="parity needs torch and bitsandbytes")
    functional = pytest.importorskip("bitsandbytes.functional")
    w = np.random.default_rng(3).normal(size=(96, 128)).astype(np.float32)  # torch's [out, in]
    codes, state = functional.quantize_4bit(torch.tensor(w), blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(codes, state).numpy()
    ours = jax.jit(lambda x: nf4.dense(nf4.quantise(x, 1, 0)))(jnp.asarray(w.T))
    np.testing.assert_array_equal(np.asarray(ours).T, theirs)
