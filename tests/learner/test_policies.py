"""Log-probs of responses under a policy: what a pass says does not depend on how it is laid out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.learner.policies import laid, laid_rows, policy_logprobs, sequence_lengths
from luspo_jax.learner.programs import LogprobPass
from luspo_jax.learner.rows import Planner
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.rollout import Response
from luspo_jax.types import TrainState
from tests.models import expert_cases
from tests.row_cases import Prompt

DENSE = DecoderConfig(
    model_type="qwen3", vocab_size=24, num_layers=2, embed_dim=16, mlp_dim=32, num_heads=2,
    num_kv_heads=1, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6, qkv_bias=False, qk_norm=True,
    tie_embeddings=True, max_position=64,
)  # fmt: skip
EXPERTS = expert_cases.config(num_layers=2)
TEMPERATURE = 0.7
ATOL = 1e-5
LONGEST = 16

# Of six responses to three prompts; 2, 1 and 3 of a group.
PROMPTS, LENGTHS = (0, 0, 1, 2, 2, 2), (9, 1, 4, 2, 7, 5)
LAYOUTS = {
    "one row at a time": {"rows_per_microbatch": 1},
    "two micro-batches": {"rows_per_microbatch": 3},
    "all at once": {"rows_per_microbatch": 6},
    "few widths": {"rows_per_microbatch": 2, "num_buckets": 1},
    "dense": {"rows_per_microbatch": 2, "pack_length": 20},
    "one dense row": {"rows_per_microbatch": 1, "pack_length": 48},
    "shared prompts": {"rows_per_microbatch": 2, "pack_length": 24, "share_prompts": True},
    "gathered": {
        "rows_per_microbatch": 1,
        "pack_length": 20,
        "share_prompts": True,
        "gathers": True,
    },
}


def _planner(model, *, num_buckets=4, rows_per_microbatch=6, **fields):
    return Planner(model, LONGEST, num_buckets, rows_per_microbatch, **fields)


@functools.cache
def _params(model, seed=0):
    if model.num_experts:
        return expert_cases.params(model, seed)
    drawn = decoder.init_params(jax.random.key(seed), model)
    return jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, drawn)


def _state(model):
    return TrainState(_params(model), (), jnp.int32(0), ref_params=_params(model, 1))


def _pass(model, policy="params", *, record_experts=False, replay="none"):
    rule = LogprobRule(Forward(model), temperature=TEMPERATURE, head_chunk_tokens=16, replay=replay)
    return LogprobPass(policy, rule, record_experts=record_experts)


@functools.cache
def _alone(model, index):
    """(log-probs and entropies of a response's tokens, ids of its experts) with nothing beside."""
    prompt, response = _prompts(model)[index].tokens, _tokens(model, index)
    tokens = jnp.concatenate([prompt, response]).astype(jnp.int32)[None]
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    params = _params(model)
    hidden, routed = decoder.forward(
        params, tokens, places, jnp.ones_like(places), how=Forward(model)
    )
    logprobs = jax.nn.log_softmax(hidden[0] @ decoder.head_kernel(params).T / TEMPERATURE)
    at = jnp.arange(len(prompt) - 1, tokens.shape[1] - 1)
    entropies = -(jnp.exp(logprobs) * logprobs).sum(axis=1)[at]
    ids = None if routed is None else np.asarray(routed.expert_ids[0])
    return np.asarray(logprobs[at, response]), np.asarray(entropies), ids


def _prompts(model):
    rng = np.random.default_rng(3)
    asked = [Prompt(rng.integers(model.vocab_size, size=n).astype(np.int32)) for n in (3, 6, 1)]
    return [asked[i] for i in PROMPTS]


def _tokens(model, index):
    drawn = np.random.default_rng(10 + index).integers(model.vocab_size, size=LENGTHS[index])
    return drawn.astype(np.int32)


def _responses(model, trained=None):
    """What training holds of the responses; a mixture's sampler chose the policy's own experts."""
    found = []
    for index, length in enumerate(LENGTHS):
        tokens = _tokens(model, index)
        response = Response(
            prompt_id=PROMPTS[index],
            sample_id=index,
            tokens=tokens,
            logprobs=np.zeros(length, np.float32),
            stopped=True,
            trained=np.ones(length, bool) if trained is None else trained[index],
        )
        if model.num_experts:
            ids = _alone(model, index)[2].astype(np.uint8)
            response = dataclasses.replace(
                response, expert_ids=ids[-length:], prompt_expert_ids=ids[:-length]
            )
        found.append(response)
    return found


def _logprobs(model, planner, one=None, responses=None, order=range(6)):
    prompts, responses = _prompts(model), responses or _responses(model)
    parts = laid(planner, [prompts[i] for i in order], [responses[i] for i in order])
    return policy_logprobs(_state(model), one or _pass(model), parts, planner)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (4, 2, 0, 5, 3, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_response_says_what_it_says_alone(layout, order):
    found = _logprobs(DENSE, _planner(DENSE, **LAYOUTS[layout]), order=order)
    for k, index in enumerate(order):
        expected, entropies, _ = _alone(DENSE, index)
        assert found.logprobs[k].shape == (LENGTHS[index],)
        assert found.logprobs[k].dtype == found.entropies[k].dtype == np.float32
        np.testing.assert_allclose(found.logprobs[k], expected, atol=ATOL)
        np.testing.assert_allclose(found.entropies[k], entropies, atol=ATOL)
    assert (found.expert_ids, found.agreement) == (None, None)


@pytest.mark.parametrize("layout", ["two micro-batches", "dense", "shared prompts"])
def test_a_mesh_says_what_one_device_says(layout):
    mesh = sharding.layout("train", {"data": 2, "fsdp": 2}, jax.devices()[:4])
    sizes = LAYOUTS[layout] | {"rows_per_microbatch": 4}
    prompts, responses = (x + x[:2] for x in (_prompts(DENSE), _responses(DENSE)))
    planner = _planner(DENSE, layout=mesh, **sizes)
    one = _pass(DENSE)
    how = Forward(DENSE, layout=mesh)
    one = dataclasses.replace(one, logprobs=dataclasses.replace(one.logprobs, how=how))
    places = sharding.shardings(decoder.param_axes(DENSE), mesh)
    state = TrainState(jax.device_put(_params(DENSE), places), (), jnp.int32(0))
    found = policy_logprobs(state, one, laid(planner, prompts, responses), planner)
    for k, index in enumerate((*range(6), 0, 1)):
        np.testing.assert_allclose(found.logprobs[k], _alone(DENSE, index)[0], atol=ATOL)


@pytest.mark.parametrize("layout", ["two micro-batches", "dense", "shared prompts", "gathered"])
def test_tokens_that_are_not_trained_on_are_zero_and_change_no_other(layout):
    masks = [np.arange(n) % 3 != 1 for n in LENGTHS]
    masks[3] = np.zeros(LENGTHS[3], bool)  # a response that does not count
    responses = _responses(DENSE, masks)
    found = _logprobs(DENSE, _planner(DENSE, **LAYOUTS[layout]), responses=responses)
    for index, mask in enumerate(masks):
        expected, entropies, _ = _alone(DENSE, index)
        for got, want in ((found.logprobs, expected), (found.entropies, entropies)):
            np.testing.assert_allclose(got[index], np.where(mask, want, 0), atol=ATOL)
            assert not got[index][~mask].any()


def test_a_pass_names_the_policy_it_is_of():
    own = _logprobs(DENSE, _planner(DENSE))
    other = _logprobs(DENSE, _planner(DENSE), _pass(DENSE, "ref_params"))
    assert max(np.abs(a - b).max() for a, b in zip(own.logprobs, other.logprobs, strict=True)) > 0.1


# --- experts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (4, 2, 0, 5, 3, 1)], ids=str)
@pytest.mark.parametrize(
    "layout", ["one row at a time", "two micro-batches", "dense", "shared prompts", "gathered"]
)
def test_experts_are_recorded_sequence_by_sequence(layout, order):
    planner = _planner(EXPERTS, **LAYOUTS[layout])
    found = _logprobs(EXPERTS, planner, _pass(EXPERTS, record_experts=True), order=order)
    for k, index in enumerate(order):
        expected, _, ids = _alone(EXPERTS, index)
        np.testing.assert_array_equal(found.expert_ids[k], ids)
        np.testing.assert_allclose(found.logprobs[k], expected, atol=ATOL)
    assert found.agreement == pytest.approx(1)


@pytest.mark.parametrize("layout", ["two micro-batches", "dense"])
def test_agreement_is_of_all_tokens_prompts_included(layout):
    """One of two experts is another one at every token of one response, prompt left alone."""
    responses = _responses(EXPERTS)
    ids = responses[0].expert_ids.copy()
    for token in ids.reshape(-1, 2):
        token[0] = next(e for e in range(8) if e not in token)
    responses[0] = dataclasses.replace(responses[0], expert_ids=ids)
    found = _logprobs(EXPERTS, _planner(EXPERTS, **LAYOUTS[layout]), responses=responses)
    total = sequence_lengths(_prompts(EXPERTS), responses).sum()
    assert found.agreement == pytest.approx(1 - LENGTHS[0] / 2 / total)
    assert found.expert_ids is None  # nobody asked for them
    for index in range(6):  # they are compared, not used
        np.testing.assert_allclose(found.logprobs[index], _alone(EXPERTS, index)[0], atol=ATOL)


def test_what_the_old_policy_chose_is_laid_where_it_is_asked_for():
    responses = [
        dataclasses.replace(r, old_expert_ids=np.full_like(_alone(EXPERTS, i)[2], i, np.uint8))
        for i, r in enumerate(_responses(EXPERTS))
    ]
    planner = _planner(EXPERTS, rows_per_microbatch=2, pack_length=20)
    (one,) = laid(planner, _prompts(EXPERTS), responses)
    assert laid_rows(planner, one).expert_ids.old is None
    rows = laid_rows(planner, one, old_ids=True)
    for i, ids in enumerate(one.plan.take(rows.expert_ids.old)):
        np.testing.assert_array_equal(ids, np.full((*ids.shape[:1], 2, 2), i))
    for i, ids in enumerate(one.plan.take(rows.expert_ids.sampler)):
        np.testing.assert_array_equal(ids, _alone(EXPERTS, i)[2])


@pytest.mark.parametrize("name", ["expert_ids", "prompt_expert_ids"])
def test_experts_that_were_not_recorded_are_named(name):
    responses = _responses(EXPERTS)
    responses[4] = dataclasses.replace(responses[4], **{name: None})
    with pytest.raises(ValueError, match=rf"^{name} of the response 4 to prompt 2 must .* is None"):
        _logprobs(EXPERTS, _planner(EXPERTS), responses=responses)


# --- laying out --------------------------------------------------------------------------------


def test_responses_are_laid_at_once_and_with_images_as_many_as_an_update_reads():
    """One width for all parts: the arrays of a step have one."""
    planner = _planner(DENSE, rows_per_microbatch=2, pictured_at_once=2)
    prompts, responses = _prompts(DENSE), _responses(DENSE)
    (whole,) = laid(planner, prompts, responses)
    assert whole.plan.width == 12  # of the longest, 3 + 9
    shown = [dataclasses.replace(prompts[0], images=("an image",)), *prompts[1:]]
    parts = laid(planner, shown, responses)
    assert [len(part.prompts) for part in parts] == [2, 2, 2]
    assert {part.plan.width for part in parts} == {12}
    assert [r.sample_id for part in parts for r in part.responses] == list(range(6))
    lengths = np.concatenate([part.plan.lengths_B for part in parts])
    np.testing.assert_array_equal(lengths, sequence_lengths(prompts, responses))


def test_parts_that_are_laid_one_by_one_say_the_same():
    planner = _planner(DENSE, rows_per_microbatch=2)
    prompts, responses = _prompts(DENSE), _responses(DENSE)
    parts = [
        part
        for start in range(0, 6, 2)
        for part in laid(planner, prompts[start : start + 2], responses[start : start + 2])
    ]
    assert len({part.plan.width for part in parts}) > 1
    found = policy_logprobs(_state(DENSE), _pass(DENSE), parts, planner)
    for index in range(6):
        np.testing.assert_allclose(found.logprobs[index], _alone(DENSE, index)[0], atol=ATOL)
