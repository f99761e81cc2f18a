"""Whole runs of a small mixture of experts: what they report, what they carry, how they go on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from luspo_jax import datasets, sharding, train
from luspo_jax.experience import rounds, stages
from luspo_jax.experience.groups import Group, Waiting
from luspo_jax.experience.rounds import Policy
from luspo_jax.experience.stored import from_stored, to_stored
from luspo_jax.hosts.values import ConfigError
from luspo_jax.learner.logprobs import REPLAYS
from luspo_jax.learner.policies import sequence_lengths
from luspo_jax.metrics import StepMetrics, read_metrics
from luspo_jax.models import char_tokenizer
from luspo_jax.models.decoder_config import hf_config
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward
from luspo_jax.rollout import Response
from luspo_jax.run import beginning, fields
from luspo_jax.run import workdir as workdirs
from luspo_jax.run.build import Run, build, facts, layouts
from luspo_jax.run.checkpoint import Checkpointer
from tests.models import expert_cases

MODEL = expert_cases.config(
    4, 2, num_layers=2, vocab_size=32, embed_dim=16, mlp_dim=24, expert_dim=8, dense_layers=(0,)
)
MODEL = dataclasses.replace(
    MODEL, eos_token_ids=(char_tokenizer.END_ID,), pad_token_id=char_tokenizer.PAD_ID
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random mixture in Hugging Face format that reads the embedded task's problems."""
    folder = tmp_path_factory.mktemp("mixture")
    source = folder / "tokenizer"
    source.mkdir()
    char_tokenizer.write_tokenizer(source, " =?.0123456789abcdefghij", max_length=64)
    (source / "config.json").write_text(json.dumps(hf_config(MODEL)))
    return source


@pytest.fixture
def config(model_folder, monkeypatch):
    config = fields.default_config()
    config.num_steps = 2
    config.model.path = str(model_folder)
    config.model.random_weights = True
    config.data.name = "label_sums"
    config.data.options = {"num_terms": 4}
    config.data.max_prompt_length = 12
    config.reward.parts = {"digits": 1.0}
    config.reward.options = {"digits": {"function": f"{__file__}:many_digits"}}
    config.rollout.prompts_per_step = 4
    config.rollout.group_size = 4
    config.rollout.max_response_length = 12
    config.rollout.num_slots = 8
    config.train.num_minibatches = 2
    config.train.num_length_buckets = 1
    config.train.learning_rate = 1e-2
    config.train.warmup_steps = 1
    config.train.router_aux_coef = 0.001
    config.eval.every = 0
    config.eval.num_problems, config.eval.num_samples, config.eval.num_slots = 2, 1, 2
    config.output.checkpoint_every = 1
    config.output.tensorboard = config.output.export = False
    # Routers with a will of their own, as expert_cases.params has them.
    monkeypatch.setattr(Run, "initial_params", lambda run: expert_cases.params(MODEL))
    return config


def many_digits(response, answer):
    """1 for responses that are mostly digits, which by chance few are."""
    return float(sum(c.isdigit() for c in response) > 0.5 * len(response))


def _collected(config, step=0):
    run, found = build(config), StepMetrics()
    state = beginning.begin_state(run)
    weights = run.rollout_params(state.params)
    rollouts, _ = rounds.collect(run.asker, Policy(weights, step), Waiting(), step, found)
    return run, state, rollouts, found


# ---------------------------------------------------------------- records on their way


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_old_record_is_what_the_old_pass_chose(config, packing):
    """Row by row; of a group that was carried over, what its sampler recorded."""
    config.train.router_replay = "old"
    if packing:
        config.train.packing, config.train.microbatch_tokens = True, 48
    run, state, rollouts, found = _collected(config, step=1)
    groups = list(rollouts.groups)
    groups[1] = groups[1].enriched(versions=[v * 0 for v in groups[1].column("versions")])
    rollouts = dataclasses.replace(rollouts, groups=groups)
    state = dataclasses.replace(state, params=expert_cases.with_other_routers(state.params, 0.5))
    rollouts, width = stages.with_logprobs(rollouts, state, run.programs, run.planner, found)
    rollouts = rollouts.enriched(advantage=[0.0] * len(rollouts.responses))
    everything = np.arange(len(rollouts.responses))
    rows = stages.train_batch(rollouts, run.planner, everything, width)[0].rows
    plan = run.planner.plan(sequence_lengths(rollouts.prompts, rollouts.responses), width)
    plain = jax.jit(expert_cases.plain_forward, static_argnums=4)
    _, ids, _ = plain(state.params, rows.tokens_RT, rows.positions_RT, rows.segment_ids_RT, MODEL)
    ids = np.asarray(ids)
    sampler = [np.concatenate([r.prompt_expert_ids, r.expert_ids]) for r in rollouts.responses]
    old, chosen = plan.take(rows.expert_ids.old), plan.take(ids)
    for i, response in enumerate(rollouts.responses):
        carried = not rollouts.fresh_B[i]
        np.testing.assert_array_equal(old[i], sampler[i] if carried else chosen[i])
        np.testing.assert_array_equal(response.old_expert_ids, old[i])
    assert rollouts.fresh_B.tolist() == [i // 4 != 1 for i in range(16)]
    real, sampled = rows.segment_ids_RT > 0, plan.lay(sampler)
    assert (rows.expert_ids.old != sampled)[real].any()
    np.testing.assert_array_equal(rows.expert_ids.sampler, sampled)
    shared = (ids[..., :, None] == sampled[..., None, :]).any(-1)
    agreement = found.result()["router/agreement/sampler_old"]
    np.testing.assert_allclose(agreement, shared[real].mean(), rtol=1e-6)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_carried_groups_keep_their_experts_in_a_checkpoint(kind):
    rng = np.random.default_rng(0)
    most = np.iinfo(kind).max
    example = datasets.Example(1, "3 + 4", "7")
    prompt = PromptRecord(5, np.arange(3, dtype=np.int32), "3 + 4", example)
    of_prompt = rng.integers(0, most, (3, 2, 4), endpoint=True).astype(kind)  # one for all samples
    responses = [
        Response(
            5, i, np.arange(n, dtype=np.int32), np.zeros(n, np.float32), True,
            expert_ids=rng.integers(0, most, (n, 2, 4), endpoint=True).astype(kind),
            prompt_expert_ids=of_prompt,
            reward=Reward(value=1.0, status="ok", parts={"x": 1.0}),
        )
        for i, n in enumerate((4, 1))
    ]  # fmt: skip

    def again(responses):
        arrays, described = to_stored([Group(prompt, responses)])
        (group,) = from_stored(arrays, json.loads(json.dumps(described)))
        return group.responses

    for got, expected in zip(again(responses), responses, strict=True):
        for name in ("expert_ids", "prompt_expert_ids"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
            assert getattr(got, name).dtype == kind
    plain = [dataclasses.replace(r, expert_ids=None, prompt_expert_ids=None) for r in responses]
    assert again(plain)[0].expert_ids is again(plain)[0].prompt_expert_ids is None


@pytest.mark.parametrize("change", ["none recorded", "of other tokens"])
def test_a_response_without_its_record_is_refused_by_name(config, change):
    run, state, rollouts, found = _collected(config)
    first, *others = rollouts.groups
    ids = first.column("expert_ids")
    ids[1] = None if change == "none recorded" else ids[1][:-1]
    rollouts = dataclasses.replace(rollouts, groups=[first.enriched(expert_ids=ids), *others])
    message = (
        rf"^expert_ids of the response 1 to prompt {first.prompt.prompt_id} must be "
        r".*record_exp"
    )
    with pytest.raises(ValueError, match=message):
        stages.with_logprobs(rollouts, state, run.programs, run.planner, found)


# ---------------------------------------------------------------- runs


def _train(config, folder):
    run = build(config)
    workdir = workdirs.Workdir(folder, config, facts(run))
    try:
        train.train(run, workdir)
    finally:
        workdir.close()


def _results(config, folder):
    """(metrics but for timings, responses, the last state)."""
    rows = [
        {k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    rollouts = {p.name: p.read_text() for p in sorted((folder / "rollouts").iterdir())}
    checkpointer = Checkpointer(folder / "checkpoints", keep_latest=2, keep_best=1)
    state, step, _, _ = beginning.begin(build(config), checkpointer)
    checkpointer.close()
    assert step == config.num_steps
    return rows, rollouts, jax.device_get(state)


RUNS = {
    "none": {},
    "old, packed": {"train.router_replay": "old", "train.packing": True,
                    "train.microbatch_tokens": 48},
    "sampler, length pressure": {"train.router_replay": "sampler", "length.every": 1},
    "sampler, carried groups, packed": {
        "train.router_replay": "sampler", "shaping.dynamic_sampling": True,
        "shaping.max_tries": 8, "train.packing": True, "train.microbatch_tokens": 48,
        "num_steps": 3, "objective.kl_coef": 0.1},
    "old, carried groups, length pressure": {
        "train.router_replay": "old", "shaping.dynamic_sampling": True, "shaping.max_tries": 8,
        "num_steps": 3, "length.every": 2},
    "one update a step": {"train.num_minibatches": 1, "train.router_replay": "sampler"},
    "sampler, in flight": {
        "train.router_replay": "sampler", "rollout.overlap": 2, "rollout.max_age": 2,
        "rollout.chunk_length": 2, "num_steps": 3},
    "old, in flight, decoupled": {
        "train.router_replay": "old", "rollout.overlap": 2, "rollout.max_age": 1,
        "rollout.chunk_length": 2, "num_steps": 3, "objective.old_policy": "decoupled",
        "objective.correction": "tis"},
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "sampler, carried groups, packed",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in RUNS
            if name != "sampler, carried groups, packed"
        ),
    ],
)
def test_what_a_run_reports_and_how_it_goes_on_after_a_kill(config, tmp_path, monkeypatch, name):
    fields.assign(config, RUNS[name])
    _train(config, tmp_path / "straight")
    rows = list(read_metrics(tmp_path / "straight" / "metrics.jsonl"))[1:]
    for row in rows:
        for pair in ("sampler_current", "old_current", "sampler_old"):
            assert 0.5 < row[f"router/agreement/{pair}"] <= 1, (pair, row["step"])
        assert 0 < row["router/avg_violation"] < row["router/max_violation"] < 1
        assert 0 < row["router/max_violation/layer_00"] == row["router/max_violation/worst_layer"]
        assert 1.5 < row["router/aux_loss"] < 3  # K where the load is even
        assert np.isfinite(row["actor/grad_norm"])
    assert rows[0]["router/agreement/sampler_old"] == 1  # the same weights in the same type
    several = config.train.num_minibatches > 1
    assert (rows[0]["router/agreement/old_current"] < 1) == several  # the second update's
    if "length" in name:
        assert np.isfinite(rows[0]["length/pressure/own"])
    if "carried" in name:
        assert sum(row["shaping/groups_carried_in"] for row in rows) > 0
    if "flight" in name:
        assert sum(row["rollout/continued_tokens"] for row in rows) > 0
    real = train.rollout_step

    def crash(run, state, carried, step, **kwargs):
        if step == 1:
            raise KeyboardInterrupt
        return real(run, state, carried, step, **kwargs)

    monkeypatch.setattr(train, "rollout_step", crash)
    with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "cut")
    monkeypatch.setattr(train, "rollout_step", real)
    _train(config, tmp_path / "cut")
    cut, straight = (_results(config, tmp_path / folder) for folder in ("cut", "straight"))
    jax.tree.map(np.testing.assert_array_equal, cut, straight)


# ---------------------------------------------------------------- refusals


def test_experts_that_the_mesh_cannot_cut_are_refused(config):
    config.mesh.expert, config.rollout_mesh.expert = 8, 8
    message = r"num_experts = 4 is cut into 8 parts by the (train|rollout) mesh \(expert 8\)"
    with pytest.raises(sharding.MeshError, match=message) as error:
        layouts(config, MODEL, jax.devices())
    assert str(error.value).count("num_experts = 4") == 2


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"train.router_replay": "r3"}, r"train.router_replay='r3' does not exist: known: none, "),
        ({"train.router_aux_coef": -0.1}, r"train.router_aux_coef=-0.1 must be at least 0"),
        (
            {"model.expert_kernel": "block"},
            r"model.expert_kernel='block' does not exist.*known: auto",
        ),
        ({"model.expert_kernel": "megablox"}, r"model.expert_kernel: .*runs on tpu, not on cpu"),
    ],
    ids=str,
)
def test_names_that_do_not_exist_are_refused(config, leaves, message):
    fields.assign(config, leaves)
    with pytest.raises(ConfigError, match=message):
        build(config)


@pytest.mark.parametrize(
    "fields", [{"router_replay": "old"}, {"router_replay": "sampler"}, {"router_aux_coef": 0.001}]
)
def test_what_is_of_experts_is_refused_for_a_dense_model(config, tmp_path, fields):
    dense = dataclasses.replace(
        MODEL, model_type="qwen3", num_experts=0, experts_per_token=0, expert_dim=0,
        norm_topk=False, dense_layers=(),
    )  # fmt: skip
    (field, value), source = *fields.items(), tmp_path / "dense"
    source.mkdir()
    char_tokenizer.write_tokenizer(source, " =?.0123456789abcdefghij", max_length=64)
    (source / "config.json").write_text(json.dumps(hf_config(dense)))
    config.model.path = str(source)
    config.train.router_aux_coef = 0.0
    config.train[field] = value
    message = rf"train.{field}={value} is of a mixture of experts, and the model of"
    with pytest.raises(ConfigError, match=message):
        build(config)
    assert set(REPLAYS) == {"none", "old", "sampler"}
