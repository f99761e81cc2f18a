"""One optimizer step: what it must not depend on, and what it does with a broken gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.learner import optimizer, state
from luspo_jax.learner.logprobs import LogprobRule, of_responses, row_logprobs
from luspo_jax.learner.plan import one_a_row
from luspo_jax.learner.state import UpdateRule
from luspo_jax.learner.step import update_step
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.objectives.presets import used_hyperparameters
from luspo_jax.rollout.compile_clock import CompileClock
from tests import row_cases

MODEL = DecoderConfig(
    model_type="qwen3",
    vocab_size=19,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    qkv_bias=False,
    qk_norm=True,
    tie_embeddings=True,
    max_position=64,
)
# With b1 = 0 the first moment is the gradient itself, exactly: that is what is compared.
PLAIN = optimizer.adamw(b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0)
LOGPROBS = LogprobRule(Forward(MODEL), head_chunk_tokens=16)
LOGPROBS64 = LogprobRule(Forward(MODEL, "float64"), head_chunk_tokens=16)
# One that averages sequences and one that averages tokens; tests/objectives has them all, without
# the model.
PRESETS = ["luspo", "dapo"]


@pytest.fixture(scope="module")
def params():
    return decoder.init_params(jax.random.key(0), MODEL)


def _responses(seed=0, order=None, filtered=False, entropy=False):
    """Eight responses in two groups, with old, reference and sampler log-probs.

    `filtered` leaves two without gradient, as the overlong filter does; `entropy` adds entropies of
    the old policy.
    """
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 19, size=rng.integers(1, 4)) for _ in range(8)]
    responses = [rng.integers(1, 19, size=rng.integers(1, 9)) for _ in range(8)]
    noise = [rng.normal(size=(3, len(r))) for r in responses]
    advantages, groups = rng.normal(size=8), np.repeat([4, 9], 4)
    order = np.arange(8) if order is None else order
    found = {
        "prompts": [prompts[i] for i in order],
        "responses": [responses[i] for i in order],
        "advantages": advantages[order],
        "groups": groups[order],
        "masks": [
            np.full(len(responses[i]), not (filtered and i in (1, 6))) for i in order
        ],
    }  # fmt: skip
    for kind, name in enumerate(("old_logprobs", "ref_logprobs", "sampler_logprobs")):
        found[name] = [(-2.9 + 0.3 * noise[i][kind]).astype(np.float32) for i in order]
    if entropy:
        drawn = np.random.default_rng(2)
        each = [drawn.uniform(0.5, 3, size=len(r)).astype(np.float32) for r in responses]
        found["old_entropy"] = [each[i] for i in order]
    return found


def _batch(length=14, microbatches=1, plan=None, changes=None, **which):
    """The responses laid one a row, or as `plan(prompts, responses)` lays them."""
    found = _responses(**which) | (changes or {})
    prompts, responses = found.pop("prompts"), found.pop("responses")
    if plan is None:
        laid = row_cases.plan_of(prompts, responses, width=length, microbatches=microbatches)
    else:
        laid = plan(prompts, responses)
    return row_cases.batch_of(MODEL, laid, prompts, responses, **found)


@pytest.fixture
def params64(x64, params):
    """The same weights in float64, where rounding cannot be mistaken for a difference."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)


def _rule(name="luspo", max_grad_norm=0.0, logprobs=LOGPROBS, **fields):
    # Wide clips and a KL term, so that every part of the loss carries gradient.
    wide = {"clip_low": 0.9, "clip_high": 0.9, "kl_coef": 0.1} | fields
    return UpdateRule(logprobs, objectives.preset(name, **wide), PLAIN, max_grad_norm)


def _step(params, batch, rule):
    start = state.initial_state(params, rule)
    new, metrics = update_step(start, batch, np.float32(1.0), rule=rule)
    return jax.device_get((new.opt_state[0].mu, metrics))


def _assert_same(got, expected, tolerance=1e-6):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        scale = max(np.abs(b).max(), 1e-12)
        assert np.abs(a - b).max() <= tolerance * scale, jax.tree_util.keystr(path)


def _variants():
    order = np.random.default_rng(5).permutation(8)
    return {
        "micro-batches": _batch(microbatches=4),
        "padding, row order, micro-batches": _batch(length=17, order=order, microbatches=2),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_step_does_not_depend_on_microbatches_padding_or_row_order(params64, name):
    expected, metrics = _step(params64, _batch(), _rule(name, logprobs=LOGPROBS64))
    for batch in _variants().values():
        got, got_metrics = _step(params64, batch, _rule(name, logprobs=LOGPROBS64))
        _assert_same(got, expected, 1e-9)
        for key, (total, count) in metrics.items():
            np.testing.assert_allclose(got_metrics[key][0], total, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(got_metrics[key][1], count, rtol=1e-6)


@pytest.mark.parametrize("plan", ["one a row", "dense"])
def test_a_step_computes_the_log_probs_of_the_reference_that_rows_lack(params64, plan):
    """In its own micro-batches; the reference is another policy than the one that is updated."""
    lay = {} if plan == "dense" else {"microbatches": 4}
    rule = _rule(logprobs=LOGPROBS64)
    start = state.initial_state(params64, rule)
    moved = jax.tree.map(lambda x: x * 2, start.ref_params)
    start = dataclasses.replace(start, ref_params=moved)
    batch = _batch(plan=_dense() if plan == "dense" else None, **lay)
    values = row_logprobs(moved, batch.rows, rule=LOGPROBS64)
    own, parts = batch.responses, batch.rows.num_microbatches
    cut = [
        np.split(np.asarray(x), parts)
        for x in (values.logprobs_RT, own.starts_B, own.response_mask_BT)
    ]
    ref_BT = np.concatenate([of_responses(*part, None) for part in zip(*cut, strict=True)])
    given = dataclasses.replace(batch, responses=dataclasses.replace(own, ref_logprobs_BT=ref_BT))
    lacks = dataclasses.replace(batch, responses=dataclasses.replace(own, ref_logprobs_BT=None))
    found = []
    for each in (given, lacks):
        copy = jax.tree.map(jnp.copy, start)
        new, metrics = update_step(copy, each, np.float32(1.0), rule=rule)
        found.append(jax.device_get((new.opt_state[0].mu, metrics)))
        np.testing.assert_array_equal(new.ref_params["embedding"], moved["embedding"])
    _assert_same(found[1][0], found[0][0], 1e-9)
    total, count = found[1][1]["actor/kl_loss"]
    assert total / count > 1e-3
    np.testing.assert_allclose(total, found[0][1]["actor/kl_loss"][0], rtol=1e-6)


def test_a_step_of_rounded_products_is_the_step_up_to_their_rounding(params):
    rounded = dataclasses.replace(LOGPROBS, how=Forward(MODEL, products="bfloat16"))
    exact, _ = _step(params, _batch(), _rule())
    found, _ = _step(params, _batch(), _rule(logprobs=rounded))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        scale = np.linalg.norm(b)
        assert np.linalg.norm(a - b) <= 0.03 * scale
    embeddings = found["embedding"] - exact["embedding"]
    assert np.abs(embeddings).max() > 1e-5 * np.abs(exact["embedding"]).max()


def test_responses_that_start_a_step_have_their_own_old_policy(params64):
    """Whatever stands in the place of their old log-probs; others keep theirs."""
    rule, batch = _rule(logprobs=LOGPROBS64), _batch(microbatches=2)
    own = batch.responses
    alone = dataclasses.replace(batch, responses=dataclasses.replace(own, old_logprobs_BT=None))
    starts_B = np.ones(len(own.starts_B), bool)
    marked = dataclasses.replace(own, starts_step_B=starts_B)
    expected, _ = _step(params64, alone, rule)
    found, metrics = _step(params64, dataclasses.replace(batch, responses=marked), rule)
    _assert_same(found, expected, 1e-9)
    assert metrics["actor/ppo_kl"][0] == 0
    unmarked = dataclasses.replace(own, starts_step_B=~starts_B)
    found, _ = _step(params64, dataclasses.replace(batch, responses=unmarked), rule)
    expected, _ = _step(params64, batch, rule)
    _assert_same(found, expected, 1e-9)


def test_step_does_not_depend_on_empty_rows(params64):
    def padded(prompts, responses):
        lengths = row_cases.lengths_of(prompts, responses)
        return one_a_row(lengths, width=14, rows_per_microbatch=12, num_rows=12)

    rule = _rule(logprobs=LOGPROBS64)
    expected, _ = _step(params64, _batch(), rule)
    _assert_same(_step(params64, _batch(plan=padded), rule)[0], expected, 1e-9)


def test_invariances_in_float32_up_to_rounding(params):
    """The same in the type that runs use; sums in another order round at most this much."""
    expected, _ = _step(params, _batch(), _rule())
    for batch in _variants().values():
        _assert_same(_step(params, batch, _rule())[0], expected, 3e-6)


def test_gradient_is_that_of_the_loss_over_whole_rows(params64):
    """Against autodiff through the model with log_softmax over whole logits."""
    batch, rule = _batch(), _rule("luspo", logprobs=LOGPROBS64)
    mask, tokens = batch.responses.response_mask_BT, batch.rows.tokens_RT
    lengths = mask.sum(1)

    def whole(params):
        hidden = decoder.hidden_states(
            params,
            tokens,
            batch.rows.positions_RT,
            batch.rows.segment_ids_RT,
            how=Forward(MODEL, "float64"),
        )
        logp = jax.nn.log_softmax(hidden @ decoder.head_kernel(params).T)[:, :-1]
        logp = jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
        logp = jnp.where(mask, jnp.pad(logp, ((0, 0), (1, 0))), 0.0)
        log_s = jnp.sum(jnp.where(mask, logp - batch.responses.old_logprobs_BT, 0.0), 1) / lengths
        s = jnp.exp(log_s)
        advantages_B = batch.responses.advantages_B
        policy = -jnp.minimum(s * advantages_B, jnp.clip(s, 0.1, 1.9) * advantages_B)
        d = jnp.where(mask, batch.responses.ref_logprobs_BT - logp, 0.0)
        kl = jnp.sum(jnp.where(mask, jnp.exp(d) - d - 1, 0.0), 1)
        return jnp.mean(policy * lengths + 0.1 * kl)

    value, grads = jax.value_and_grad(whole)(params64)
    got, metrics = _step(params64, batch, rule)
    # The old log-probs are float32 inputs, and the rotation has float32 angles on both sides.
    _assert_same(got, jax.device_get(grads), 1e-9)
    assert np.isfinite(value)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["actor/grad_norm"][0], norm, rtol=1e-6)


def test_other_tokens_than_scored_ones_do_not_matter(params):
    batch = _batch()
    expected, _ = _step(params, batch, _rule())
    junk = np.where(batch.rows.segment_ids_RT == 0, 7, batch.rows.tokens_RT).astype(np.int32)
    changed = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, tokens_RT=junk))
    got, _ = _step(params, changed, _rule())
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_old_logprobs_may_be_left_out_on_policy(params):
    batch = _batch()
    found = row_logprobs(params, batch.rows, rule=LOGPROBS)
    logprobs_BT = np.asarray(found.logprobs_RT)  # one response a row
    given = _with(batch, old_logprobs_BT=logprobs_BT)
    left_out = _with(batch, old_logprobs_BT=None)
    _assert_same(_step(params, left_out, _rule())[0], _step(params, given, _rule())[0], 1e-6)


def _with(batch, **fields):
    return dataclasses.replace(batch, responses=dataclasses.replace(batch.responses, **fields))


def test_logprobs_do_not_depend_on_microbatches(params):
    one, two = (row_logprobs(params, _batch(microbatches=n).rows, rule=LOGPROBS) for n in (1, 4))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_non_finite_gradient_changes_nothing_but_the_count(params):
    batch = _batch()
    broken = np.array(batch.responses.advantages_B)
    broken[2] = np.nan
    rule = _rule()
    start = state.initial_state(params, rule)
    before = jax.device_get((start.params, start.opt_state))
    new, metrics = update_step(start, _with(batch, advantages_B=broken), np.float32(1.0), rule=rule)
    jax.tree.map(np.testing.assert_array_equal, (new.params, new.opt_state), before)
    assert int(new.skipped_updates) == 1
    assert float(metrics["actor/skipped_updates"][0]) == 1


def test_gradient_clipping_and_its_rate(params):
    _, free = _step(params, _batch(), _rule())
    norm = float(free["actor/grad_norm"][0])
    _, tight = _step(params, _batch(), _rule(max_grad_norm=norm / 2))
    assert float(tight["actor/grad_clip_rate"][0]) == 1
    np.testing.assert_allclose(tight["actor/grad_norm"][0], norm, rtol=1e-6)
    _, wide = _step(params, _batch(), _rule(max_grad_norm=norm * 2))
    assert float(wide["actor/grad_clip_rate"][0]) == 0


def test_batch_without_any_response_token_takes_a_zero_step(params):
    masks = [np.zeros(len(r), bool) for r in _responses()["responses"]]
    grads, metrics = _step(params, _batch(changes={"masks": masks}), _rule())
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads))
    assert all(np.isfinite(x) for pair in metrics.values() for x in pair)


def test_reference_refresh_is_a_copy_or_an_average(params):
    rule = _rule()
    begun = state.initial_state(params, rule)
    moved = dataclasses.replace(begun, params=jax.tree.map(lambda x: x + 1.0, params))
    copied = state.refresh_reference(jax.tree.map(jnp.copy, moved), decay=0.0)
    averaged = state.refresh_reference(jax.tree.map(jnp.copy, moved), decay=0.75)
    start = params["embedding"]
    np.testing.assert_allclose(copied.ref_params["embedding"], start + 1.0, rtol=1e-6)
    np.testing.assert_allclose(averaged.ref_params["embedding"], start + 0.25, rtol=1e-5)
    assert state.initial_state(params, _rule(kl_coef=0.0)).ref_params is None


def test_bfloat16_steps_follow_float32(params):
    """Under float32 master weights; the gradient points the same way."""
    expected, _ = _step(params, _batch(), _rule())
    logprobs = dataclasses.replace(LOGPROBS, how=Forward(MODEL, "bfloat16"))
    got, metrics = _step(params, _batch(), _rule(logprobs=logprobs))
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (got, expected)]
    assert flat[0].dtype == np.float32
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert cosine > 0.99
    assert np.isfinite(metrics["actor/grad_norm"][0])


# ---------------------------------------------------------------- packed rows


def _dense(row_length=16, rows_at_once=2, **changes):
    """A plan of dense rows, as `_batch` takes it."""

    def plan(prompts, responses):
        sizes = {"pack": row_length, "rows_at_once": rows_at_once}
        laid = row_cases.plan_of(prompts, responses, width=14, **sizes)
        return dataclasses.replace(laid, **changes)

    return plan


def _everything(params, batch, rule):
    """Gradient, parameters after the step, and metrics."""
    start = state.initial_state(params, rule)
    new, metrics = update_step(start, batch, np.float32(1.0), rule=rule)
    return jax.device_get(((new.opt_state[0].mu, new.params), metrics))


def _assert_same_step(params, batch, other, rule, tolerance):
    expected, metrics = _everything(params, batch, rule)
    got, got_metrics = _everything(params, other, rule)
    assert max(np.abs(g).max() for g in jax.tree.leaves(expected[0])) > 0
    _assert_same(got, expected, tolerance)
    for key, (total, count) in metrics.items():
        scale = max(abs(total), 1e-3)  # sums of differences near 0 are not known better
        assert abs(got_metrics[key][0] - total) <= max(tolerance, 1e-6) * scale, key
        np.testing.assert_allclose(got_metrics[key][1], count, rtol=1e-6, err_msg=key)


# The order of rows, how many share a micro-batch, and which lie together: none of it matters.
PLACEMENTS = {
    "row by row": {"row_length": 16, "rows_at_once": 1},
    "all in one row": {"row_length": 112, "rows_at_once": 1},
    "one a row": {"row_length": 14, "rows_at_once": 8, "rows_B": np.arange(8)[::-1].copy(),
                  "starts_B": np.zeros(8, int), "places_B": np.arange(8), "num_microbatches": 1,
                  "responses_per_microbatch": 8},
}  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_packed_step_is_the_same_step(params64, placement):
    order = np.random.default_rng(6).permutation(8)
    packed = _batch(plan=_dense(**PLACEMENTS[placement]), order=order)
    rule = _rule("luspo", logprobs=LOGPROBS64)
    _assert_same_step(params64, _batch(), packed, rule, 1e-9)


def _shared(row_length, rows_at_once):
    """A plan of dense rows that hold equal prompts once."""

    def plan(prompts, responses):
        sizes = {"pack": row_length, "rows_at_once": rows_at_once, "share": True}
        laid = row_cases.plan_of(prompts, responses, width=14, **sizes)
        assert (laid.shared_B > 0).sum() >= 6
        return laid

    return plan


# A group in a row; several; groups cut into parts, each with a prompt of its own.
@pytest.mark.parametrize(
    ("name", "sizes", "gathers"),
    [("luspo", (28, 1), False), ("luspo", (112, 1), True), ("luspo", (20, 2), True),
     ("dapo", (20, 2), False), ("dapo", (28, 1), True)],
)  # fmt: skip
def test_a_step_that_shares_prompts_is_the_same_step(params64, name, sizes, gathers):
    groups = np.repeat([0, 1], 4)
    asked = [np.arange(3, 8), np.arange(5, 9)]
    changes = {"prompts": [asked[group] for group in groups]}
    rule = _rule(name, logprobs=LOGPROBS64)
    own = _batch(changes=changes)
    shared = _batch(changes=changes | {"gathers": gathers}, plan=_shared(*sizes))
    assert (shared.rows.sequences is not None) == gathers
    _assert_same_step(params64, own, shared, rule, 1e-9)


@pytest.mark.parametrize("placement", ["row by row", "all in one row"])
def test_gathered_attention_makes_the_same_step(params64, placement):
    gathered = _batch(plan=_dense(**PLACEMENTS[placement]), changes={"gathers": True})
    assert gathered.rows.sequences.trunk_width == 0
    rule = _rule("luspo", logprobs=LOGPROBS64)
    _assert_same_step(params64, _batch(), gathered, rule, 1e-9)


# Each reads arrays that the other does not: corrections, entropies of the whole minibatch; tokens
# or sequences in the denominator; other rows of a group in the length scale.
TERMS = {
    "dapo": {"entropy_coef": 0.01, "correction": "tis+geometric-mask"},
    "grpo": {"correction": "binary-kl+m2po", "binary_kl_max": 0.01, "m2po_max": 0.1},
    "luspo": {"top_entropy_quantile": 0.5, "length_scale": "relative-group"},
}


@pytest.mark.parametrize("name", TERMS)
def test_packed_step_with_every_term_and_filtered_responses(params64, name):
    which = {"filtered": True, "entropy": True}
    rule = _rule(name, logprobs=LOGPROBS64, **TERMS[name])
    packed = _batch(plan=_dense(), **which)
    _assert_same_step(params64, _batch(**which), packed, rule, 1e-9)


def test_masks_of_far_tokens_drop_some_of_that_step(params64):
    """Else the test above would say nothing about them."""
    rule = _rule("grpo", logprobs=LOGPROBS64, **TERMS["grpo"])
    for alone in ("binary-kl", "m2po"):
        one = dataclasses.replace(
            rule, objective=dataclasses.replace(rule.objective, correction=alone)
        )
        dropped, count = _step(params64, _batch(), one)[1]["rollout_corr/masked_fraction"]
        assert 0.05 * count < dropped < 0.95 * count


def test_ages_are_measured_and_change_nothing_else(params64):
    """Of tokens of several ages in one response, however it is laid out."""
    rule = _rule("luspo", logprobs=LOGPROBS64)
    expected, metrics = _step(params64, _batch(filtered=True), rule)
    drawn = np.random.default_rng(3)
    ages = [drawn.integers(0, 6, len(r)).astype(np.int32) for r in _responses()["responses"]]
    masks = _responses(filtered=True)["masks"]
    trained = np.concatenate([age[mask] for age, mask in zip(ages, masks, strict=True)])
    for plan, microbatches in ((None, 1), (None, 4), (_dense(), 1)):
        batch = _batch(filtered=True, plan=plan, microbatches=microbatches, changes={"ages": ages})
        got, measured = _step(params64, batch, rule)
        _assert_same(got, expected, 1e-9)
        for key, pair in metrics.items():
            np.testing.assert_allclose(measured.pop(key), pair, rtol=1e-6, atol=1e-9)
        assert {key.split("/")[0] for key in measured} == {"staleness"}
        for k in range(5):
            in_bin = (trained == k) if k < 4 else (trained >= 4)
            np.testing.assert_array_equal(
                measured[f"staleness/share/age_{k}"], (in_bin.sum(), len(trained))
            )


def test_packed_step_in_float32_up_to_rounding(params):
    _assert_same_step(params, _batch(), _batch(plan=_dense()), _rule(), 1e-6)


@pytest.mark.parametrize("name", sorted(objectives.PRESETS))
@pytest.mark.slow
def test_packed_step_is_the_same_under_every_preset(params64, params, name):
    wide = dict.fromkeys({"clip_low", "clip_high"} & set(_reads(name)), 0.9)
    objective = objectives.preset(name, kl_coef=0.1, **wide)
    batch, packed = (_batch(plan=plan, filtered=True) for plan in (None, _dense()))
    rule = _rule()
    exact = dataclasses.replace(rule, objective=objective, logprobs=LOGPROBS64)
    _assert_same_step(params64, batch, packed, exact, 1e-9)
    with jax.enable_x64(False):
        rule = dataclasses.replace(rule, objective=objective)
        _assert_same_step(params, batch, packed, rule, 1e-6)


def _reads(name):
    return used_hyperparameters(objectives.preset(name))


def test_packed_logprobs_are_those_of_rows_alone(params):
    found = _responses(filtered=True)
    prompts, responses, masks = (found[name] for name in ("prompts", "responses", "masks"))
    got = []
    for plan in (_dense(rows_at_once=1), lambda *pair: row_cases.plan_of(*pair, width=14)):
        laid = plan(prompts, responses)
        if laid.row_length != laid.width:  # and an empty micro-batch
            laid = dataclasses.replace(laid, num_microbatches=laid.used_microbatches + 1)
        rows = row_cases.rows_of(MODEL, laid, prompts, responses, masks=masks)
        values = row_logprobs(params, rows, rule=LOGPROBS)
        for x_RT in (values.logprobs_RT, values.entropy_RT):
            assert not np.asarray(x_RT)[~rows.response_mask_RT].any()
            got.append(np.concatenate(laid.take(np.asarray(x_RT))))
    assert np.abs(got[0]).max() > 1
    np.testing.assert_allclose(got[0], got[2], atol=2e-6)
    np.testing.assert_allclose(got[1], got[3], atol=2e-6)


def test_empty_microbatches_are_not_computed(params):
    """Where one is computed, embeddings of its padding reach the gradient: NaN times 0."""
    changes = {
        "prompts": [np.array([1, 2])] * 3,  # no padding in the rows that are not empty
        "responses": [np.full(14, 3)] * 3,
        "advantages": [1, -1, 0.5],
        "groups": [0, 0, 0],
        "masks": None,
    }
    untied = dataclasses.replace(MODEL, tie_embeddings=False)
    params = decoder.init_params(jax.random.key(0), untied)
    params["embedding"] = params["embedding"].at[0].set(jnp.nan)
    rule = _rule(kl_coef=0.0, logprobs=dataclasses.replace(LOGPROBS, how=Forward(untied)))
    prompts, responses = changes.pop("prompts"), changes.pop("responses")
    dense = row_cases.plan_of(prompts, responses, width=16, pack=16)
    dense = dataclasses.replace(dense, num_microbatches=6)
    alone = one_a_row(np.full(3, 16), width=16, rows_per_microbatch=1, num_rows=6)
    for plan in (dense, alone):
        batch = row_cases.batch_of(MODEL, plan, prompts, responses, **changes)
        assert (batch.rows.segment_ids_RT > 0).all(axis=1).sum() == 3
        grads, metrics = _step(params, batch, rule)
        assert float(metrics["actor/skipped_updates"][0]) == 0
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert all(np.isfinite(x) for pair in metrics.values() for x in pair)


def test_steps_between_which_parts_wait_on_the_host_compile_once(params):
    rule = _rule()
    now = state.parked(state.initial_state(params, rule), "both")
    counts = []
    for _ in range(2):
        with CompileClock() as clock:
            now = state.fetched(now, "both")
            now, _ = update_step(now, _batch(), np.float32(1.0), rule=rule)
        now = state.parked(now, "both")
        counts.append(clock.count)
    assert counts[1] == 0
