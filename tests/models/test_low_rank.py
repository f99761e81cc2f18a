"""Low-rank adapters: forward pass and gradients against explicit W + s · A · B."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.models import decoder, low_rank
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.models.layers import project
from luspo_jax.models.low_rank import Adapter, LowRank

MODEL = DecoderConfig(
    model_type="qwen2",
    vocab_size=19,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    tie_embeddings=False,
    max_position=64,
)
ADAPTER = Adapter(rank=3, alpha=5.0, base="float32")


def _made(model=MODEL, adapter=ADAPTER, seed=0):
    """Returns (base, adapter with B that is not zero), of random weights."""
    params = decoder.init_params(jax.random.key(seed), model)
    axes = decoder.param_axes(model)
    base, made = low_rank.begun(jax.random.key(seed + 1), params, axes, adapter, None)
    rng = np.random.default_rng(seed)
    shift = lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    return base, jax.tree.map(shift, made)


def _matrices(path):
    return 2 if path[-3:-1] == ("attention", "out") else 1


def _merged(base, made, scale):
    """W + s · A · B by NumPy in float64, layer by layer."""

    def walk(base, made, path):
        found = dict(base)
        for name, part in made.items():
            if name != "kernel":
                found[name] = walk(base[name], part, (*path, name))
                continue
            w, a, b = (np.asarray(x, np.float64) for x in (base[name], part["a"], part["b"]))
            layers = [
                w_l + scale * np.tensordot(a_l, b_l, axes=(-1, 0))
                for w_l, a_l, b_l in zip(w, a, b, strict=True)
            ]
            found[name] = jnp.asarray(np.stack(layers), jnp.float32)
        return found

    return walk(base, made, ())


def _logits(params, how, seed=3):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(1, 19, size=(2, 7)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (2, 7))
    hidden = decoder.hidden_states(params, tokens, positions, jnp.ones_like(tokens), how=how)
    return jnp.einsum("btd,vd->btv", hidden, decoder.head_kernel(params))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_forward_pass_and_gradients_are_those_of_the_merged_matrices(remat):
    base, made = _made()
    how = Forward(MODEL, remat=remat, adapter=ADAPTER)
    scale = 5.0 / 3
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(2, 7, 19)), jnp.float32)

    def ours(made):
        out = _logits(decoder.whole_params(base, made, how), how)
        return jnp.sum(out * weights), out

    dense = _merged(base, made, scale)
    plain = Forward(MODEL)
    (_, found), grads = jax.value_and_grad(ours, has_aux=True)(made)
    expected, pull = jax.vjp(lambda params: _logits(params, plain), dense)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    (of_dense,) = pull(weights)
    places = low_rank.places(decoder.param_axes(MODEL), ADAPTER)
    assert len(places) == 7
    for path in places:
        dw = np.asarray(low_rank.at(of_dense, path), np.float64)
        part, got = low_rank.at(made, path), low_rank.at(grads, path)
        c = _matrices(path)
        a, b = (np.asarray(part[name], np.float64) for name in "ab")
        for layer in range(2):
            n_in = int(np.prod(dw.shape[1 : 1 + c]))
            flat = dw[layer].reshape(n_in, -1)
            flat_a, flat_b = a[layer].reshape(n_in, -1), b[layer].reshape(3, -1)
            # d(s · A · B) = dW:  dA = s · dW · Bᵀ,  dB = s · Aᵀ · dW
            da, db = scale * flat @ flat_b.T, scale * flat_a.T @ flat
            size = max(np.abs(da).max(), np.abs(db).max())
            for name, want in (("a", da), ("b", db)):
                one = np.asarray(got[name][layer]).reshape(want.shape)
                np.testing.assert_allclose(one, want, rtol=1e-4, atol=1e-5 * size)


def test_an_adapter_that_begins_changes_nothing_and_b_has_a_gradient_everywhere():
    params = decoder.init_params(jax.random.key(0), MODEL)
    base, made = low_rank.begun(jax.random.key(1), params, decoder.param_axes(MODEL), ADAPTER, None)
    how = Forward(MODEL, adapter=ADAPTER)
    np.testing.assert_array_equal(
        _logits(decoder.whole_params(base, made, how), how), _logits(params, Forward(MODEL))
    )
    grads = jax.grad(
        lambda made: jnp.sum(_logits(decoder.whole_params(base, made, how), how) ** 2)
    )(made)
    for path, x in jax.tree_util.tree_leaves_with_path(grads):
        each = np.abs(np.asarray(x)).reshape(2, -1).max(axis=1)
        if path[-1].key == "b":
            assert (each > 0).all(), path
        else:
            assert (each == 0).all(), path  # B is zero


@pytest.mark.parametrize("contracted", [1, 2])
def test_a_frozen_kernel_has_no_gradient(contracted):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 5)[-2 - contracted :]), jnp.float32)
    inner = x.shape[x.ndim - contracted :]
    kernel = LowRank(
        *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (
            (*inner, 6), (*inner, 2), (2, 6)
        )),
        1.5,
    )  # fmt: skip
    grads = jax.grad(lambda k: jnp.sum(project(x, k, contracted) ** 2))(kernel)
    assert not np.asarray(grads.base).any()
    assert np.asarray(grads.a).any()
    assert np.asarray(grads.b).any()


@pytest.mark.parametrize("init", low_rank.INITS)
def test_how_an_adapter_begins(init):
    adapter = dataclasses.replace(ADAPTER, init=init, alpha=2.0, rslora=True)
    assert adapter.scale == pytest.approx(2 / 3**0.5)
    params = decoder.init_params(jax.random.key(0), MODEL)
    axes = decoder.param_axes(MODEL)
    base, made = low_rank.begun(jax.random.key(1), params, axes, adapter, None)
    for path, place in low_rank.places(axes, adapter).items():
        whole, rest = (np.asarray(low_rank.at(tree, path)) for tree in (params, base))
        a, b = (np.asarray(low_rank.at(made, path)[name]) for name in "ab")
        inputs, outputs = place.sizes(whole.shape)
        flat = (x.reshape(2, inputs, outputs) for x in (whole, rest))
        a, b = a.reshape(2, inputs, 3), b.reshape(2, 3, outputs)
        for w, left, a_l, b_l in zip(*flat, a, b, strict=True):
            if init != "pissa":
                np.testing.assert_array_equal(w, left)
                assert not b_l.any()
                assert a_l.std() == pytest.approx(
                    (inputs**-0.5 / 3**0.5) if init == "kaiming" else 1 / 3, rel=0.35
                )
                continue
            np.testing.assert_allclose(left + adapter.scale * a_l @ b_l, w, atol=1e-6)
            values = np.linalg.svd(w, compute_uv=False)
            np.testing.assert_allclose(
                np.linalg.svd(left, compute_uv=False)[: len(values) - 3], values[3:], atol=1e-6
            )


def test_the_merged_tree_is_the_composed_one():
    base, made = _made()
    expected = _merged(base, made, 5.0 / 3)
    found = low_rank.merged_tree(low_rank.composed(base, made, ADAPTER.scale))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected
    )
    assert not low_rank.is_composed(found)
