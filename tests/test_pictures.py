"""A run on images: sampler and trainer agree, and no layout of rows or images changes a number."""

import dataclasses

import jax
import numpy as np
import pytest

from luspo_jax import prompts, sharding
from luspo_jax.experience import rounds, stages, stored
from luspo_jax.experience.groups import Rollouts, Waiting
from luspo_jax.images.layout import laid_out
from luspo_jax.learner.logprobs import microbatch_logprobs
from luspo_jax.learner.plan import one_a_row
from luspo_jax.learner.policies import laid, policy_logprobs
from luspo_jax.learner.rows import Planner, put, token_rows
from luspo_jax.learner.state import initial_state, param_shardings
from luspo_jax.length import laboratory
from luspo_jax.length.pressure import Candidate
from luspo_jax.metrics import StepMetrics
from luspo_jax.models import decoder
from luspo_jax.models.forward import Forward
from luspo_jax.ops.sizes import bucket_count
from luspo_jax.rollout import Cache, Engine, Request, Sampling
from luspo_jax.run.build import build
from luspo_jax.types import TrainState
from tests import vl_cases
from tests.rollout import int8_cases

ATOL = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vl")
    vl_cases.write_model(folder)
    return folder


def _config(folder, **fields):
    config = vl_cases.config(folder)
    for name, value in fields.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return config


@pytest.fixture(scope="module")
def run(folder):
    run = build(_config(folder))
    yield run
    run.scorer.close()


@pytest.fixture(scope="module")
def params(run):
    """Random, and large enough that images matter."""
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, run.initial_params())


@pytest.fixture(scope="module")
def rollouts(run, params):
    with run.scorer:
        weights = run.rollout_params(params)
        collected, _ = rounds.collect(
            run.asker, rounds.Policy(weights, 0), Waiting(), 0, StepMetrics()
        )
    return collected


def _state(params):
    return TrainState(params, (), np.int32(0))


def _logprobs(run, params, rollouts):
    """Of each response, by the trainer of the run."""
    parts = laid(run.planner, rollouts.prompts, rollouts.responses)
    one = run.programs.passes(check=True)["old"]
    return policy_logprobs(_state(params), one, parts, run.planner)


def _assert_same(got, expected):
    for a, b in zip(got.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)


def test_sampler_and_trainer_agree(run, params, rollouts):
    assert stages.largest_gap(rollouts, _logprobs(run, params, rollouts)) <= ATOL
    assert rollouts.trained_B.all()
    assert rollouts.fresh_B.all()
    assert len({image.sha for prompt in rollouts.prompts for image in prompt.images}) > 4


def test_images_are_looked_at(run, params, rollouts):
    """Another image behind the same question changes the log-probs."""
    own = _logprobs(run, params, rollouts)
    white = [
        dataclasses.replace(
            group,
            prompt=dataclasses.replace(
                group.prompt,
                images=tuple(
                    dataclasses.replace(
                        image, pixels=np.full_like(image.pixels, 255), sha=image.sha + "white"
                    )
                    for image in group.prompt.images
                ),
            ),
        )
        for group in rollouts.groups
    ]
    other = _logprobs(run, params, Rollouts(white, rollouts.version))
    gaps = [np.abs(a - b).max() for a, b in zip(own.logprobs, other.logprobs, strict=True)]
    assert max(gaps) > 1e-3


def test_packed_rows_score_as_rows_alone(folder, run, params, rollouts):
    packed = build(_config(folder, train__packing=True, train__microbatch_tokens=56 * 4))
    assert packed.planner.pack_length
    _assert_same(_logprobs(packed, params, rollouts), _logprobs(run, params, rollouts))


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}]
)
def test_a_mesh_scores_as_one_device(folder, run, params, rollouts, sizes):
    config = _config(folder)
    for axis in ("data", "fsdp", "context", "tensor"):
        config.mesh[axis] = sizes.get(axis, 1)
    meshed = build(config, devices=jax.devices())
    placed = jax.device_put(params, param_shardings(meshed.rule.logprobs.how))
    _assert_same(_logprobs(meshed, placed, rollouts), _logprobs(run, params, rollouts))


def _updated(run, params, rollouts):
    """The state after one update on the first minibatch."""
    advantages_B = np.random.default_rng(0).normal(size=len(rollouts.responses))
    rollouts = rollouts.enriched(advantage=advantages_B.tolist())
    width = laid(run.planner, rollouts.prompts, rollouts.responses)[0].plan.width
    batch, _ = stages.train_batch(rollouts, run.planner, np.arange(16), width)
    state = initial_state(params, run.rule)
    state, _ = run.programs.update(state, put(batch, run.planner.layout), 1e-3)
    return state


def _gap(found, expected):
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def test_microbatches_and_packing_do_not_change_an_update(folder, run, params, rollouts):
    expected = _updated(run, params, rollouts).opt_state[0].mu
    several = build(_config(folder, train__num_microbatches=4))
    packed = build(_config(folder, train__packing=True, train__microbatch_tokens=56 * 2))
    for other in (several, packed):
        # Of the first moments, which are the gradient: the step itself is nearly its sign.
        found = _updated(other, params, rollouts).opt_state[0].mu
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()), rtol=0)


def test_a_frozen_tower_stays_as_it_is(folder, params, rollouts):
    config = _config(folder, train__freeze_vision=True, train__weight_decay=0.1)
    found = _updated(build(config), params, rollouts).params
    assert _gap(found["vision"], params["vision"]) == 0
    assert _gap(found["layers"], params["layers"]) > 1e-4


def test_a_trained_tower_moves(run, params, rollouts):
    found = _updated(run, params, rollouts).params
    assert _gap(found["vision"], params["vision"]) > 1e-4


def test_carried_groups_get_their_images_back(run, rollouts):
    back = stored.from_stored(*stored.to_stored(rollouts.groups[:2]))
    assert len(back) == 2
    for group, before in zip(back, rollouts.groups, strict=False):
        assert group.prompt.images == ()
        prompt = prompts.pictured(group.prompt, run.data.renderer)
        assert [image.sha for image in prompt.images] == [x.sha for x in before.prompt.images]


def _generated(run, params, requests, layout=None, pages=None, **sizes):
    """response token ids and log-probs, by prompt and sample.

    `pages` beyond those of the longest response; None for as many as can be used.
    """
    engine = Engine(
        Forward(run.model.config, layout=layout),
        Sampling(max_response_length=12, stop_token_ids=(1,)),
        max_prompt_length=40,
        **sizes,
    )
    if pages is not None:
        engine.take_room(engine.least_bytes + pages * engine.page_bytes)
    responses, stats = engine.generate(params, requests, group_size=3, seed=5)
    assert (stats.preemptions > 0) == (pages is not None)
    return {
        (response.prompt_id, response.sample_id): (response.tokens.tolist(), response.logprobs)
        for response in responses
    }


def _mixed(run):
    """Requests with no image, one, and two."""
    held_out = run.data.held_out
    two = [*held_out[0].tokens, *held_out[1].tokens]
    config = run.model.config
    places = (config.image_token_id, config.vision_start_token_id, config.vision_end_token_id)
    words = [token for token in held_out[2].tokens if token not in places]
    return [
        *(Request(i, record.tokens, record.images) for i, record in enumerate(held_out[3:7])),
        Request(7, np.array(two), held_out[0].images + held_out[1].images),
        Request(8, np.array(words)),
        Request(9, np.array(words[::-1])),
    ]


def test_slots_and_companions_do_not_change_a_response(run, params):
    requests = _mixed(run)
    expected = _generated(run, params, requests, num_slots=32)
    alone = _generated(run, params, requests[4:5], num_slots=32)
    few = _generated(run, params, requests, num_slots=4, chunk_length=5)
    small = {"cache": Cache(None, 4), "num_slots": 16, "chunk_length": 5}
    preempted = _generated(run, params, requests, pages=3, **small)  # images are read again
    assert preempted.keys() == expected.keys()
    for found in (alone, few, preempted):
        for key, (tokens, scores) in found.items():
            assert tokens == expected[key][0]
            np.testing.assert_allclose(scores, expected[key][1], atol=ATOL)
    assert len(few) == 3 * len(requests)


def test_int8_weights_sample_as_the_rounded_ones(run, params):
    """Their tower is bfloat16, and stays as it is."""
    requests, model = _mixed(run)[3:6], run.model.config
    rounded = decoder.cast(params, "int8")
    found = _generated(run, rounded, requests, num_slots=16)
    expected = _generated(run, int8_cases.dequantised(rounded, model), requests, num_slots=16)
    for key, (tokens, scores) in found.items():
        assert tokens == expected[key][0]
        np.testing.assert_allclose(scores, expected[key][1], atol=ATOL)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "tensor": 2, "context": 2}])
def test_a_mesh_samples_as_one_device(run, params, sizes):
    requests = _mixed(run)
    layout = sharding.layout("rollout", sizes, jax.devices())
    placed = jax.device_put(
        params, sharding.shardings(decoder.param_axes(run.model.config), layout)
    )
    found = _generated(run, placed, requests, layout, num_slots=16)
    for key, (tokens, scores) in _generated(run, params, requests, num_slots=16).items():
        assert found[key][0] == tokens
        np.testing.assert_allclose(found[key][1], scores, atol=ATOL)


def test_rows_of_no_one_and_two_images_score_as_they_were_sampled(run, params):
    requests = _mixed(run)
    sampled = _generated(run, params, requests, num_slots=8)
    by_id = {request.prompt_id: request for request in requests}
    keys = sorted(sampled)
    asked = [by_id[prompt_id] for prompt_id, _ in keys]
    tokens = [np.array(sampled[key][0]) for key in keys]
    lengths = np.array([len(p.tokens) + len(t) for p, t in zip(asked, tokens, strict=True)])
    plan = one_a_row(lengths, width=64, rows_per_microbatch=len(keys))
    masks = [np.ones(len(t), bool) for t in tokens]
    rows = token_rows(Planner(run.model.config, 64, 1, len(keys)), plan, asked, tokens, masks)
    found = microbatch_logprobs(params, rows, rule=run.rule.logprobs)
    for key, row, size in zip(
        keys, plan.take(np.asarray(found.logprobs_RT)), map(len, tokens), strict=True
    ):
        np.testing.assert_allclose(row[-size:], sampled[key][1], atol=ATOL, err_msg=str(key))


@pytest.fixture(scope="module")
def pressures(run, params, rollouts):
    """(what is measured, the responses, pressure of each objective in one piece)."""
    values = np.random.default_rng(0).normal(size=len(rollouts.responses))
    rewards = [
        dataclasses.replace(reward, value=float(value))
        for reward, value in zip(rollouts.column("reward"), values, strict=True)
    ]
    judged = rollouts.enriched(reward=rewards)
    width = laid(run.planner, rollouts.prompts, rollouts.responses)[0].plan.width
    sampled = laboratory.Sampled(judged.prompts, judged.responses, judged.group_ids_B, width)
    own = Candidate("own", run.rule.objective)
    lab = laboratory.Laboratory(run.rule.logprobs, (own,), (4, 8), 99)
    return lab, sampled, laboratory.measure(lab, params, params, sampled, 0.0)


@pytest.mark.parametrize(
    "sizes", [None, pytest.param({"fsdp": 4, "context": 2}, marks=pytest.mark.slow)]
)
def test_length_pressure_does_not_depend_on_pieces_or_devices(
    run, params, rollouts, pressures, sizes
):
    lab, sampled, expected = pressures
    layout = sharding.layout("train", sizes, jax.devices()) if sizes else None
    how = dataclasses.replace(run.rule.logprobs.how, layout=layout)
    rule = dataclasses.replace(run.rule.logprobs, how=how)
    pieces = dataclasses.replace(lab, rows_at_once=4, rule=rule)
    placed = jax.device_put(params, param_shardings(how)) if sizes else params
    found = laboratory.measure(pieces, placed, placed, sampled, 0.0)
    assert abs(float(expected["own"].length)) > 0
    scale = float(np.abs(expected["own"].length_bins).max())
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * scale, rtol=1e-4)


def test_length_pressure_sees_the_images(params, pressures):
    lab, sampled, expected = pressures
    white = [
        dataclasses.replace(
            prompt,
            images=tuple(
                dataclasses.replace(x, pixels=np.full_like(x.pixels, 255), sha=x.sha + "white")
                for x in prompt.images
            ),
        )
        for prompt in sampled.prompts
    ]
    blind = dataclasses.replace(sampled, prompts=white)
    found = laboratory.measure(lab, params, params, blind, 0.0)
    assert abs(found["own"].length / expected["own"].length - 1) > 1e-2


def test_fifty_sizes_of_images_compile_once_a_bucket(run, params):
    """Each image in a prompt of its own; the programs that do not know of images are warm."""
    config = run.model.config
    sampling = Sampling(max_response_length=1, stop_token_ids=(1,))
    engine = Engine(Forward(config), sampling, num_slots=1, max_prompt_length=64)
    (some,) = run.data.held_out[0].images
    sizes = [(2 * rows, 2 * columns) for rows in range(1, 8) for columns in range(1, 9)]

    def compilations(rows, columns):
        image = dataclasses.replace(
            some,
            pixels=np.random.default_rng(rows).integers(
                256, size=(rows * columns, *some.pixels.shape[1:]), dtype=np.uint8
            ),
            grid_thw=(1, rows, columns),
            sha=f"{rows} {columns}",
        )
        places = [config.image_token_id] * (rows * columns // 4)
        tokens = [config.vision_start_token_id, *places, config.vision_end_token_id]
        request = Request(0, np.array(tokens), (image,))
        return engine.generate(params, [request], group_size=1, seed=0)[1].compilations

    buckets = {bucket_count(laid_out((1, *size), config.vision).windows) for size in sizes}
    assert len(sizes) >= 50
    compilations(*sizes[0])
    found = [compilations(*size) for size in np.random.default_rng(0).permutation(sizes).tolist()]
    assert 1 < sum(n > 0 for n in found) <= len(buckets) - 1
    assert sum(found) <= len(buckets) - 1


def test_bad_images_are_named(run, params):
    prompt = run.data.held_out[0]
    sampling = Sampling(max_response_length=4, stop_token_ids=(1,))
    engine = Engine(Forward(run.model.config), sampling, num_slots=4, max_prompt_length=40)
    with pytest.raises(ValueError, match=r"prompt_id 7.*placeholders"):
        engine.generate(params, [Request(7, prompt.tokens, ())], group_size=1, seed=0)
    twice = Request(7, prompt.tokens, prompt.images * 2)
    with pytest.raises(ValueError, match="prompt_id 7: 2 images for the placeholders of 1"):
        engine.generate(params, [twice], group_size=1, seed=0)
