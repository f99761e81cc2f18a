"""Low-rank adapters: forward pass and gradients against explicit W + s · A · B."""

import dataclasses
import pathlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.models import decoder, low_rank, vision
from luspo_jax.models.decoder_config import DecoderConfig, read_config
from luspo_jax.models.forward import Forward
from luspo_jax.models.layers import project
from luspo_jax.models.low_rank import Adapter, LowRank
from tests.models import expert_cases

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
    axes = decoder.param_axes(MODEL)
    base, made = low_rank.begun(jax.random.key(1), dict(params), axes, ADAPTER, None)
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


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_weights_are_freed_one_after_another_while_they_are_rounded(base, monkeypatch):
    params = decoder.init_params(jax.random.key(0), MODEL, jnp.bfloat16)
    alive = [weakref.ref(x) for x in jax.tree.leaves(params)]
    counts, freezing = [], low_rank._freezing

    def counted(*args):
        counts.append(sum(ref() is not None for ref in alive))
        return freezing(*args)

    monkeypatch.setattr(low_rank, "_freezing", counted)
    adapter = dataclasses.replace(ADAPTER, base=base)
    low_rank.begun(jax.random.key(1), params, decoder.param_axes(MODEL), adapter, None)
    assert counts == list(range(len(alive), 0, -1))
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("init", low_rank.INITS)
def test_how_an_adapter_begins(init):
    adapter = dataclasses.replace(ADAPTER, init=init, alpha=2.0, rslora=True)
    assert adapter.scale == pytest.approx(2 / 3**0.5)
    params = decoder.init_params(jax.random.key(0), MODEL)
    axes = decoder.param_axes(MODEL)
    base, made = low_rank.begun(jax.random.key(1), dict(params), axes, adapter, None)
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


@pytest.mark.parametrize("kind", ["int8", "nf4", "bfloat16"])
def test_frozen_weights_of_few_bits(kind):
    """The forward pass, its gradients and the hand-over all read the same rounded matrices."""
    adapter = dataclasses.replace(ADAPTER, base=kind, targets=("q_proj", "o_proj", "down_proj"))
    base, made = _made(adapter=adapter)
    how = Forward(MODEL, adapter=adapter)
    whole = decoder.whole_params(base, made, how)
    dense = low_rank.merged_tree(whole)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(dense))
    np.testing.assert_allclose(
        _logits(whole, how), _logits(dense, Forward(MODEL)), rtol=2e-5, atol=2e-5
    )
    exact = decoder.init_params(jax.random.key(0), MODEL)
    shift = _merged(jax.tree.map(jnp.zeros_like, exact), made, adapter.scale)
    error = {"int8": 1 / 254, "nf4": 0.16, "bfloat16": 2**-8}[kind]
    for name in ("query", "key", "out"):
        w, found, low = (
            np.asarray(tree["layers"]["attention"][name]["kernel"], np.float32)
            for tree in (exact, dense, shift)
        )
        off = np.abs(found - low - w).max()
        assert 0 < off <= error * np.abs(w).max() + 1e-6, name
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(2, 7, 19)), jnp.float32)
    got = jax.grad(
        lambda made: jnp.sum(_logits(decoder.whole_params(base, made, how), how) * weights)
    )(made)
    plain = dataclasses.replace(ADAPTER, targets=adapter.targets)
    rounded = low_rank.merged_tree(
        decoder.whole_params(base, jax.tree.map(jnp.zeros_like, made), how)
    )
    want = jax.grad(
        lambda made: jnp.sum(_logits(low_rank.composed(rounded, made, plain.scale), how) * weights)
    )(made)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * np.abs(b).max())


def test_shapes_and_axes_of_what_is_frozen():
    for kind in low_rank.BASES:
        adapter = dataclasses.replace(ADAPTER, base=kind)
        base, made = _made(adapter=adapter)
        how, axes = Forward(MODEL, adapter=adapter), decoder.param_axes(MODEL)
        abstract = low_rank.abstract_base(decoder.abstract_params(MODEL), axes, adapter)
        named = jax.tree.leaves(decoder.frozen_axes(how), is_leaf=lambda x: type(x) is tuple)
        for x, like, names in zip(
            jax.tree.leaves(base), jax.tree.leaves(abstract), named, strict=True
        ):
            assert (x.shape, x.dtype) == (like.shape, like.dtype)
            assert len(names) == x.ndim
        like = decoder.abstract_trained(how)
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda x: x.shape, like)


@pytest.mark.parametrize("kind", ["float32", "int8", "nf4"])
@pytest.mark.parametrize("experts", [True, False])
def test_experts_are_those_of_the_merged_matrices(kind, experts):
    model = expert_cases.config(4, 2, num_layers=2, dense_layers=(1,))
    adapter = dataclasses.replace(ADAPTER, base=kind, experts=experts)
    base, made = _made(model, adapter)
    of_experts = [p for p in low_rank.places(decoder.param_axes(model), adapter) if "mlp" in p]
    assert len(of_experts) == (6 if experts else 3)  # and of the dense layer
    how = Forward(model, adapter=adapter)
    whole = low_rank.merged_tree(decoder.whole_params(base, made, how))
    rounded = low_rank.merged_tree(
        decoder.whole_params(base, jax.tree.map(jnp.zeros_like, made), how)
    )
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(2, 7, 96)), jnp.float32)

    def ours(made):
        out = _logits(decoder.whole_params(base, made, how), how)
        return jnp.sum(out * weights), out

    def plainly(made):
        merged = low_rank.merged_tree(low_rank.composed(rounded, made, adapter.scale))
        return jnp.sum(_logits(merged, Forward(model)) * weights)

    (_, found), got = jax.value_and_grad(ours, has_aux=True)(made)
    np.testing.assert_allclose(found, _logits(whole, Forward(model)), rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.grad(plainly)(made)), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_an_image_tower_is_that_of_the_merged_matrices():
    model = read_config(pathlib.Path(__file__).parent / "vision_goldens" / "tied")
    adapter = dataclasses.replace(ADAPTER, vision=True)
    base, made = _made(model, adapter)
    assert set(made["vision"]) == {"blocks", "merger"}
    how, rng = Forward(model, adapter=adapter), np.random.default_rng(0)
    slots = 2 * model.vision.window_slots
    patches = rng.normal(size=(1, slots, np.prod(model.vision.patch_shape))).astype(np.float32)
    places = np.stack([np.arange(slots) // 4, np.arange(slots) % 4], axis=-1)[None]
    arrays = (patches, places.astype(np.int32), np.ones((1, slots), bool))
    weights = rng.normal(size=(1, slots // 4, model.embed_dim)).astype(np.float32)

    def ours(made):
        tower = decoder.whole_params(base, made, how)["vision"]
        out = vision.encode(tower, *arrays, how=how)
        return jnp.sum(out * weights), out

    def plainly(made):
        tower = low_rank.merged_tree(low_rank.composed(base, made, adapter.scale))["vision"]
        out = vision.encode(tower, *arrays, how=Forward(model))
        return jnp.sum(out * weights), out

    (_, found), got = jax.value_and_grad(ours, has_aux=True)(made)
    (_, expected), want = jax.value_and_grad(plainly, has_aux=True)(made)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(*(jax.tree.leaves(tree["vision"]) for tree in (got, want)), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
