"""int8 matrices: their rounding, their products, and which matrices they are."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.models import decoder, experts, layers
from luspo_jax.models.decoder_config import read_config
from luspo_jax.models.experts import expert_mlp
from luspo_jax.models.forward import Forward
from luspo_jax.models.quantised import Quantised, activation_type, quantise
from tests.models import expert_cases
from tests.rollout import int8_cases, rollout_cases

MODELS = int8_cases.MODELS
PICTURES = read_config(pathlib.Path(__file__).parent / "vision_goldens" / "untied")


def _paths(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, Quantised | tuple)
    )
    return {"/".join(key.key for key in path): leaf for path, leaf in flat}


# What is rounded, and how.


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_those_of_numpy_and_others_stay(name):
    model = MODELS[name]
    params = int8_cases.params(model)
    got = _paths(decoder.cast(params, "int8"))
    axes = _paths(decoder.param_axes(model))
    rounded = {path for path, leaf in got.items() if isinstance(leaf, Quantised)}
    assert rounded == {path for path in axes if int8_cases.is_matrix(path, model)}
    for path, original in _paths(params).items():
        if path in rounded:
            values, scales = int8_cases.rounded(np.asarray(original), path, axes[path])
            np.testing.assert_array_equal(got[path].values, values)
            np.testing.assert_allclose(got[path].scales, scales, rtol=1e-6)
            assert (got[path].values.dtype, got[path].scales.dtype) == (jnp.int8, jnp.float32)
        else:
            kind = jnp.float32 if "router" in path else jnp.bfloat16
            np.testing.assert_array_equal(got[path], jnp.asarray(original, kind))
            assert got[path].dtype == kind


@pytest.mark.parametrize("name", MODELS)
def test_no_entry_is_off_by_more_than_half_a_step(name):
    model = MODELS[name]
    params, axes = int8_cases.params(model), _paths(decoder.param_axes(model))
    got, originals = _paths(decoder.cast(params, "int8")), _paths(params)
    for path, leaf in got.items():
        if isinstance(leaf, Quantised):
            steps = int8_cases.along(np.asarray(leaf.scales, np.float64), path, axes[path])
            off = np.abs(np.asarray(originals[path], np.float64) - leaf.values * steps)
            assert (off <= steps * (0.5 + 1e-4)).all()
            assert np.abs(leaf.values).max() == 127


def test_channels_of_zeros_and_of_what_is_no_number():
    kernel_DF = jnp.zeros((4, 3)).at[1, 1].set(jnp.nan).at[2, 2].set(jnp.inf)
    got = quantise(kernel_DF, (-2,))
    assert not np.asarray(got.values)[:, 0].any()
    products_F = np.asarray(layers.project(jnp.ones((1, 4)), got))[0]
    assert products_F[0] == 0
    assert np.isnan(products_F[1:]).all()  # not hidden: the engine refuses it


def test_a_second_cast_changes_nothing():
    once = decoder.cast(int8_cases.params(MODELS["dense, tied"]), "int8")
    twice = decoder.cast(once, "int8")
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("model", [*MODELS.values(), PICTURES], ids=[*MODELS, "images"])
def test_shapes_and_axes_are_those_of_what_is_made(model):
    made = jax.eval_shape(lambda tree: decoder.cast(tree, "int8"), decoder.abstract_params(model))
    expected = decoder.abstract_params(model, jnp.int8)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    axes = decoder.param_axes(model, jnp.int8)
    named = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    assert [len(one) for one in named] == [x.ndim for x in jax.tree.leaves(made)]
    if model.vision is not None:
        kinds = {x.dtype for x in jax.tree.leaves(made["vision"])}
        assert kinds == {jnp.dtype("bfloat16")}


def test_a_kernel_that_it_does_not_know_is_refused_by_name():
    params = {"layers": {"mixer": {"state": {"kernel": jnp.ones((1, 2, 3))}}}, "head": jnp.ones(2)}
    with pytest.raises(ValueError, match="int8 covers no kernel 'layers/mixer/state/kernel'"):
        decoder.cast(params, "int8")


def test_activations_are_bfloat16():
    kinds = ("int8", "bfloat16", "float32")
    assert [activation_type(kind) for kind in kinds] == ["bfloat16", "bfloat16", "float32"]


# Products.


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("bfloat16", 0.004)])
@pytest.mark.parametrize(("shape", "contracted"), [((32, 4, 8), 1), ((4, 8, 32), 2), ((32, 5), 1)])
def test_products_are_those_with_the_rounded_matrix(shape, contracted, dtype, most):
    rng = np.random.default_rng(0)
    summed = shape[:contracted]
    x = jnp.asarray(rng.standard_normal((2, 3, *summed)), dtype)
    kernel = rng.standard_normal(shape).astype(np.float32)
    axes = tuple(range(-len(shape), contracted - len(shape)))
    got = quantise(jnp.asarray(kernel), axes)
    y = layers.project(x, got, contracted)
    assert y.dtype == dtype
    steps = np.asarray(got.scales, np.float64)
    whole = np.asarray(got.values, np.float64) * steps.reshape((1,) * contracted + steps.shape)
    want = np.tensordot(np.asarray(x.astype(jnp.float32), np.float64), whole, contracted)
    off = np.abs(np.asarray(y.astype(jnp.float32), np.float64) - want).max()
    assert off < most * np.abs(want).max()


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("mesh", [None, {"data": 4, "tensor": 2}], ids=str)
def test_an_embedding_is_looked_up_as_its_rounded_rows(mesh):
    table_VD = np.random.default_rng(0).standard_normal((10, 6)).astype(np.float32)
    rounded = quantise(jnp.asarray(table_VD), (-1,))
    layout = mesh and sharding.layout("rollout", mesh, jax.devices())
    tokens_BT = np.random.default_rng(1).integers(0, 10, (8, 3)).astype(np.int32)
    got = jax.jit(lambda table, tokens: layers.embed(table, tokens, jnp.float32, layout))(
        rounded, tokens_BT
    )
    want = np.asarray(rounded.values, np.float64) * np.asarray(rounded.scales)[:, None]
    np.testing.assert_allclose(got, want[tokens_BT], rtol=1e-6)


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_rounded_head(tied):
    model = MODELS["dense, tied" if tied else "dense, untied"]
    params = decoder.cast(int8_cases.params(model), "int8")
    hidden_BD = jax.random.normal(jax.random.key(1), (5, model.embed_dim))
    got = decoder.logits(params, hidden_BD, how=Forward(model))
    head = params["embedding" if tied else "head"]
    whole = np.asarray(head.values, np.float64) * np.asarray(head.scales)[:, None]
    want = np.asarray(hidden_BD, np.float64) @ whole.T
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


EXPERTS_ON = {
    "few tokens": (None, (3,), 8, "reference"),  # picked
    "many tokens": (None, (40,), 4, "reference"),
    "blocks": (None, (40,), 4, "blocks"),
    "a prompt": (None, (2, 9), 4, "reference"),
    "spread": ({"data": 2, "expert": 4}, (8,), 8, "reference"),
    "spread and cut": ({"data": 2, "expert": 2, "tensor": 2}, (8,), 8, "blocks"),
    "a prompt, spread": ({"data": 2, "expert": 2, "tensor": 2}, (8, 3), 8, "reference"),
}


@pytest.mark.parametrize("case", EXPERTS_ON)
def test_experts_are_those_of_the_dense_formula_with_rounded_kernels(case):
    mesh, lead, E, implementation = EXPERTS_ON[case]
    layout = mesh and sharding.layout("rollout", mesh, jax.devices())
    rng = np.random.default_rng(0)
    shapes = [(E, 16, 8), (E, 16, 8), (E, 8, 16)]
    kernels = [jnp.asarray(rng.standard_normal(s) / np.sqrt(s[1]), jnp.float32) for s in shapes]
    rounded = tuple(quantise(kernel, (-2,)) for kernel in kernels)
    x = rng.standard_normal((*lead, 16)).astype(np.float32)
    weights = rng.random((*lead, 1)).astype(np.float32)
    ids = rng.integers(0, E, (*lead, 1)).astype(np.int32)
    whole = [np.asarray(k.values, np.float32) * np.asarray(k.scales)[:, None] for k in rounded]
    want = expert_cases.mixture(ids, x, weights, whole)
    if case == "few tokens":
        assert experts._is_small(ids, rounded, implementation, layout)
    run = jax.jit(lambda *arrays: expert_mlp(*arrays, implementation, layout))
    assert expert_cases.worst(run(x, ids, weights, rounded), want) < 1e-5
    out = run(x.astype(jnp.bfloat16), ids, weights, rounded)
    assert out.dtype == jnp.bfloat16
    assert expert_cases.worst(np.asarray(out, np.float32), want) < 0.03


def test_a_family_of_every_kind_is_covered():
    """Each switch of a decoder that adds or renames a matrix."""
    base = rollout_cases.config(model_type="qwen2")
    for fields in ({"qkv_bias": True, "out_bias": True}, {"qk_norm": True}, {"qkv_bias": False}):
        model = dataclasses.replace(base, **fields)
        assert decoder.abstract_params(model, "int8")["layers"]["attention"]
