"""The adjoint form of length pressure on a transformer, against gradients taken the long way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.learner.logprobs import LogprobRule, microbatch_logprobs, of_responses
from luspo_jax.length import enumeration, pressure
from luspo_jax.length.pressure import Half
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from tests.row_cases import plan_of, rows_of

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
LOGPROBS = LogprobRule(Forward(MODEL, "float64"), head_chunk_tokens=16)
CHOSEN = tuple((n, objectives.preset(n)) for n in ("grpo", "gspo", "luspo", "dapo"))
TABLE = enumeration.world(num_prompts=2)
EDGES = (2, 5)


def compute(params, rows):
    """Log-probs of the responses of a piece of a half, one a row."""
    token_rows, starts_B, mask_BT = rows
    found = microbatch_logprobs(params, token_rows, rule=LOGPROBS)
    return of_responses(found.logprobs_RT, starts_B, mask_BT, None)


@pytest.fixture
def params(x64):
    params = decoder.init_params(jax.random.key(0), MODEL)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) * 3, params)


def _half(seed, *, length=16, order=None, trained=None, num_parts=1):
    """Eight responses to two prompts, right or wrong at random."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 19, size=3)] * 4 + [rng.integers(1, 19, size=2)] * 4
    responses = [rng.integers(1, 19, size=rng.integers(1, 10)) for _ in range(8)]
    rewards = rng.integers(0, 2, size=8).astype(np.float64)
    rewards[[0, 4]], rewards[[1, 5]] = 0, 1
    order = np.arange(8) if order is None else order
    pairs = [prompts[i] for i in order], [responses[i] for i in order]
    plan = plan_of(*pairs, width=length, microbatches=num_parts)
    mask_BT = plan.place([np.ones(len(r), bool) for r in pairs[1]])
    return Half(
        rows=(rows_of(MODEL, plan, *pairs), plan.place_one(plan.firsts_B), mask_BT),
        response_mask_BT=mask_BT,
        rewards_B=jnp.asarray(rewards[order]),
        group_ids_B=jnp.asarray(np.repeat([0, 1], 4)[order]),
        trained_B=None if trained is None else jnp.asarray(trained),
    )


def _measure(params, half_a, half_b, *, by=compute, names=("luspo", "dapo"), **options):
    chosen = [(name, objective) for name, objective in CHOSEN if name in names]
    run = jax.jit(
        lambda p, a, b: pressure.cross_fitted(
            by, p, a, b, objectives=chosen, bin_edges=EDGES, **options
        )
    )
    return jax.device_get(run(params, half_a, half_b))


@pytest.fixture
def table(x64):
    """A tabular policy: what does not concern the model compiles in no time with it."""
    logits = np.random.default_rng(0).normal(size=(TABLE.num_states, TABLE.vocab_size))
    return jnp.asarray(logits)


def _table_half(seed, *, trained=None):
    """Eight of the responses of a table, to two prompts; lengths and verdicts differ."""
    rng = np.random.default_rng(seed)
    index = np.concatenate([rng.choice(63, 4, replace=False) + 63 * k for k in range(2)])
    rows = jax.tree.map(lambda x: jnp.asarray(x[index]), TABLE.rows)
    return Half(
        rows=rows,
        response_mask_BT=rows.mask_BT,
        rewards_B=jnp.asarray([0.0, 1.0, 1.0, 0.0] * 2),
        group_ids_B=jnp.repeat(jnp.arange(2), 4),
        trained_B=None if trained is None else jnp.asarray(trained),
    )


def _measure_table(table, half_a, half_b):
    return _measure(
        table, half_a, half_b, by=enumeration.table_logprobs, names=[n for n, _ in CHOSEN]
    )


def _direction(params, half, weights_B):
    """∇ Σ a_i log π(y_i) by reverse mode."""
    return jax.grad(lambda p: jnp.vdot(weights_B, compute(p, half.rows).sum(axis=1)))(params)


def _weights(half, values_B):
    """a_i by hand: centred in the group, times n/(n − 1), over all responses."""
    values_B, ids = np.asarray(values_B, float), np.asarray(half.group_ids_B)
    a_B = np.zeros(len(ids))
    for group in np.unique(ids):
        rows = ids == group
        a_B[rows] = (values_B[rows] - values_B[rows].mean()) * rows.sum() / (rows.sum() - 1)
    return a_B / len(ids)


def _loss_gradient(params, half, objective):
    lengths_B = half.response_mask_BT.sum(axis=1)

    def loss(p):
        logprobs_BT = compute(p, half.rows)
        batch = objectives.PolicyBatch(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=jax.lax.stop_gradient(logprobs_BT),
            advantages_B=objectives.advantages(
                objective, half.rewards_B, half.group_ids_B, lengths_B
            ),
            response_mask_BT=half.response_mask_BT,
            length_scale_B=objectives.length_scales(objective, lengths_B, half.group_ids_B),
        )
        denominators = objectives.denominators(objective, half.response_mask_BT)
        return objectives.loss(objective, batch, denominators)[0]

    return jax.grad(loss)(params)


def _dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_it_is_the_inner_product_of_two_gradients(params):
    halves = _half(0), _half(1)
    found = _measure(params, *halves)
    for name in found:
        objective = dict(CHOSEN)[name]
        expected = {"length": 0.0, "reward": 0.0}
        for a, b in (halves, halves[::-1]):
            down = _loss_gradient(params, b, objective)
            for what, values_B in (
                ("length", a.response_mask_BT.sum(axis=1)),
                ("reward", a.rewards_B),
            ):
                up = _direction(params, a, _weights(a, values_B))
                expected[what] += -_dot(up, down) / 2
        np.testing.assert_allclose(found[name].length, expected["length"], rtol=1e-8)
        np.testing.assert_allclose(found[name].reward, expected["reward"], rtol=1e-8)
        assert abs(expected["length"]) > 1e-6


def test_parts_add_up(table):
    for p in _measure_table(table, _table_half(0), _table_half(1)).values():
        np.testing.assert_allclose(p.length_pos + p.length_neg, p.length, rtol=1e-10)
        np.testing.assert_allclose(p.length_bins.sum(), p.length, rtol=1e-10)
        np.testing.assert_allclose(p.gradient_share.sum(), 1, rtol=1e-10)


def test_it_does_not_depend_on_parts_padding_row_order_or_which_half_is_first(params):
    order = np.array([4, 1, 7, 0, 2, 6, 3, 5])
    plain = _measure(params, _half(0), _half(1))
    for other in (
        _measure(params, _half(0, num_parts=4), _half(1, num_parts=4), num_parts=4),
        _measure(params, _half(0, length=21), _half(1, length=21)),
        _measure(params, _half(0, order=order), _half(1, order=order)),
        _measure(params, _half(1), _half(0)),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), plain, other)


def test_gradient_share_on_policy_follows_the_weight_of_a_token(table):
    """GSPO and GRPO weigh each response alike, LUSPO each token: shares by hand from |A|·L^k."""
    half = _table_half(0)
    lengths_B = np.asarray(half.response_mask_BT.sum(axis=1))
    found = _measure_table(table, half, half)
    for name, power in (("grpo", 0), ("gspo", 0), ("luspo", 1)):
        objective = dict(CHOSEN)[name]
        advantages_B = objectives.advantages(
            objective, half.rewards_B, half.group_ids_B, jnp.asarray(lengths_B)
        )
        mass_B = np.abs(np.asarray(advantages_B)) * lengths_B.astype(float) ** power
        bins = np.searchsorted(EDGES, lengths_B, side="left")
        share = np.bincount(bins, weights=mass_B, minlength=3) / mass_B.sum()
        np.testing.assert_allclose(found[name].gradient_share, share, rtol=1e-9)


def test_at_the_end_of_a_step_clipped_responses_push_no_more(table):
    """Every ratio far outside the clip on the side where it is held: no pressure is left."""
    halves = _table_half(0), _table_half(1)
    drift = []
    for half in halves:
        sign_B = jnp.sign(half.rewards_B - 0.5)[:, None]
        start_BT = enumeration.table_logprobs(table, half.rows)
        drift.append(dataclasses.replace(half, end_logprobs_BT=start_BT + 0.5 * sign_B))
    found = _measure_table(table, *drift)
    for name, _ in CHOSEN:
        np.testing.assert_array_equal(found[f"{name}/end"].length, 0)
        np.testing.assert_array_equal(found[f"{name}/end"].mass, 0)
        assert found[name].mass > 0
    # Ratios that have not moved leave everything as at the start.
    still = [
        dataclasses.replace(half, end_logprobs_BT=enumeration.table_logprobs(table, half.rows))
        for half in halves
    ]
    found = _measure_table(table, *still)
    for name, _ in CHOSEN:
        np.testing.assert_allclose(found[f"{name}/end"].length, found[name].length, rtol=1e-9)


def test_untrained_responses_push_nothing_and_still_tell_where_lengths_come_from(table):
    trained = np.array([True, True, False, True] * 2)
    whole, partial = (
        _measure_table(table, _table_half(0), _table_half(1)),
        _measure_table(table, _table_half(0, trained=trained), _table_half(1, trained=trained)),
    )
    assert partial["luspo"].length != whole["luspo"].length
    half = _table_half(0, trained=trained)
    slope_BT, _ = pressure.coefficients(
        dict(CHOSEN)["luspo"], half, *[enumeration.table_logprobs(table, half.rows)] * 2
    )
    assert not np.asarray(slope_BT)[~trained].any()
    for weights in zip(
        pressure.length_and_reward_weights(half),
        pressure.length_and_reward_weights(_table_half(0)),
        strict=True,
    ):
        np.testing.assert_array_equal(*weights)


def test_extra_terms_of_an_objective_do_not_count(table):
    """Pressure is of the policy term: KL, entropy and corrections change nothing."""
    half, at_BT = _table_half(0), enumeration.table_logprobs(table, _table_half(0).rows)
    plain, _ = pressure.coefficients(objectives.preset("luspo"), half, at_BT, at_BT)
    rich = objectives.preset("luspo", kl_coef=0.1, entropy_coef=0.01, correction="tis")
    full, _ = pressure.coefficients(rich, half, at_BT, at_BT)
    np.testing.assert_array_equal(plain, full)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_update_taken_is_scored_along_the_same_direction(params, num_parts):
    change = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape)), params
    )
    run = jax.jit(lambda p, c, h: pressure.taken(compute, p, c, h, num_parts=num_parts))
    length, reward = run(params, change, _half(3, num_parts=num_parts))
    half = _half(3)
    lengths_B = half.response_mask_BT.sum(axis=1)
    for found, values_B in ((length, lengths_B), (reward, half.rewards_B)):
        expected = _dot(_direction(params, half, _weights(half, values_B)), change)
        np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_halves_take_turns_and_leave_an_odd_one_out():
    first, second = pressure.halves(np.array([7] * 4 + [3] * 5))
    assert sorted(first) == [0, 2, 4, 6]
    assert sorted(second) == [1, 3, 5, 7]


def test_a_group_too_small_to_halve_is_refused():
    with pytest.raises(ValueError, match="group of 3 responses is too small, 4 is the least"):
        pressure.halves(np.array([0, 0, 0, 0, 1, 1, 1]))
