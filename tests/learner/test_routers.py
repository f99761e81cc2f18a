"""Routers in training: replay, agreement, load, and the balancing loss; however a step is cut."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import objectives, sharding
from luspo_jax.learner import optimizer, routers
from luspo_jax.learner.logprobs import LogprobRule, microbatch_logprobs, row_logprobs
from luspo_jax.learner.rows import abstract, put
from luspo_jax.learner.state import UpdateRule, abstract_state, initial_state, param_shardings
from luspo_jax.learner.step import update_step
from luspo_jax.models import decoder
from luspo_jax.models.forward import Forward
from luspo_jax.objectives.presets import PRESETS, used_hyperparameters
from luspo_jax.types import ExpertIds
from tests.models import expert_cases as cases
from tests.models.expert_cases import MESHES, worst
from tests.row_cases import batch_of, plan_of, rows_of

MODEL = cases.config(num_layers=3, dense_layers=(0,))
L, E, K = MODEL.num_expert_layers, MODEL.num_experts, MODEL.experts_per_token
# With b1 = 0 the first moment is the gradient itself, exactly: that is what is compared.
PLAIN = optimizer.adamw(b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0)
B, T, COEF = 16, 24, 0.02


def _sequences(order=None):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 96, size=rng.integers(1, 6)) for _ in range(B)]
    responses = [rng.integers(1, 96, size=rng.integers(1, 18)) for _ in range(B)]
    order = np.arange(B) if order is None else order
    return [prompts[i] for i in order], [responses[i] for i in order]


def _plan(order=None, width=T, **cut):
    return plan_of(*_sequences(order), width=width, **cut)


@functools.partial(jax.jit, static_argnames="rule")
def _logprobs(params, rows, *, rule):
    return microbatch_logprobs(params, rows, rule=rule)


@functools.cache
def _recorded(model):
    """Ids [n, L, K] of each sequence, of two policies that are not quite the current one."""
    params, plan = cases.params(model), _plan()
    rule = LogprobRule(Forward(model), head_chunk_tokens=64)
    rows = rows_of(model, plan, *_sequences())
    with jax.enable_x64(False):
        return {
            name: plan.take(
                np.asarray(
                    _logprobs(
                        cases.with_other_routers(params, size), rows, rule=rule
                    ).router.expert_ids
                )
            )
            for name, size in (("sampler", 0.5), ("old", 0.2))
        }


def _batch(order=None, model=MODEL, recorded=("sampler", "old"), *, ids=None, masks=None, **cut):
    """16 responses in four groups, with the log-probs and experts of other policies."""
    rng = np.random.default_rng(1)
    noise = rng.random((3, B, T), np.float32)
    advantages, groups = rng.normal(size=B).astype(np.float32), np.repeat(np.arange(4), 4)
    order = np.arange(B) if order is None else order
    (prompts, responses), plan = _sequences(order), _plan(order, **cut)

    def ragged(values_BT):
        ends = [
            (i, len(p), len(p) + len(r)) for i, p, r in zip(order, prompts, responses, strict=True)
        ]
        return [-4 - values_BT[i, start:end] for i, start, end in ends]

    ids = {name: _recorded(model)[name] for name in recorded} if ids is None else ids
    ids = {name: plan.lay([known[i] for i in order]) for name, known in ids.items()}
    return batch_of(
        model,
        plan,
        prompts,
        responses,
        advantages=advantages[order],
        groups=groups[order],
        masks=masks,
        expert_ids=ExpertIds(**ids) if ids else None,
        old_logprobs=ragged(noise[0]),
        ref_logprobs=ragged(noise[1]),
        sampler_logprobs=ragged(noise[2]),
    )


PACKED = {"pack": 32, "rows_at_once": 2}


def _rule(name="luspo", *, model=MODEL, mesh=None, adam=PLAIN, **fields):
    """Fields of the rule, of its log-probs and of its objective."""
    own = {"max_grad_norm": 0.0, "router_aux_coef": 0.0}
    own |= {k: fields.pop(k) for k in own if k in fields}
    how = {k: fields.pop(k) for k in ("dtype", "remat") if k in fields}
    replay = fields.pop("replay", "none")
    layout = sharding.layout("train", MESHES[mesh], jax.devices()) if mesh else None
    how = Forward(model, layout=layout, **how)
    logprobs = LogprobRule(how, head_chunk_tokens=64, replay=replay)
    wide = dict.fromkeys({"clip_low", "clip_high"} & set(used_hyperparameters(PRESETS[name])), 0.9)
    objective = objectives.preset(name, **(wide | {"kl_coef": 0.1} | fields))
    return UpdateRule(logprobs, objective, adam, **own)


def _step(params, batch, rule):
    """(first moments, parameters after the step, metrics)."""
    state = initial_state(params, rule)
    batch = put(batch, rule.logprobs.how.layout)
    new, metrics = update_step(state, batch, np.float32(1e-6), rule=rule)
    return jax.device_get((new.opt_state[0].mu, new.params, metrics))


def _params64(model=MODEL):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), cases.params(model))


# ---------------------------------------------------------------- against a plain decoder


def _balance(probs_BTLE, ids_BTLK, real_BT):
    """`load_balancing_loss_func` of transformers of each layer by itself, mean over layers."""
    losses, num_experts = [], probs_BTLE.shape[-1]
    for layer in range(probs_BTLE.shape[2]):
        probs = probs_BTLE[:, :, layer][real_BT]
        mask = jax.nn.one_hot(ids_BTLK[:, :, layer][real_BT], num_experts)
        tokens_per_expert, prob_per_expert = mask.mean(0), probs.mean(0)
        losses.append((tokens_per_expert * prob_per_expert[None]).sum() * num_experts)
    return sum(losses) / len(losses)


@functools.partial(jax.jit, static_argnames=("model", "replay"))
def _plain(params, batch, model, replay):
    """(loss, gradients, (ids of the routers, probabilities, balance)) of LUSPO with the terms of
    `_rule`, by the plain decoder; f of the balance is of the ids that are used."""
    rows, responses, mask = batch.rows, batch.responses, batch.rows.response_mask_RT
    replayed = getattr(rows.expert_ids, replay) if replay != "none" else None
    lengths, advantages = mask.sum(1), responses.advantages_B

    def loss(params):
        hidden, ids, probs = cases.plain_forward(
            params, rows.tokens_RT, rows.positions_RT, rows.segment_ids_RT, model, replayed
        )
        logp = jax.nn.log_softmax(hidden @ params["embedding"].T)[:, :-1]
        logp = jnp.take_along_axis(logp, rows.tokens_RT[:, 1:, None], -1)[..., 0]
        logp = jnp.where(mask, jnp.pad(logp, ((0, 0), (1, 0))), 0.0)
        log_s = jnp.sum(jnp.where(mask, logp - responses.old_logprobs_BT, 0.0), 1) / lengths
        s = jnp.exp(log_s)
        policy = -jnp.minimum(s * advantages, jnp.clip(s, 0.1, 1.9) * advantages)
        d = jnp.where(mask, responses.ref_logprobs_BT - logp, 0.0)
        kl = jnp.sum(jnp.where(mask, jnp.exp(d) - d - 1, 0.0), 1)
        real = (rows.segment_ids_RT > 0)[..., None, None]
        used = rows.expert_ids.sampler if replay == "sampler" else rows.expert_ids.old
        hits = jnp.sum(jnp.where(real[..., None], jax.nn.one_hot(used, E), 0), (0, 1, 3))
        f = hits / jnp.sum(real)
        mass = jnp.sum(jnp.where(real, probs, 0), (0, 1)) / jnp.sum(real)
        balance = E * jnp.mean(jnp.sum(f * mass, -1))
        return jnp.mean(policy * lengths + 0.1 * kl) + COEF * balance, (ids, probs, balance)

    (value, found), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, grads, found


@pytest.mark.parametrize(
    "replay", ["sampler", *(pytest.param(r, marks=pytest.mark.slow) for r in ("none", "old"))]
)
def test_a_step_is_that_of_the_plain_decoder(x64, replay):
    """The recorded experts, weighed by the present router, which learns; and what is said of it."""
    batch, params = _batch(microbatches=2), _params64()
    rule = _rule(replay=replay, router_aux_coef=COEF, dtype="float64")
    got, _, metrics = _step(params, batch, rule)
    _, grads, (ids, probs, balance) = jax.device_get(_plain(params, batch, MODEL, replay))
    assert worst(got, grads) <= 1e-9
    router = got["layers_001"]["mlp"]["router"]["kernel"]
    assert np.abs(router).max() > 1e-3
    experts, real = batch.rows.expert_ids, batch.rows.segment_ids_RT > 0
    used = {"none": ids, "old": experts.old, "sampler": experts.sampler}[replay]
    assert (used[real] != ids[real]).any() == (replay != "none")
    np.testing.assert_allclose(metrics["router/aux_loss"][0], balance, rtol=1e-6)
    for name in ("sampler", "old"):
        recorded, shares = getattr(experts, name), []
        for b, t in np.argwhere(real):
            for layer in range(L):
                shares.append(len({*ids[b, t, layer]} & {*recorded[b, t, layer]}) / K)
        total, count = metrics[f"router/agreement/{name}_current"]
        assert count == real.sum()
        assert 0.3 < total / count < 0.95
        np.testing.assert_allclose(total / count, np.mean(shares), rtol=1e-6)
    loads = np.stack([np.bincount(used[real][:, i].ravel(), minlength=E) for i in range(L)])
    excess = loads / (real.sum() * K / E) - 1
    expected = {
        "max_violation": excess.max(1).mean(),
        "max_violation/worst_layer": excess.max(),
        "avg_violation": np.abs(excess).mean(),
        "max_violation/layer_01": excess[1].max(),
        "avg_violation/layer_00": np.abs(excess[0]).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"router/{name}"][0], value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(
        balance, _balance(probs, used if replay != "none" else experts.old, real), rtol=1e-6
    )


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_with_the_weights_that_recorded_agreement_is_exactly_one(packed):
    params, rows = cases.params(MODEL), _batch().rows
    rule = LogprobRule(Forward(MODEL), head_chunk_tokens=64)
    ids = np.asarray(_logprobs(params, rows, rule=rule).router.expert_ids)
    batch = _batch(ids={"sampler": _plan().take(ids)}, **(PACKED if packed else {}))
    real = rows.segment_ids_RT > 0
    rule = _rule(router_aux_coef=COEF)
    _, _, metrics = _step(params, batch, rule)
    assert metrics["router/agreement/sampler_current"] == (real.sum(), real.sum())
    # No record of the pass before the step: it is this one.
    assert metrics["router/agreement/sampler_old"] == (real.sum(), real.sum())
    assert metrics["router/agreement/old_current"] == (real.sum(), real.sum())
    # Of what is replayed nowhere, the loss is that of transformers.
    plain = jax.jit(cases.plain_forward, static_argnums=4)
    _, own, probs = plain(params, rows.tokens_RT, rows.positions_RT, rows.segment_ids_RT, MODEL)
    own = np.asarray(own)
    np.testing.assert_array_equal(own[real], ids[real])
    expected = _balance(np.asarray(probs), own, real)
    np.testing.assert_allclose(metrics["router/aux_loss"][0], expected, rtol=1e-5)


# ---------------------------------------------------------------- what a step must not depend on


def _filtered(**cut):
    """Without gradient of half of the responses, so that whole micro-batches score nothing."""
    masks = [np.full(len(r), i % 2 == 0) for i, r in enumerate(_sequences()[1])]
    return _batch(masks=masks, **cut)


CUTS = {
    "micro-batches": {"microbatches": 8},
    "padding": {"width": 31, "microbatches": 2},
    "packed, row by row": {"pack": 24, "rows_at_once": 1},
    "packed in long rows": {"pack": 70, "rows_at_once": 2},
}


@functools.cache
def _uncut(replay):
    rule = _rule(replay=replay, router_aux_coef=COEF, dtype="float64")
    return _step(_params64(), _filtered(), rule)


@pytest.mark.parametrize(
    "cut",
    [
        "packed, row by row",
        *(pytest.param(c, marks=pytest.mark.slow) for c in CUTS if c != "packed, row by row"),
    ],
)
def test_a_step_does_not_depend_on_how_it_is_cut(x64, cut):
    rule = _rule(replay="sampler", router_aux_coef=COEF, dtype="float64")
    moments, _, metrics = _step(_params64(), _filtered(**CUTS[cut]), rule)
    expected, _, expected_metrics = _uncut("sampler")
    assert worst(moments, expected) <= 1e-9
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-6, atol=1e-9, err_msg=name)


@pytest.mark.slow
def test_a_step_does_not_depend_on_the_order_of_rows(x64):
    rule = _rule(replay="old", router_aux_coef=COEF, dtype="float64")
    order = np.random.default_rng(3).permutation(B)
    expected, got = (_step(_params64(), _batch(order=o), rule) for o in (None, order))
    assert worst(got[0], expected[0]) <= 1e-9
    assert worst(got[2], expected[2]) <= 1e-5


def test_rows_without_a_record_are_routed_by_the_policy():

    def logprobs(replay, *recorded):
        rule = LogprobRule(Forward(MODEL), head_chunk_tokens=64, replay=replay)
        found = _logprobs(cases.params(MODEL), _batch(recorded=recorded).rows, rule=rule)
        return np.asarray(found.logprobs_RT)

    expected = logprobs("none")
    np.testing.assert_array_equal(logprobs("sampler"), expected)
    np.testing.assert_array_equal(logprobs("old", "sampler"), expected)
    assert np.abs(logprobs("sampler", "sampler") - expected).max() > 1e-2


@pytest.mark.parametrize(
    "name",
    [
        "dapo",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in sorted(PRESETS)
            # Segments are cut in the run, from the text of responses.
            if n != "dapo" and objectives.preset(n).ratio != "segment"
        ),
    ],
)
def test_the_balancing_loss_is_the_same_under_every_objective(x64, name):
    """What the coefficient adds to the gradient is the gradient of the loss, whatever else is."""
    params, batch = _params64(), _batch()
    rules = [
        _rule(name, router_aux_coef=coef, dtype="float64", max_response_length=17)
        for coef in (0.0, COEF)
    ]
    (without, _, _), (with_it, _, metrics) = (_step(params, batch, rule) for rule in rules)
    added = jax.tree.map(lambda a, b: (a - b) / COEF, with_it, without)
    loss, expected = _balance_alone()
    np.testing.assert_allclose(metrics["router/aux_loss"][0], loss, rtol=1e-6)
    for leaf, right, whole in zip(*map(jax.tree.leaves, (added, expected, with_it)), strict=True):
        rounding = 1e-14 * np.abs(whole).max() / COEF  # of the two gradients, also where it adds 0
        assert np.abs(leaf - right).max() <= 1e-9 * np.abs(right).max() + rounding


@functools.cache
def _balance_alone():
    """(loss, gradient), f being of the recorded experts and fixed."""
    rows = _batch().rows
    real = rows.segment_ids_RT > 0

    def loss(params):
        _, _, probs = cases.plain_forward(
            params, rows.tokens_RT, rows.positions_RT, rows.segment_ids_RT, MODEL
        )
        return _balance(probs, rows.expert_ids.old, real)

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(_params64()))


def test_without_a_coefficient_the_program_has_no_balancing_loss(monkeypatch):
    params, batch = cases.params(MODEL), _batch()

    def program(coef):
        plain = optimizer.adamw(b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0)  # one not traced yet
        rule = _rule(router_aux_coef=coef, adam=plain)
        state = initial_state(params, rule)
        return update_step.lower(state, batch, np.float32(0), rule=rule).as_text()

    off, on = program(0.0), program(COEF)
    monkeypatch.setattr(routers, "balance_weights", lambda *_, **__: None)
    assert off == program(0.0)
    assert off != on


# ---------------------------------------------------------------- meshes

STACK = cases.config()  # 5 layers with experts
ADAM = optimizer.adamw(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
_ON_MESHES = {"model": STACK, "adam": ADAM, "replay": "sampler", "router_aux_coef": COEF,
              "remat": "full"}  # fmt: skip
_FAST = {("fsdp 2, expert 4", False), ("data 2, expert 2, tensor 2", True)}


@functools.cache
def _one_device():
    return _step(cases.params(STACK), _batch(model=STACK, microbatches=2), _rule(**_ON_MESHES))


@pytest.mark.parametrize(
    ("mesh", "packed"),
    [
        pytest.param(mesh, packed, marks=[pytest.mark.slow] * ((mesh, packed) not in _FAST))
        for mesh in MESHES
        for packed in (False, True)
    ],
)
def test_a_step_on_a_mesh_is_that_of_one_device(mesh, packed):
    cut = {"pack": 32, "rows_at_once": 8} if packed else {"microbatches": 2}
    batch = _batch(model=STACK, **cut)
    got = _step(cases.params(STACK), batch, _rule(mesh=mesh, **_ON_MESHES))
    for name, a, b in zip(("moments", "params", "metrics"), got, _one_device(), strict=True):
        assert worst(a, b) <= 1e-5, name


@pytest.mark.parametrize(
    "mesh", ["fsdp 2, expert 4", pytest.param("fsdp 8", marks=pytest.mark.slow)]
)
def test_no_collective_makes_the_experts_of_all_devices(mesh):
    """Over the expert axis tokens travel; over fsdp, one layer's experts at a time."""
    rule = _rule(mesh=mesh, **_ON_MESHES)
    state = abstract_state(rule)
    batch = abstract(_batch(model=STACK, microbatches=2), rule.logprobs.how.layout)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    text = update_step.lower(state, batch, number, number, rule=rule).compile().as_text()
    found = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all)(?:-start)?\(", text)
    shapes = [
        tuple(map(int, dims.split(",")))
        for result in found
        for dims in re.findall(r"\w\d+\[([\d,]+)\]", result)
    ]
    layer = {(E, 32, 16), (E, 16, 32)}
    own = {(E // 4, *shape[1:]) for shape in layer}
    tokens = {s for s in shapes if T in s}  # and what was recorded of them
    assert not [s for s in shapes if STACK.num_layers in s and s not in tokens and len(s) > 2]
    if mesh == "fsdp 8":
        assert layer <= set(shapes)
    else:
        assert own <= set(shapes)
        assert max(np.prod(s) for s in shapes) < E * 32 * 16


# ---------------------------------------------------------------- the pass before the step


@pytest.mark.parametrize(
    ("mesh", "packed"),
    [
        ("expert 2, context 2, tensor 2", True),
        pytest.param("expert 2, context 2, tensor 2", False, marks=pytest.mark.slow),
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param(None, True, marks=pytest.mark.slow),
    ],
)
def test_what_row_logprobs_records_and_where_it_lies(mesh, packed):
    logprobs = _rule(model=STACK, mesh=mesh).logprobs
    cut = {"pack": 32, "rows_at_once": 4} if packed else {"microbatches": 4}
    plan, rows = _plan(**cut), _batch(model=STACK, recorded=("sampler",), **cut).rows
    params = cases.params(STACK)
    placed = jax.device_put(params, param_shardings(logprobs.how)) if mesh else params
    call = functools.partial(row_logprobs, placed, put(rows, logprobs.how.layout), rule=logprobs)
    assert call().router.expert_ids is None
    found = call(record_experts=True)
    ids = found.router.expert_ids
    assert ids.dtype == np.uint8
    # A share on each device; on every device, which is what log-probs are, would not fit.
    parts = logprobs.how.layout.size("batch") if mesh else 1
    assert ids.addressable_shards[0].data.size == ids.size // parts
    on_host = routers.sequence_ids(found.router, plan, logprobs.how.layout)
    uncut = _batch(model=STACK, recorded=("sampler",)).rows
    alone = _logprobs(params, uncut, rule=LogprobRule(Forward(STACK), head_chunk_tokens=64))
    expected = _plan().take(np.asarray(alone.router.expert_ids))
    assert len(on_host) == B
    jax.tree.map(np.testing.assert_array_equal, on_host, expected)
    shared = found.router.agreement["sampler"] / found.router.tokens
    expected = alone.router.agreement["sampler"] / alone.router.tokens
    np.testing.assert_allclose(shared, expected, rtol=1e-6)
    assert found.router.tokens == (uncut.segment_ids_RT > 0).sum()


# ---------------------------------------------------------------- refusals


def _with_experts(**ids):
    batch = _batch()
    rows = dataclasses.replace(batch.rows, expert_ids=ExpertIds(**ids))
    return dataclasses.replace(batch, rows=rows)


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        (
            (B, T, 3, K),
            np.uint8,
            r"expert_ids.old is \[16, 24, 3, 2\] and must be .* \[16, 24, 2, 2\]",
        ),
        ((B, T - 1, L, K), np.uint8, r"expert_ids.old is \[16, 23, 2, 2\]"),
        ((B, T, L, K), np.float32, r"expert_ids.old must hold expert ids, integers, not float32"),
    ],
)
def test_recorded_ids_of_another_shape_are_refused_by_name(shape, kind, message):
    batch = _with_experts(old=np.zeros(shape, kind))
    with pytest.raises(ValueError, match=message):
        _step(cases.params(MODEL), batch, _rule())
    with pytest.raises(ValueError, match=message.replace("expert_ids.old", "replayed_BTLK")):
        decoder.forward(
            cases.params(MODEL), batch.rows.tokens_RT, batch.rows.positions_RT,
            batch.rows.segment_ids_RT, how=Forward(MODEL), replayed_BTLK=batch.rows.expert_ids.old,
        )  # fmt: skip


def test_recorded_ids_of_a_dense_model_are_refused():
    dense = dataclasses.replace(
        MODEL, model_type="qwen3", num_experts=0, experts_per_token=0, expert_dim=0,
        norm_topk=False, dense_layers=(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"expert_ids.sampler is of a mixture of experts, and the"):
        _step(cases.params(dense), _batch(), _rule(model=dense))


def test_a_balancing_loss_without_recorded_experts_is_refused():
    with pytest.raises(ValueError, match=r"router_aux_coef > 0 needs the expert ids"):
        _step(cases.params(MODEL), _batch(recorded=()), _rule(router_aux_coef=COEF))
