"""Mixtures of experts against a dense formula: every expert computes every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.models import experts
from luspo_jax.models.experts import EXPERT_AXES, expert_mlp, route
from tests.models.expert_cases import MESHES, mixture, worst

D, F = 16, 8
IMPLEMENTATIONS = ("reference", "blocks")
# name: (E, K, how the tokens choose)
LOADS = {
    "random": (6, 2, "random"),
    "one has none": (6, 2, "not the third"),
    "one has all": (5, 1, "the fifth"),
    "all of them": (4, 4, "random"),
    "one each": (5, 1, "random"),
    "padding": (6, 2, "random, some none"),
    "all padding": (6, 2, "none"),
}
ROLLOUT_MESHES = {
    "expert 8": {"expert": 8},
    "data 2, expert 4": {"data": 2, "expert": 4},
    "data 2, expert 2, tensor 2": {"data": 2, "expert": 2, "tensor": 2},
    "data 4, tensor 2": {"data": 4, "tensor": 2},
}


def _ids(rng, lead, E, K, how):
    count = int(np.prod(lead))
    ids = np.argsort(rng.random((count, E)), axis=1)[:, :K]
    if how == "not the third":
        ids = np.argsort(rng.random((count, E - 1)), axis=1)[:, :K]
        ids = ids + (ids >= 2)
    elif how == "the fifth":
        ids = np.full((count, K), 4)
    elif how == "the first":  # and K − 1 others
        ids = np.concatenate([np.zeros((count, 1), int), 1 + ids[:, : K - 1] % (E - 1)], axis=1)
    elif how == "none":
        ids = np.full((count, K), E)
    elif how == "random, some none":
        ids[rng.random(count) < 0.4] = E
    return ids.reshape(*lead, K).astype(np.int32)


def _case(load, lead, dtype=np.float32, seed=0):
    """(ids, (x, weights, kernels), gradient of the result)."""
    E, K, how = LOADS.get(load, load)
    rng = np.random.default_rng(seed)
    shapes = [(E, D, F), (E, D, F), (E, F, D)]
    kernels = tuple(rng.standard_normal(s).astype(dtype) / np.sqrt(s[1]) for s in shapes)
    x = rng.standard_normal((*lead, D)).astype(dtype)
    weights = rng.random((*lead, K)).astype(dtype)
    ids = _ids(rng, lead, E, K, how)
    kernels = tuple(np.asarray(k, dtype) for k in kernels)
    return ids, (x, weights, kernels), rng.standard_normal(x.shape).astype(dtype)


def _ours(ids, x, weights, kernels, implementation="reference", layout=None):
    return expert_mlp(x, ids, weights, kernels, implementation, layout)


@functools.cache
def _ours_on(mesh, implementation):
    layout = sharding.layout("train", MESHES[mesh], jax.devices()) if mesh else None
    return _with_gradients(functools.partial(_ours, implementation=implementation, layout=layout))


@functools.cache
def _with_gradients(function):
    """(result, gradients) of function(ids, *inputs) for one gradient of the result."""

    @jax.jit
    def both(ids, inputs, grad):
        out, pull = jax.vjp(functools.partial(function, ids), *inputs)
        return out, pull(grad)

    return both


# ---------------------------------------------------------------- one device


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("load", LOADS)
def test_result_and_gradients_are_those_of_the_dense_formula(load, implementation):
    ids, inputs, grad = _case(load, (2, 9))
    expected = _with_gradients(mixture)(ids, inputs, grad)
    got = _ours_on(None, implementation)(ids, inputs, grad)
    assert worst(got, expected) <= 1e-5
    if load == "one has none":
        assert not any(np.any(np.asarray(d)[2]) for d in got[1][2])
    if load == "all padding":
        assert not any(np.any(x) for x in jax.tree.leaves(got))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("load", ["random", "padding"])
def test_exactly_so_in_float64(x64, load, implementation):
    ids, inputs, grad = _case(load, (2, 9), np.float64)
    expected = _with_gradients(mixture)(ids, inputs, grad)
    got = _ours_on(None, implementation)(ids, inputs, grad)
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype("float64")}
    assert worst(got, expected) <= 1e-12


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_near_and_kernels_keep_their_type(implementation):
    ids, (x, weights, kernels), grad = _case("padding", (3, 20))
    inputs = (x.astype(jnp.bfloat16), weights, kernels)
    ours = _ours_on(None, implementation)
    out, (dx, dweights, dkernels) = ours(ids, inputs, grad.astype(jnp.bfloat16))
    assert (out.dtype, dx.dtype, dweights.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert {d.dtype for d in dkernels} == {np.dtype("float32")}
    got = jax.tree.map(lambda a: np.asarray(a, np.float32), (out, (dx, dweights, dkernels)))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(got))
    assert worst(got, _with_gradients(mixture)(ids, (x, weights, kernels), grad)) <= 0.03


def _second(function):
    """Gradient of ⟨∇ Σ sin(out), v⟩: a backward pass through the backward pass."""

    @jax.jit
    def second(ids, inputs, along):
        def slope(inputs):
            grads = jax.grad(lambda i: jnp.sum(jnp.sin(function(ids, *i))))(inputs)
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, along)))

        return jax.grad(slope)(inputs)

    return second


@pytest.mark.parametrize("load", ["padding", pytest.param("one has all", marks=pytest.mark.slow)])
def test_second_derivatives_are_those_of_the_dense_formula(load):
    ids, inputs, _ = _case(load, (2, 9))
    along = _case(load, (2, 9), seed=1)[1]
    expected = _second(mixture)(ids, inputs, along)
    assert worst(_second(_ours)(ids, inputs, along), expected) <= 1e-5


@pytest.mark.parametrize("most", [7, 2**31 - 2])
def test_order_is_the_stable_argsort(most):
    """Where key and place fit in one number, and where they do not."""
    keys_A = np.random.default_rng(0).integers(0, 8, 50).astype(np.int32)
    order_A = experts._order(jnp.asarray(keys_A), most)
    np.testing.assert_array_equal(order_A, np.argsort(keys_A, kind="stable"))


# ---------------------------------------------------------------- routers


def _numpy_route(x, kernel, count, normalise):
    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    ids = np.argsort(-probs, axis=-1, kind="stable")[..., :count]
    weights = np.take_along_axis(probs, ids, -1)
    return probs, ids, weights / weights.sum(-1, keepdims=True) if normalise else weights


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("normalise", [True, False])
def test_route_in_numpy(normalise):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((3, 7, D), np.float32), rng.standard_normal((D, 6), np.float32)
    real = rng.random((3, 7)) < 0.7
    call = jax.jit(functools.partial(route, count=2, normalise=normalise))
    weights, routed, sent = call(x, kernel, real=real)
    probs, ids, expected = _numpy_route(x, kernel, 2, normalise)
    np.testing.assert_array_equal(routed.expert_ids, ids)
    assert routed.expert_ids.dtype == np.uint8
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    np.testing.assert_array_equal(sent, np.where(real[..., None], ids, 6))
    np.testing.assert_array_equal(routed.load_LE, np.bincount(ids[real].ravel(), minlength=6))
    np.testing.assert_allclose(routed.mass_LE, probs[real].sum(0), rtol=1e-5)


@pytest.mark.usefixtures("strict_dtypes")
def test_replayed_ids_are_sent_and_weighed_and_the_routers_own_are_recorded():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((3, 7, D), np.float32), rng.standard_normal((D, 6), np.float32)
    replayed = np.argsort(rng.random((3, 7, 6)), axis=-1)[..., :2].astype(np.uint8)
    call = jax.jit(functools.partial(route, count=2, normalise=True))
    weights, routed, sent = call(x, kernel, replayed=replayed)
    probs, ids, _ = _numpy_route(x, kernel, 2, True)
    np.testing.assert_array_equal(sent, replayed)
    np.testing.assert_array_equal(routed.expert_ids, ids)  # else agreement would be with itself
    expected = np.take_along_axis(probs, replayed.astype(int), -1)
    np.testing.assert_allclose(weights, expected / expected.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(routed.load_LE, np.bincount(replayed.ravel(), minlength=6))


def test_the_gradient_of_routing_is_that_of_the_dense_formula():
    """With ids fixed: of weights and of the mass, in the router and in x."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((3, 7, D), np.float32), rng.standard_normal((D, 6), np.float32)
    w_K, w_E = rng.standard_normal((3, 7, 2), np.float32), rng.standard_normal(6, np.float32)
    real = rng.random((3, 7)) < 0.7
    ids = _numpy_route(x, kernel, 2, True)[1]

    def ours(x, kernel):
        weights, routed, _ = route(x, kernel, count=2, normalise=True, real=real)
        return jnp.sum(weights * w_K) + jnp.sum(routed.mass_LE * w_E)

    def dense(x, kernel):
        probs = jax.nn.softmax(x @ kernel, axis=-1)
        weights = jnp.take_along_axis(probs, ids, -1)
        weights = weights / weights.sum(-1, keepdims=True)
        mass = jnp.sum(jnp.where(real[..., None], probs, 0), (0, 1))
        return jnp.sum(weights * w_K) + jnp.sum(mass * w_E)

    got, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, kernel) for f in (ours, dense))
    assert worst(got, expected) <= 1e-5


@pytest.mark.parametrize(("E", "kind"), [(256, np.uint8), (257, np.uint16)])
def test_ids_are_recorded_in_the_least_type(E, kind):
    x, kernel = np.eye(D, dtype=np.float32)[:1], np.zeros((D, E), np.float32)
    kernel[0, E - 1] = 5
    _, routed, _ = jax.jit(functools.partial(route, count=1, normalise=True))(x, kernel)
    assert routed.expert_ids.dtype == kind
    assert int(routed.expert_ids[0, 0]) == E - 1


# ---------------------------------------------------------------- meshes


def _on(sizes, table="train"):
    return sharding.layout(table, sizes, jax.devices())


def _placed(ids, inputs, layout):
    x, weights, kernels = inputs
    rows = ("batch", None) if x.ndim == 2 else ("batch", "length", None)
    ids, x, weights = (sharding.put(v, rows, layout) for v in (ids, x, weights))
    kernels = tuple(sharding.put(k, a, layout) for k, a in zip(kernels, EXPERT_AXES, strict=True))
    return ids, (x, weights, kernels)


@functools.cache
def _expected(load, lead):
    return jax.device_get(_with_gradients(mixture)(*_case(load, lead)))


SPREAD = {"even": (16, 2, "random"), "to one expert": (16, 2, "the first"),
          "some none": (16, 2, "random, some none")}  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "implementation"),
    [
        ("fsdp 2, expert 4", "blocks"),
        ("expert 2, context 2, tensor 2", "reference"),
        ("expert 8", "reference"),
        *(
            pytest.param(mesh, "reference", marks=pytest.mark.slow)
            for mesh in ("fsdp 8", "fsdp 2, expert 4", "data 2, expert 2, tensor 2")
        ),
    ],
)
def test_on_a_mesh_all_is_as_on_one_device(mesh, implementation):
    layout, ours = _on(MESHES[mesh]), _ours_on(mesh, implementation)
    for load in SPREAD:
        ids, inputs, grad = _case(SPREAD[load], (8, 24))
        got = jax.device_get(ours(*_placed(ids, inputs, layout), grad))
        assert worst(got, _expected(SPREAD[load], (8, 24))) <= 1e-5, load


@pytest.mark.parametrize(
    "mesh", ["fsdp 2, expert 4", pytest.param("expert 8", marks=pytest.mark.slow)]
)
def test_rounds_that_are_taken(mesh, monkeypatch):
    """One where the load is even, and as many as the fullest device needs where it is not."""
    layout, calls, real = _on(MESHES[mesh]), [], experts._rows_forward
    parts = layout.size("experts")

    def counted(x_CD, *args):
        jax.debug.callback(lambda: calls.append(x_CD.shape[0]))
        return real(x_CD, *args)

    monkeypatch.setattr(experts, "_rows_forward", counted)
    run, rounds = jax.jit(lambda ids, inputs: _ours(ids, *inputs, layout=layout)), {}
    for load in SPREAD:
        calls.clear()
        ids, inputs, _ = _case(SPREAD[load], (8, 24))
        jax.block_until_ready(run(*_placed(ids, inputs, layout)))
        jax.effects_barrier()
        # A device sends C = received / parts assignments to each other, in each round.
        room, (E, K, _) = calls[0] // parts, SPREAD[load]
        owner = ids.reshape(8, -1) * parts // E  # of each device's row; E itself: nobody
        most = [np.bincount(row, minlength=parts + 1)[:parts].max() for row in owner]
        # As many as the fullest of those that exchange with each other needs.
        needed = -(-np.array(most).reshape(-1, parts).max(axis=1) // room)
        assert len(calls) == parts * needed.sum()
        assert room < 24 * min(K, E // parts)  # else one round would hold all there can be
        rounds[load] = needed.max()
    assert rounds["to one expert"] > 1


@pytest.mark.slow
def test_second_derivatives_on_a_mesh():
    layout = _on({"fsdp": 2, "expert": 4})
    plain, ours = _second(mixture), _second(functools.partial(_ours, layout=layout))
    for load in ("even", "to one expert"):
        ids, inputs, _ = _case(SPREAD[load], (8, 6))
        along = _case(SPREAD[load], (8, 6), seed=1)[1]
        expected = plain(ids, inputs, along)
        got = ours(*_placed(ids, inputs, layout), _placed(ids, along, layout)[1])
        assert worst(got, expected) <= 1e-5


# ---------------------------------------------------------------- one token a row


@pytest.mark.parametrize(
    ("mesh", "implementation"),
    [
        (None, "blocks"),
        (None, "reference"),
        ("data 2, expert 2, tensor 2", "blocks"),
        ("data 4, tensor 2", "reference"),
        pytest.param("data 2, expert 4", "reference", marks=pytest.mark.slow),
        pytest.param("expert 8", "reference", marks=pytest.mark.slow),
    ],
)
def test_decoded_rows_are_those_of_the_dense_formula(mesh, implementation, monkeypatch):
    """By the kernels picked for few rows, sorted, or with rows seen by all that have experts."""
    layout, taken = _on(ROLLOUT_MESHES[mesh], "rollout") if mesh else None, set()

    def seen(name, function):
        return lambda *args: taken.add(name) or function(*args)

    for name in ("_picked", "_broadcast", "_exchanged"):
        monkeypatch.setattr(experts, name, seen(name, getattr(experts, name)))
    run = jax.jit(lambda ids, inputs: _ours(ids, *inputs, implementation, layout))
    plain = jax.jit(lambda ids, inputs: mixture(ids, *inputs))
    over_experts = layout is not None and layout.size("experts") > 1
    # The shapes are those of one program, so that which way is taken shows for the first.
    for rows, K, loads in ((64, 2, SPREAD.values()), (8, 1, [(16, 1, "random, some none")])):
        taken.clear()
        for load in loads:
            ids, inputs, _ = _case(load, (rows,))
            assert ids.shape[1] == K
            assert worst(run(*_placed(ids, inputs, layout)), plain(ids, inputs)) <= 1e-5
        few = "_picked" if rows == 8 and implementation != "blocks" else "_exchanged"
        assert taken == {"_broadcast" if over_experts else few}
