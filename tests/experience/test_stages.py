"""Stages between rewards and the update, each on responses made by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from luspo_jax import objectives
from luspo_jax.experience import stages
from luspo_jax.experience.groups import Rollouts
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.learner.policies import (
    PolicyLogprobs,
    laid,
    policy_logprobs,
    sequence_lengths,
)
from luspo_jax.learner.programs import LogprobPass, StepPrograms
from luspo_jax.learner.rows import Planner
from luspo_jax.learner.state import UpdateRule
from luspo_jax.metrics import StepMetrics
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.objectives import preset
from luspo_jax.types import TrainState
from tests.experience.experience_cases import FAILED, prompt
from tests.experience.experience_cases import group as _group

MODEL = DecoderConfig(
    model_type="qwen3", vocab_size=24, num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2,
    num_kv_heads=1, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6, qkv_bias=False, qk_norm=True,
    tie_embeddings=True, max_position=64,
)  # fmt: skip
VERSION = 5
LENGTHS = (4, 2, 3, 1, 6)  # of a group of two and one of three
LAYOUTS = {
    "one row at a time": {"rows_per_microbatch": 1},
    "all at once": {"rows_per_microbatch": 5},
    "few widths": {"rows_per_microbatch": 5, "num_buckets": 1},
    "dense": {"rows_per_microbatch": 1, "pack_length": 12},
}


def _rollouts(*, mixed=True):
    """The policy of the step sampled the first response, an older one the second, and both of the
    third; of the last, whose verdict failed, nothing is trained on, and of the third not all."""
    groups = [_group(0, [1, 0], list(LENGTHS[:2])), _group(1, [1, 0, FAILED], list(LENGTHS[2:]))]
    groups = [
        dataclasses.replace(group, prompt=prompt(i, tokens))
        for i, (group, tokens) in enumerate(zip(groups, ([7, 3], [9, 1, 4]), strict=True))
    ]
    rng = np.random.default_rng(0)
    versions = [np.full(n, VERSION, np.uint32) for n in LENGTHS]
    trained = [np.ones(n, bool) for n in LENGTHS]
    trained[4] = np.zeros(6, bool)
    if mixed:
        versions[1:3] = [np.uint32([4, 4]), np.uint32([3, 5, 5])]
        trained[2] = np.array([True, False, True])
    tokens = [rng.integers(MODEL.vocab_size, size=n).astype(np.int32) for n in LENGTHS]
    return Rollouts(groups, VERSION).enriched(versions=versions, trained=trained, tokens=tokens)


def _numbers(start):
    """A value for each token that says which response and token it is of."""
    return [np.float32(start + 100 * i + np.arange(n)) for i, n in enumerate(LENGTHS)]


def _found(*, experts=None):
    return PolicyLogprobs(_numbers(1000), _numbers(5000), experts, None)


# --- log-probs of the policy that starts the step ----------------------------------------------


def test_old_logprobs_are_the_samplers_where_another_policy_sampled():
    """Token by token: the trainer's where the policy that starts the step sampled."""
    rollouts = _rollouts()
    after = stages.with_old_logprobs(rollouts, _found())
    own, sampled = _numbers(1000), rollouts.column("logprobs")
    old = after.column("old_logprobs")
    np.testing.assert_array_equal(old[0], own[0])
    np.testing.assert_array_equal(old[1], sampled[1])
    np.testing.assert_array_equal(old[2], [sampled[2][0], own[2][1], own[2][2]])
    np.testing.assert_array_equal(old[3], own[3])
    np.testing.assert_array_equal(old[4], own[4])
    assert {x.dtype for x in old} == {np.dtype(np.float32)}
    assert after.column("old_entropy") == [None] * 5
    assert after.column("old_expert_ids") == [None] * 5
    for before, now in zip(rollouts.column("logprobs"), after.column("logprobs"), strict=True):
        assert before is now


def test_a_decoupled_old_policy_starts_the_step_for_every_token():
    """Its log-probs and its experts, whatever sampled a token; the sampler's stay beside them."""
    chosen = [
        np.full((len(p.tokens) + n, 1, 2), 9, np.uint8)
        for p, n in zip(_rollouts().prompts, LENGTHS, strict=True)
    ]
    rollouts = _rollouts()
    after = stages.with_old_logprobs(rollouts, _found(experts=chosen), old_policy="decoupled")
    for i, (old, own) in enumerate(zip(after.column("old_logprobs"), _numbers(1000), strict=True)):
        np.testing.assert_array_equal(old, own)
        assert old.dtype == np.float32
        np.testing.assert_array_equal(after.responses[i].old_expert_ids, chosen[i])
        np.testing.assert_array_equal(after.responses[i].logprobs, rollouts.responses[i].logprobs)


def test_without_an_earlier_policy_both_old_policies_are_one():
    rollouts = _rollouts(mixed=False)
    one, other = (
        stages.with_old_logprobs(rollouts, _found(), old_policy=name).column("old_logprobs")
        for name in ("behaviour", "decoupled")
    )
    for pair in zip(one, other, strict=True):
        np.testing.assert_array_equal(*pair)


def _step_loss(objective):
    """(loss, gradient, metric means, trained tokens) of all responses under an objective."""
    rng = np.random.default_rng(3)
    start, now = ([rng.normal(-2, 0.4, n).astype(np.float32) for n in LENGTHS] for _ in range(2))
    rollouts = _rollouts().enriched(
        logprobs=[rng.normal(-2, 0.4, n).astype(np.float32) for n in LENGTHS],
        advantage=[0.5, -0.5, 0.25, -0.25, 0.0],
    )
    found = PolicyLogprobs(start, [], None, None)
    rollouts = stages.with_old_logprobs(rollouts, found, old_policy=objective.old_policy)
    rows = stages.train_batch(rollouts, _planner(), np.arange(5), 12)[0].responses
    lengths_B = sequence_lengths(rollouts.prompts, rollouts.responses)
    mask_BT = rows.response_mask_BT
    denominators = objectives.denominators(
        objective, mask_BT, None, rows.old_logprobs_BT, rows.sampler_logprobs_BT
    )

    def loss(logprobs_BT):
        batch = objectives.PolicyBatch(
            logprobs_BT, rows.old_logprobs_BT, rows.advantages_B, mask_BT,
            np.ones(5, np.float32), sampler_logprobs_BT=rows.sampler_logprobs_BT,
            ages_BT=rows.ages_BT,
        )  # fmt: skip
        return objectives.loss(objective, batch, denominators)

    at_BT = jnp.asarray(_planner().plan(lengths_B, 12).place(now))
    (value, metrics), grad_BT = jax.value_and_grad(loss, has_aux=True)(at_BT)
    means = {k: float(v) for k, v in objectives.metric_means(metrics).items()}
    return float(value), np.asarray(grad_BT), means, mask_BT


@pytest.mark.parametrize("correction", ["none", "icepop"])
def test_old_policies_share_out_one_ratio(correction):
    """Unclipped and with ρ as it is, π/π_old · ρ is π/π_sampler of every token, whatever is old.

    Without ρ the ratio of a decoupled policy lacks what age has moved.
    """
    whole = {"icepop_low": 0.0, "icepop_high": 1e9} if correction == "icepop" else {}
    results = [
        _step_loss(preset("grpo_unclipped", old_policy=name, correction=correction, **whole))
        for name in ("behaviour", "decoupled")
    ]
    (value, grad_BT, means, mask_BT), (other, other_BT, other_means, _) = results
    # Half of the trained tokens are of earlier policies, ages 1 and 2.
    share = [means[f"staleness/share/age_{k}"] for k in range(5)]
    np.testing.assert_allclose(share, [6 / 9, 2 / 9, 1 / 9, 0, 0], rtol=1e-6)
    assert means["staleness/kl/age_1"] == 0
    assert means["staleness/ratio/age_1"] == pytest.approx(means["staleness/weight/age_1"])
    assert abs(other_means["staleness/kl/age_1"]) > 0.01
    assert other_means["staleness/ratio/age_1"] != pytest.approx(means["staleness/ratio/age_1"])
    for k in range(3):
        for name in ("weight", "ess"):  # against what sampled, of neither old policy
            key = f"staleness/{name}/age_{k}"
            assert other_means[key] == pytest.approx(means[key], rel=1e-6)
    if correction == "icepop":
        assert other == pytest.approx(value, rel=1e-5)
        np.testing.assert_allclose(other_BT, grad_BT, rtol=1e-5, atol=1e-7)
        return
    stale_BT = np.abs(other_BT - grad_BT) > 1e-4
    assert stale_BT.sum() == 3
    assert not stale_BT[~mask_BT].any()


def test_entropies_are_kept_where_the_objective_ranks_them():
    after = stages.with_old_logprobs(_rollouts(), _found(), keep_entropy=True)
    for got, expected in zip(after.column("old_entropy"), _numbers(5000), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_old_experts_are_the_samplers_where_another_policy_sampled():
    """And of a prompt wherever its response is not all of the policy that starts the step."""
    own = [
        np.full((size + n, 1, 2), 9, np.uint8)
        for size, n in zip((2, 2, 3, 3, 3), LENGTHS, strict=True)
    ]
    rollouts = _rollouts()
    rollouts = rollouts.enriched(
        expert_ids=[np.full((n, 1, 2), 1, np.uint8) for n in LENGTHS],
        prompt_expert_ids=[np.full((len(p.tokens), 1, 2), 2, np.uint8) for p in rollouts.prompts],
    )
    after = stages.with_old_logprobs(rollouts, _found(experts=own))
    ids = [x[:, 0, 0].tolist() for x in after.column("old_expert_ids")]
    assert ids == [[9] * 6, [2, 2, 1, 1], [2, 2, 2, 1, 9, 9], [9] * 4, [9] * 9]
    assert {x.dtype for x in after.column("old_expert_ids")} == {np.dtype(np.uint8)}


# --- what sampler and trainer differ in --------------------------------------------------------


def test_the_gap_is_of_trained_tokens_that_the_policy_sampled():
    rollouts = _rollouts()
    sampled = [x.copy() for x in rollouts.column("logprobs")]
    assert stages.largest_gap(rollouts, PolicyLogprobs(sampled, [], None, None)) == 0
    for response, token, counts in ((0, 3, True), (1, 0, False), (2, 0, False), (2, 1, False),
                                    (2, 2, True), (4, 5, False)):  # fmt: skip
        found = [x.copy() for x in sampled]
        found[response][token] += 0.25
        gap = stages.largest_gap(rollouts, PolicyLogprobs(found, [], None, None))
        assert gap == pytest.approx(0.25 if counts else 0)


def test_without_a_token_to_compare_there_is_no_gap():
    assert stages.largest_gap(Rollouts(_rollouts().groups, VERSION + 1), _found()) == 0


@pytest.mark.parametrize("gap", [0.6, float("nan"), float("inf")])
def test_a_gap_beyond_the_limit_is_refused(gap):
    stages.check_gap(0.5, 0.5)
    with pytest.raises(stages.MismatchError, match=r"nats .*more than rollout.mismatch_limit=0.5"):
        stages.check_gap(gap, 0.5)


# --- advantages --------------------------------------------------------------------------------


def test_advantages_are_formed_inside_groups_of_unequal_size():
    """Of those that count: the failed verdict leaves its group's mean, and has none."""
    after = stages.with_advantages(_rollouts(), preset("dr_grpo"), 12)
    np.testing.assert_allclose(after.advantages_B, [0.5, -0.5, 0.5, -0.5, 0])
    assert after.advantages_B.dtype == np.float32
    assert all(type(x) is float for x in after.column("advantage"))


def test_a_penalty_is_taken_from_each_reward():
    penalty_B = np.float32([0.2, 0.0, 0.0, 0.4, 7.0])
    after = stages.with_advantages(_rollouts(), preset("dr_grpo"), 12, penalty_B)
    np.testing.assert_allclose(after.advantages_B, [0.4, -0.4, 0.7, -0.7, 0], atol=1e-6)


@pytest.mark.parametrize("width", [9, 12, 64])
def test_kl_in_the_reward_is_of_trained_tokens_and_not_of_the_width(width):
    objective = preset("dr_grpo", kl_coef=0.1, kl_placement="reward", kl_estimator="k1")
    old, ref = ([np.full(n, x, np.float32) for n in LENGTHS] for x in (-1.0, -3.0))
    rollouts = _rollouts().enriched(old_logprobs=old, ref_logprobs=ref)
    after = stages.with_advantages(rollouts, objective, width)
    # 0.1 · 2 a trained token is taken: of 4 and 2, and of 2 and 1.
    rewards = np.array([1 - 0.8, 0 - 0.4, 1 - 0.4, 0 - 0.2])
    means = np.repeat([rewards[:2].mean(), rewards[2:].mean()], 2)
    np.testing.assert_allclose(after.advantages_B, [*(rewards - means), 0], atol=1e-6)


def _otb_rollouts():
    """Prompts of 2 and 3 tokens: the tokens of a group are compared by their number."""
    rng = np.random.default_rng(2)
    old = [-rng.gamma(1.0, 0.5, n).astype(np.float32) for n in LENGTHS]
    collision = [np.exp(2 * x) for x in old]
    sampler = [x + 0.3 * rng.standard_normal(len(x)).astype(np.float32) for x in old]
    return _rollouts().enriched(old_logprobs=old, old_collision=collision, logprobs=sampler)


@pytest.mark.parametrize("correction", ["none", "tis"])
def test_a_baseline_of_tokens_is_over_the_responses_that_go_on(correction):
    rollouts = _otb_rollouts()
    objective = preset("otb", correction=correction, advantage="otb")
    after = stages.with_advantages(rollouts, objective, 12)
    rewards = [1, 0, 1, 0]

    def energy(r):
        weight = 1 if correction == "none" else np.minimum(np.exp(r.old_logprobs - r.logprobs), 2)
        w = (1 - 2 * np.exp(r.old_logprobs) + r.old_collision) * weight**2
        return np.cumsum(np.where(r.trained, w, 0))

    energies = [energy(r) for r in rollouts.responses[:4]]
    trained = rollouts.column("trained")
    for i, group in ((0, (0, 1)), (1, (0, 1)), (2, (2, 3)), (3, (2, 3))):
        for t in range(LENGTHS[i]):
            on = [j for j in group if LENGTHS[j] > t and trained[j][t]]
            baseline = 0
            if len(on) > 1:
                weights = [energies[j][t] for j in on]
                baseline = np.dot(weights, [rewards[j] for j in on]) / sum(weights)
            expected = (rewards[i] - baseline) * trained[i][t]
            got = after.responses[i].token_advantages[t]
            assert got == pytest.approx(expected, abs=1e-5), (i, t)
        mean = after.responses[i].token_advantages.mean()
        assert after.responses[i].advantage == pytest.approx(mean)
    assert np.all(after.responses[4].token_advantages == 0)


def test_parts_are_taken_with_their_weights():
    rollouts = _rollouts()
    rewards = rollouts.column("reward")
    known = [
        dataclasses.replace(reward, parts={"right": reward.value, "short": short})
        for reward, short in zip(rewards, [0.0, 0.1, 0.3, 0.2, 0.0], strict=True)
    ]
    objective = preset("gdpo")
    weights = {"short": 0.5, "right": 1.0}
    after = stages.with_advantages(rollouts.enriched(reward=known), objective, 12, 0.0, weights)
    # Of two that differ each part is ±1/√2: right and short disagree, then agree.
    score = np.array([0.5, -0.5, 1.5, -1.5]) / np.sqrt(2)
    np.testing.assert_allclose(after.advantages_B[:4], score / score.std(ddof=1), rtol=2e-3)


def test_signs_that_control_of_length_turns_are_counted():
    """Of four that count: the second of a group right but long, and now worse than a wrong one."""
    assert stages.sign_reversal(_rollouts(), preset("dr_grpo"), {}) == {}
    rollouts = _rollouts()
    length = [-0.9, 0.4, 0.0, 0.0, 0.0]
    rewards = [
        dataclasses.replace(reward, value=reward.value + each, length=each)
        for reward, each in zip(rollouts.column("reward"), length, strict=True)
    ]
    after = stages.with_advantages(rollouts.enriched(reward=rewards), preset("dr_grpo"), 12)
    found = stages.sign_reversal(after, preset("dr_grpo"), {})
    assert found == {"length/sign_reversal": 0.5}
    shaped = preset("dr_grpo", advantage_shaping="qglas")
    after = stages.with_advantages(_rollouts(), shaped, 12)
    assert stages.sign_reversal(after, shaped, {}) == {"length/sign_reversal": 0.0}


def test_segments_begin_at_high_entropies_or_after_sentences():
    rollouts = _rollouts()
    assert stages.with_segments(rollouts, preset("luspo"), str) is rollouts
    entropies = [np.float32(np.arange(n)) for n in LENGTHS]
    found = stages.with_segments(
        rollouts.enriched(old_entropy=entropies), preset("hispo", segment_share=0.25), str
    )
    # Of the trained tokens 0 1 2 3, 0 1, 0 2, 0 the highest quarter is 2 and more.
    assert [list(np.flatnonzero(x)) for x in found.column("segment_starts")[:4]] == [
        [2, 3], [], [2], []
    ]  # fmt: skip
    texts = {3: "a", 5: " end.", 8: "x\ny", 2: "? "}
    tokens = [np.array(x, np.int32) for x in ([3, 5, 3, 8], [8, 3], [2, 3, 3], [5], [3] * 6)]
    found = stages.with_segments(
        rollouts.enriched(tokens=tokens), preset("sspo"), lambda ids: texts[int(ids[0])]
    )
    assert [list(np.flatnonzero(x)) for x in found.column("segment_starts")] == [
        [0, 2], [0, 1], [0, 1], [0], [0]
    ]  # fmt: skip


# --- batches of an update ----------------------------------------------------------------------


def _planner(*, num_buckets=4, rows_per_microbatch=5, **fields):
    return Planner(MODEL, 16, num_buckets, rows_per_microbatch, **fields)


def _full():
    """With everything that an objective may read."""
    return _rollouts().enriched(
        logprobs=_numbers(1000),
        old_logprobs=_numbers(2000),
        old_entropy=_numbers(3000),
        ref_logprobs=_numbers(4000),
        advantage=[0.5, -0.5, 0.25, -0.25, 0.0],
    )


NAMES = ("sampler_logprobs", "old_logprobs", "old_entropy", "ref_logprobs", "ages")


def _read(batch):
    """{tokens that are trained on: what the objective reads of them}.

    Places follow from `starts_B` and the alignment law, not from the plan that put them there.
    """
    rows, responses = batch.rows, batch.responses
    count, width = responses.response_mask_BT.shape
    at_once = count // rows.num_microbatches
    parts = rows.tokens_RT.reshape(rows.num_microbatches, -1)
    masks = rows.response_mask_RT.reshape(rows.num_microbatches, -1)
    segments = rows.segment_ids_RT.reshape(rows.num_microbatches, -1)
    found = {}
    for b in range(count):
        mask = responses.response_mask_BT[b]
        if not mask.any():
            continue
        flat = responses.starts_B[b] + np.arange(width)[mask]
        part = b // at_once
        assert masks[part][flat].all()
        assert len(set(segments[part][responses.starts_B[b] : flat[-1] + 1])) == 1
        key = (int(responses.group_ids_B[b]), *parts[part][flat].tolist())
        values = [getattr(responses, f"{name}_BT")[b][mask].tolist() for name in NAMES]
        found[key] = float(responses.advantages_B[b]), values
    assert sum(masks.sum() for masks in masks) == responses.response_mask_BT.sum()
    return found


def _expected(rollouts, chosen):
    found = {}
    for i in chosen:
        r, mask = rollouts.responses[i], rollouts.responses[i].trained
        if mask.any():
            key = (int(rollouts.group_ids_B[i]), *r.tokens[mask].tolist())
            fields = ("logprobs", *NAMES[1:-1])
            values = [getattr(r, name)[mask].tolist() for name in fields]
            found[key] = r.advantage, [*values, [VERSION - int(v) for v in r.versions[mask]]]
    return found


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4), (2, 3, 4, 0, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_says_of_each_token_what_is_known_of_it(layout, chosen):
    rollouts = _full()
    sizes = dict(LAYOUTS[layout])
    sizes["rows_per_microbatch"] = min(sizes["rows_per_microbatch"], len(chosen))
    planner = _planner(**sizes)
    batch, metrics = stages.train_batch(rollouts, planner, np.array(chosen), 12)
    assert _read(batch) == _expected(rollouts, chosen)
    assert batch.responses.response_mask_BT.shape[1] == 12
    assert batch.responses.advantages_B.dtype == np.float32
    assert bool(metrics) == ("pack_length" in sizes)


def test_a_batch_holds_no_more_than_the_stages_have_said():
    rollouts = _rollouts(mixed=False).enriched(advantage=[0.0] * 5)
    batch, metrics = stages.train_batch(rollouts, _planner(), np.arange(5), 12)
    for name in NAMES[1:]:
        assert getattr(batch.responses, f"{name}_BT") is None
    assert batch.rows.expert_ids is None
    assert metrics == {}


def test_ages_are_in_every_batch_of_a_step_that_trains_on_an_earlier_policy():
    """Also in a batch that has none of its tokens, so that shares are of the step."""
    rollouts = _rollouts().enriched(advantage=[0.0] * 5)
    batch, _ = stages.train_batch(rollouts, _planner(rows_per_microbatch=2), np.array([0, 3]), 12)
    assert batch.responses.ages_BT.dtype == np.int32
    assert batch.responses.ages_BT.shape == batch.responses.response_mask_BT.shape
    assert not batch.responses.ages_BT.any()


@pytest.mark.parametrize("trains", [False, True])
def test_an_earlier_policys_tokens_have_an_age_if_they_are_trained_on(trains):
    """The policy of the step before sampled two tokens of a response."""
    rollouts = _rollouts(mixed=False).enriched(advantage=[0.0] * 5)
    versions, mask = rollouts.column("versions"), rollouts.column("trained")
    versions[0] = np.uint32([VERSION - 1, VERSION - 1, VERSION, VERSION])
    mask[0] = np.array([trains, False, True, True])
    rollouts = rollouts.enriched(versions=versions, trained=mask)
    ages_BT = stages.train_batch(rollouts, _planner(), np.arange(5), 12)[0].responses.ages_BT
    if not trains:
        assert ages_BT is None
        return
    assert ages_BT[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]  # after a prompt of two
    assert not ages_BT[1:].any()


# --- together with a model ---------------------------------------------------------------------


@functools.cache
def _state():
    drawn = decoder.init_params(jax.random.key(0), MODEL)
    return TrainState(jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, drawn), (), jnp.int32(0))


def _old_logprobs(planner, order):
    """{response: its old log-probs}, groups and responses in another order."""
    rollouts = _rollouts()
    groups = [rollouts.groups[i] for i in order]
    groups = [dataclasses.replace(g, responses=g.responses[:: 1 - 2 * order[0]]) for g in groups]
    rollouts = Rollouts(groups, VERSION)
    parts = laid(planner, rollouts.prompts, rollouts.responses)
    one = LogprobPass("params", LogprobRule(Forward(MODEL), head_chunk_tokens=16))
    found = policy_logprobs(_state(), one, parts, planner)
    after = stages.with_old_logprobs(rollouts, found, keep_entropy=True)
    return {
        (int(i), r.sample_id): (r.old_logprobs, r.old_entropy)
        for i, r in zip([p.prompt_id for p in after.prompts], after.responses, strict=True)
    }


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_old_logprobs_do_not_depend_on_order_packing_or_microbatches(layout, order):
    expected = _old_logprobs(_planner(), (0, 1))
    found = _old_logprobs(_planner(**LAYOUTS[layout]), order)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        for got, want in zip(found[key], values, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5, err_msg=str(key))
    sampled = _rollouts().column("logprobs")
    np.testing.assert_array_equal(found[0, 1][0], sampled[1])  # an older policy's
    assert found[1, 0][0][0] == sampled[2][0]
    assert found[1, 0][0][1] == 0  # not trained on
    assert found[0, 0][0].all()


@pytest.mark.parametrize("check", [False, True], ids=["unchecked", "checked"])
@pytest.mark.parametrize("layout", ["one row at a time", "dense"])
def test_the_first_minibatch_needs_no_pass(layout, check):
    """Its update's own forward pass is the old policy's; a check reads it and keeps nothing."""
    rollouts = _rollouts(mixed=False)
    logprobs = LogprobRule(Forward(MODEL), head_chunk_tokens=16)
    rule = UpdateRule(logprobs, preset("grpo"), optax.sgd(1.0), 0.0)
    whole = StepPrograms(rule, minibatches=2, epochs=2)
    found, told = [], []
    for programs in (whole, StepPrograms(rule, minibatches=2)):
        metrics = StepMetrics()
        after, width = stages.with_logprobs(
            rollouts,
            _state(),
            programs,
            _planner(**LAYOUTS[layout]),
            metrics,
            1e9 if check else None,
        )
        found.append(after.column("old_logprobs"))
        told.append(metrics.values["rollout_corr/max_abs_diff"][0][0])
    assert found[1][:2] == [None, None]
    for got, want in zip(found[1][2:], found[0][2:], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    gaps = [
        np.abs(old - r.logprobs)[r.trained].max(initial=0)
        for old, r in zip(found[0], rollouts.responses, strict=True)
    ]
    assert max(gaps[:2]) > max(gaps[2:])  # or the next line could not tell
    np.testing.assert_allclose(told, [max(gaps), max(gaps[2:])], rtol=1e-4)
    after = after.enriched(advantage=[0.0] * 5)
    batch = stages.train_batch(after, _planner(rows_per_microbatch=1), np.arange(2), width)[
        0
    ].responses
    other = stages.train_batch(after, _planner(rows_per_microbatch=1), np.arange(2, 5), width)[
        0
    ].responses
    assert batch.starts_step_B[:2].all()
    assert not other.starts_step_B.any()
    assert other.old_logprobs_BT.any()


def test_a_check_of_the_first_minibatch_still_refuses():
    rollouts = _rollouts(mixed=False)
    wrong = [values - 50 * (i == 0) for i, values in enumerate(rollouts.column("logprobs"))]
    rule = UpdateRule(LogprobRule(Forward(MODEL)), preset("grpo"), optax.sgd(1.0), 0.0)
    programs = StepPrograms(rule, minibatches=2)
    with pytest.raises(stages.MismatchError):
        stages.with_logprobs(
            rollouts.enriched(logprobs=wrong),
            _state(),
            programs,
            _planner(rows_per_microbatch=1),
            StepMetrics(),
            40.0,
        )
