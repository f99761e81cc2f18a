"""The whole loop on a tiny random model: artefacts, resume, refusals."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import quickstart
from experiments.responses import reading
from experiments.responses.selection import Filters
from experiments.responses.view import view
from luspo_jax import datasets, objectives, train
from luspo_jax.experience import stages
from luspo_jax.hosts.files import PlaceError
from luspo_jax.hosts.values import ConfigError
from luspo_jax.learner import programs
from luspo_jax.metrics import read_metrics
from luspo_jax.models import char_tokenizer, decoder, decoder_weights
from luspo_jax.models.decoder_config import DecoderConfig, hf_config
from luspo_jax.run import checks, fields
from luspo_jax.run import workdir as workdirs
from luspo_jax.run.arithmetic import batch_arithmetic
from luspo_jax.run.build import build, facts
from luspo_jax.run.checkpoint import CheckpointError
from luspo_jax.run.memory import memory_estimate
from luspo_jax.run.trackers import registry
from tests.run.trackers import tracker_cases

MODEL = DecoderConfig(
    model_type="qwen3",
    vocab_size=32,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    qkv_bias=False,
    qk_norm=True,
    tie_embeddings=True,
    max_position=64,
    eos_token_ids=(char_tokenizer.END_ID,),
    pad_token_id=char_tokenizer.PAD_ID,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random policy in Hugging Face format that reads the embedded task's problems."""
    folder = tmp_path_factory.mktemp("model")
    source = folder / "tokenizer"
    source.mkdir()
    char_tokenizer.write_tokenizer(source, " =?.0123456789abcdefghij", max_length=64)
    params = decoder.init_params(jax.random.key(1), MODEL)
    (source / "config.json").write_text(json.dumps(hf_config(MODEL)))
    decoder_weights.export(folder / "hf", params, MODEL, source=source)
    return folder / "hf"


@pytest.fixture
def config(model_folder):
    config = fields.default_config()
    config.num_steps = 4
    config.model.path = str(model_folder)
    config.data.name = "label_sums"
    config.data.options = {"num_terms": 4}
    config.data.max_prompt_length = 12
    # Right answers are out of a random policy's reach: reward what varies.
    config.reward.parts = {"digits": 1.0, "gsm8k": 1.0}
    config.reward.options = {"digits": {"function": f"{__file__}:digits"}}
    config.rollout.prompts_per_step = 4
    config.rollout.group_size = 4
    config.rollout.max_response_length = 12
    config.rollout.num_slots = 8
    config.objective.preset = "luspo"
    config.train.num_minibatches = 2
    config.train.num_length_buckets = 1
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = 2
    config.eval.every = 2
    config.eval.num_problems = 4
    config.eval.num_samples = 2
    config.eval.num_slots = 8
    config.eval.metric = "gsm8k"
    config.eval.budgets = "4,12"
    config.output.checkpoint_every = 2
    config.output.tensorboard = False
    return config


def digits(response, answer):
    """Share of digits in a response: a reward that a random policy sometimes earns."""
    return sum(c.isdigit() for c in response) / max(len(response), 1)


def _train(config, folder):
    run = build(config)
    workdir = workdirs.Workdir(folder, config, facts(run))
    try:
        return train.train(run, workdir)
    finally:
        workdir.close()


def _results(folder):
    """Everything that a run leaves, timings aside."""
    metrics = [
        {k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    rollouts = {p.name: p.read_text() for p in sorted((folder / "rollouts").iterdir())}
    return metrics, rollouts, load_file(folder / "export" / "model.safetensors")


def _assert_same_results(got, expected):
    for a, b in zip(got[0], expected[0], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"step {a['step']} {name}")
    assert got[1] == expected[1]
    assert got[2].keys() == expected[2].keys()
    for name, tensor in got[2].items():
        np.testing.assert_array_equal(tensor, expected[2][name], err_msg=name)


def without_sampler_counts(results):
    """How slots are filled differs with their number and place; nothing else may."""
    names = ("decode_steps", "slot_utilisation", "prefill_calls", "prefill_tokens", "pages_peak",
             "preemptions", "recomputed_tokens")  # fmt: skip
    counts = [f"rollout/{name}" for name in names]
    rows = [{k: v for k, v in row.items() if k not in counts} for row in results[0]]
    return rows, *results[1:]


def assert_near_results(got, expected, tolerance=1e-5):
    """The same tokens and rewards; sums may be taken in another order, as on another mesh."""
    for a, b in zip(got[0], expected[0], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            where = f"step {a['step']} {name}"
            if isinstance(b[name], str):
                assert a[name] == b[name], where
            else:
                np.testing.assert_allclose(a[name], b[name], tolerance, tolerance, err_msg=where)
    assert got[1].keys() == expected[1].keys()
    for name in got[1]:
        for a, b in zip(*(r[1][name].splitlines() for r in (got, expected)), strict=True):
            a, b = json.loads(a), json.loads(b)
            np.testing.assert_allclose(a.pop("advantage"), b.pop("advantage"), 1e-5, 1e-5)
            assert a == b, name
    assert got[2].keys() == expected[2].keys()
    for name, tensor in got[2].items():
        worst = np.abs(tensor - expected[2][name]).max() / np.abs(expected[2][name]).max()
        assert worst <= tolerance, (name, worst)


HELD_OUT = ("completed", "tokens_per_right", "budget/4/acc", "budget/12/acc", "budget/area")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder for the uninterrupted run, made by the first test that needs it."""
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def finished(straight, config):
    if not straight.exists():
        _train(config, straight)
    return straight


def test_run_leaves_all_artefacts(finished, config):
    metrics, rollouts, weights = _results(finished)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert {"reward", "response_length/mean", "actor/grad_norm", "rollout_corr/kl"} <= set(
        metrics[1]
    )
    assert any(name.startswith("val-core/") for name in metrics[0])
    assert any(name.startswith("val-core/") for name in metrics[4])
    for row in metrics[::2]:
        held_out = {name: row[f"val-aux/label_sums/{name}"] for name in HELD_OUT}
        accuracy = row["val-core/label_sums/acc/mean@2"]
        assert held_out["budget/12/acc"] == accuracy >= held_out["completed"]
        assert 0 <= held_out["budget/4/acc"] <= 1
        assert held_out["tokens_per_right"] > 0
    first = json.loads(rollouts["step_000001.jsonl"].splitlines()[0])
    assert {"prompt", "response", "tokens", "parts", "advantage", "length", "truncated"} <= set(
        first
    )
    assert len(rollouts["step_000001.jsonl"].splitlines()) == 16
    base = load_file(pathlib.Path(config.model.path) / "model.safetensors")
    assert any(np.any(weights[name] != base[name]) for name in base)
    assert json.loads((finished / "run.json").read_text())["config"]["objective.preset"] == "luspo"


def test_its_responses_can_be_shown(finished):
    run = reading.stored(finished)
    assert list(run.steps) == [1, 2, 3, 4]
    with run.steps[4].open("rb") as file:
        shown = view(run, 4, file, Filters(limit=5))
        groups = list(shown.groups)
    (row,) = (row for row in read_metrics(finished / "metrics.jsonl") if row["step"] == 4)
    facts = dict(shown.facts)
    assert not shown.notes
    assert facts["responses"] == "16 in 4 groups"
    assert facts["reward"].startswith(f"mean {row['reward']:.4g} (digits ")
    assert facts["length"].startswith(f"mean {row['response_length/mean']:.1f}, ")
    assert facts["held out"] == f"label_sums/acc/mean@2 {row['val-core/label_sums/acc/mean@2']:.1%}"
    assert [len(group.responses) for group in groups] == [4, 1]


def test_sampler_and_trainer_agree(finished):
    first = next(row for row in read_metrics(finished / "metrics.jsonl") if row["step"] == 1)
    assert first["rollout_corr/max_abs_diff"] <= 1e-5


def test_interrupted_run_goes_on_bit_for_bit(finished, config, tmp_path, monkeypatch):
    """A crash in the step after a checkpoint: step 3 is begun twice and counted once."""
    real, calls = programs.update_step, []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # the second update of the third step
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(programs, "update_step", crash)
    with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "run")
    monkeypatch.setattr(programs, "update_step", real)
    # What a kill leaves behind: half a line, and a dump from beyond the checkpoint.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "rew')
    _train(config, tmp_path / "run")
    _assert_same_results(_results(tmp_path / "run"), _results(finished))


def test_finished_run_runs_again_without_change(finished, config):
    before = _results(finished)
    outcome = _train(config, finished)
    _assert_same_results(_results(finished), before)
    assert [step for step, _ in outcome.evaluations] == [0, 2, 4]


def test_workdir_of_another_configuration_is_refused(finished, config):
    config.train.learning_rate = 3e-3
    config.rollout.group_size = 2
    with pytest.raises(
        workdirs.WorkdirError, match=r"learning_rate: 0\.001 in the workdir, 0\.003 now"
    ):
        _train(config, finished)


def test_foreign_folder_is_refused(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(workdirs.WorkdirError, match="not empty"):
        _train(config, tmp_path)


def test_workdir_in_use_is_refused(config, tmp_path):
    run = build(config)
    first = workdirs.Workdir(tmp_path / "run", config, facts(run))
    with pytest.raises(PlaceError, match="in use"):
        workdirs.Workdir(tmp_path / "run", config, facts(run))
    first.close()


def _forked(config, folder, parent, step=None):
    run = build(config)
    known = facts(run)
    fork = workdirs.fork(folder, parent, step, config, known)
    workdir = workdirs.Workdir(folder, config, known, fork=fork)
    try:
        return train.train(run, workdir)
    finally:
        workdir.close()


def _bytes(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_fork_without_changes_goes_on_as_its_parent(finished, config, tmp_path):
    before = _bytes(finished)
    _forked(config, tmp_path / "fork", finished, step=2)
    assert _bytes(finished) == before
    metrics, rollouts, weights = _results(finished)
    got = _results(tmp_path / "fork")
    assert [row["step"] for row in got[0]] == [3, 4]
    later = {name: text for name, text in rollouts.items() if name in got[1]}
    _assert_same_results(got, ([row for row in metrics if row["step"] > 2], later, weights))
    stored = json.loads((tmp_path / "fork" / "run.json").read_text())["forked_from"]
    assert stored == {"run": str(finished), "step": 2, "changed": {}}


def test_a_fork_may_change_fields_and_says_which(finished, config, tmp_path):
    config.train.learning_rate, config.num_steps = 1e-2, 5
    _forked(config, tmp_path / "fork", finished)
    stored = json.loads((tmp_path / "fork" / "run.json").read_text())["forked_from"]
    assert stored["step"] == 4
    assert stored["changed"] == {"train.learning_rate": [1e-3, 1e-2]}
    assert [row["actor/lr"] for row in _results(tmp_path / "fork")[0]] == [1e-2]
    # The same command again continues; another beginning is refused.
    _forked(config, tmp_path / "fork", finished)
    with pytest.raises(workdirs.WorkdirError, match="no checkpoint of that step; there are: 2, 4"):
        _forked(config, tmp_path / "none", finished, step=3)
    assert not (tmp_path / "none").exists()
    with pytest.raises(workdirs.WorkdirError, match="began from step 4"):
        _forked(config, tmp_path / "fork", finished, step=2)
    config.num_steps = 4
    with pytest.raises(workdirs.WorkdirError, match=r"begins at step 4 and config.num_steps is 4"):
        _forked(config, tmp_path / "other", finished)


def test_a_fork_of_another_optimizer_state_is_refused_by_field(finished, config, tmp_path):
    config.objective.kl_coef = 0.1  # a reference policy, which the parent has not
    with pytest.raises(CheckpointError, match=r"--fork=.*ref_params.*objective.kl_coef"):
        _forked(config, tmp_path / "fork", finished, step=2)


def test_a_run_that_lost_its_checkpoints_does_not_start_over(finished, config, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = _bytes(tmp_path / "run")
    with pytest.raises(workdirs.WorkdirError, match="checkpoints"):
        _train(config, tmp_path / "run")
    assert _bytes(tmp_path / "run") == before


def test_a_workdir_deleted_under_a_run_is_named(config, tmp_path, monkeypatch):
    real = train.rollout_step

    def deleted(run, state, carried, step, **kwargs):
        if step == 1:
            shutil.rmtree(tmp_path / "run")
        return real(run, state, carried, step, **kwargs)

    monkeypatch.setattr(train, "rollout_step", deleted)
    with pytest.raises(workdirs.WorkdirError, match="was deleted or moved"):
        _train(config, tmp_path / "run")


def test_a_run_on_files_goes_on(config, tmp_path):
    """What a manifest says of files must survive the way through JSON."""
    problems, _ = datasets.load("label_sums", num_terms=4)
    rows = [{"problem": problems[k].problem, "answer": problems[k].answer} for k in range(16)]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.options = {}
    config.data.name, config.data.path, config.data.cache_dir = "file", str(file), str(tmp_path)
    config.num_steps = 1
    _train(config, tmp_path / "run")
    config.num_steps = 2
    outcome = _train(config, tmp_path / "run")
    assert [step for step, _ in outcome.evaluations][-1] == 2
    assert build(config).data.overlap().at_least(1)


def test_a_write_that_broke_off_does_not_lock_the_folder(config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".run.json.tmp").write_text("{")
    workdirs.Workdir(folder, config, {}).close()


def test_damaged_checkpoint_is_named(finished, config, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "4").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    config.num_steps = 6
    with pytest.raises(CheckpointError, match=r"checkpoints/4 is damaged.*of step 2"):
        _train(config, tmp_path / "run")


def test_sampler_that_disagrees_is_refused(config, tmp_path):
    config.rollout.mismatch_limit = 1e-12
    with pytest.raises(stages.MismatchError, match="mismatch_limit"):
        _train(config, tmp_path / "run")


def test_a_sampler_of_int8_weights_trains_and_says_how_far_it_is_off(config, tmp_path):
    config.model.rollout_dtype, config.num_steps = "int8", 2
    config.rollout.mismatch_limit = 1.0
    run = build(config)
    assert (run.sampler.how.dtype, run.rule.logprobs.how.dtype) == ("bfloat16", "float32")
    weights = run.rollout_params(run.initial_params())
    kinds = {x.dtype.name for x in jax.tree.leaves(weights)}
    assert kinds == {"int8", "float32", "bfloat16"}
    memory = memory_estimate(config, run.model.config, (None, None), 0)
    assert memory["rollout weights"] == sum(x.nbytes for x in jax.tree.leaves(weights))
    _train(config, tmp_path / "run")
    first = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))[1]
    assert 1e-4 < first["rollout_corr/max_abs_diff"] < 1.0
    config.rollout.mismatch_limit = 1e-4
    with pytest.raises(stages.MismatchError, match="rollout_dtype=float32"):
        _train(config, tmp_path / "other")


def test_failing_verifier_leaves_the_loss(config, tmp_path):
    config.reward.options = {"digits": {"function": f"{__file__}:sometimes_broken"}}
    config.reward.max_failure_rate = 1.0
    config.num_steps = 1
    _train(config, tmp_path / "run")
    row = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))[1]
    assert row["reward/status/error"] > 0
    dump = (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    for record in map(json.loads, dump):
        if record["status"] == "error":
            assert record["advantage"] == 0


def sometimes_broken(response, answer):
    """A verifier that fails on responses of odd length."""
    if len(response) % 2:
        raise RuntimeError("cannot judge")
    return sum(c.isdigit() for c in response) / 12


@pytest.mark.parametrize(
    "fields",
    [
        *({"preset": name} for name in sorted(objectives.PRESETS)),
        {"preset": "luspo", "kl_coef": 0.1},
        {"preset": "grpo", "kl_coef": 0.1, "kl_placement": "reward"},
        {"preset": "luspo", "entropy_coef": 0.01, "top_entropy_quantile": 0.2},
        {"preset": "luspo", "correction": "tis+geometric-mask"},
        {"preset": "gspo", "correction": "icepop", "off_policy_max": 0.5},
        {"preset": "grpo", "correction": "binary-kl+m2po", "old_policy": "decoupled"},
        {"preset": "dapo", "dual_clip": 3.0},
    ],
    ids=str,
)
@pytest.mark.slow
def test_every_objective_takes_steps(config, tmp_path, fields):
    """Two steps of two updates each under every preset and term: finite, and something moves."""
    for name, value in fields.items():
        config.objective[name] = value
    config.num_steps = 2
    config.train.num_epochs = 2
    _train(config, tmp_path / "run")
    metrics, _, weights = _results(tmp_path / "run")
    assert all(np.isfinite(v) for k, v in metrics[-1].items() if k.startswith("actor/"))
    assert metrics[-1]["actor/grad_norm"] > 0
    assert metrics[-1]["actor/skipped_updates"] == 0
    if fields.get("kl_coef") and fields.get("kl_placement") != "reward":
        assert metrics[-1]["actor/kl_loss"] > 0
    if fields.get("correction"):
        assert 0 < metrics[-1]["rollout_corr/ess"] <= 1
    base = load_file(pathlib.Path(config.model.path) / "model.safetensors")
    assert any(np.any(weights[name] != base[name]) for name in base)


def test_rewards_of_a_group_are_among_the_parts_that_are_normalised_by_themselves(config, tmp_path):
    """GDPO reads no sum of rewards: a part that it does not know of would change nothing."""
    config.objective.preset = "gdpo"
    config.reward.group = {"kimi": 0.5}
    config.num_steps = 1
    _train(config, tmp_path / "run")
    lines = (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    score_B = np.zeros(16)
    for name, weight in {"digits": 1.0, "gsm8k": 1.0, "kimi": 0.5}.items():
        values = np.array([record["parts"][name] for record in records]).reshape(4, 4)
        centred = values - values.mean(1, keepdims=True)
        score_B += (weight * centred / (values.std(1, ddof=1, keepdims=True) + 1e-4)).ravel()
    expected = (score_B - score_B.mean()) / (score_B.std(ddof=1) + 1e-4)
    found = [record["advantage"] for record in records]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert any(record["parts"]["kimi"] for record in records)


@pytest.mark.parametrize(
    "fields",
    [{"overlong_filter": True}, {"gfpo_keep": 2, "gfpo_by": "reward_per_token"}, {"lspo_low": 0.5}],
    ids=str,
)
@pytest.mark.slow
def test_every_filter_takes_steps(config, tmp_path, fields):
    for name, value in fields.items():
        config.shaping[name] = value
    config.num_steps = 2
    _train(config, tmp_path / "run")
    last = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert 0 < last["shaping/trained_responses"] <= 16
    assert np.isfinite(last["actor/pg_loss"])


@pytest.mark.slow
def test_reference_policy_is_refreshed(config, tmp_path):
    """Copied after every step, the reference is the policy that starts the next: KL 0 there."""
    config.objective.kl_coef = 0.1
    config.train.num_minibatches = 1
    config.num_steps = 3
    _train(config, tmp_path / "fixed")
    config.train.ref_every = 1
    _train(config, tmp_path / "refreshed")
    fixed, refreshed = (
        list(read_metrics(tmp_path / name / "metrics.jsonl"))[-1] for name in ("fixed", "refreshed")
    )
    assert fixed["actor/kl_loss"] > 1e-5  # three small steps away from the base policy
    assert abs(refreshed["actor/kl_loss"]) < 1e-9


def test_dynamic_sampling_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    """The carried surplus is in the checkpoint: a run cut after one equals an uninterrupted run."""
    config.shaping.dynamic_sampling = True
    config.shaping.max_tries = 8
    config.rollout.prompts_per_step = 4
    config.eval.metric = "digits"
    config.reward.options = {"digits": {"function": f"{__file__}:many_digits"}}
    config.output.checkpoint_every = 1
    _train(config, tmp_path / "straight")
    rows = list(read_metrics(tmp_path / "straight" / "metrics.jsonl"))[1:]
    assert sum(row["shaping/groups_carried_in"] for row in rows) > 0
    assert all(row["shaping/trained_responses"] == 16 for row in rows)
    for row in rows:  # ages are measured in the steps that train on groups of an earlier policy
        carried = row["shaping/groups_carried_in"] > 0
        assert any(key.startswith("staleness/") for key in row) == carried
        if carried:
            shares = [row[f"staleness/share/age_{k}"] for k in range(5)]
            assert sum(shares) == pytest.approx(1)
            assert shares[0] < 1
    real = train.rollout_step

    def crash(run, state, carried, step, **kwargs):
        if step == 2:
            raise KeyboardInterrupt
        return real(run, state, carried, step, **kwargs)

    monkeypatch.setattr(train, "rollout_step", crash)
    with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "cut")
    monkeypatch.setattr(train, "rollout_step", real)
    _train(config, tmp_path / "cut")
    _assert_same_results(_results(tmp_path / "cut"), _results(tmp_path / "straight"))


def many_digits(response, answer):
    """1 for responses that are mostly digits, which by chance few are."""
    return float(sum(c.isdigit() for c in response) > 0.5 * len(response))


def _stepped(config, folder):
    """Metrics of every step of a run, what packing and the clock say aside; and its weights."""
    _train(config, folder)
    rows, _, weights = _results(folder)
    return [{k: v for k, v in row.items() if not k.startswith("packing/")} for row in rows], weights


def test_packed_run_is_the_same_run(config, tmp_path):
    """Steps in which everything that knows rows comes in: groups carried over, responses filtered
    as overlong, old and reference log-probs, a correction."""
    config.shaping.dynamic_sampling = True
    config.shaping.overlong_filter = True
    config.shaping.max_tries = 8
    config.eval.metric = "digits"
    config.reward.options = {"digits": {"function": f"{__file__}:many_digits"}}
    config.objective.kl_coef = 0.1
    config.objective.correction = "tis"
    config.seed, config.num_steps, config.eval.every = 1, 3, 0
    config.train.learning_rate = 1e-4
    expected, weights = _stepped(config, tmp_path / "rows")
    assert sum(row["shaping/groups_carried_in"] for row in expected[1:]) > 0
    assert 0 < expected[1]["shaping/trained_responses"] < 16
    config.train.packing = True
    config.train.microbatch_tokens = 48
    got, packed_weights = _stepped(config, tmp_path / "packed")
    for row, packed in zip(expected, got, strict=True):
        assert row.keys() == packed.keys()
        for name, value in row.items():
            np.testing.assert_allclose(packed[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, tensor in weights.items():
        np.testing.assert_allclose(packed_weights[name], tensor, rtol=1e-5, atol=1e-6)
    row = list(read_metrics(tmp_path / "packed" / "metrics.jsonl"))[1]
    assert row["packing/rows"] == 2 * row["packing/microbatches"]
    assert 0 <= row["packing/padding"] < 0.5


@pytest.mark.slow
def test_packed_quickstart_starts_as_the_quickstart(tmp_path):
    """The first step of the real configuration, scaled down."""
    config = quickstart.get_config()
    config.num_steps = config.train.warmup_steps = 1
    config.rollout.prompts_per_step, config.rollout.num_slots = 8, 64
    config.eval.num_problems, config.eval.num_samples, config.eval.num_slots = 4, 2, 8
    config.output.tensorboard = False
    config.length.every, config.length.share, config.length.objectives = 1, 0.5, "grpo"
    expected, _ = _stepped(config, tmp_path / "rows")
    assert "length/pressure/own" in expected[1]
    config.train.packing = True
    config.train.pack_length, config.train.microbatch_tokens = 112, 448
    got, _ = _stepped(config, tmp_path / "packed")
    for name, value in expected[1].items():
        if not name.startswith("val-"):  # one token that flips on the way to a text
            np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": True}, r"microbatch_tokens=0 holds no packed row of 24 tokens"),
        ({"packing": True, "microbatch_tokens": 23}, r"microbatch_tokens=23 holds no packed row"),
        (
            {"packing": True, "microbatch_tokens": 64, "pack_length": 20},
            r"pack_length=20 is shorter .* 12 \+ 12 = 24",
        ),
        (
            {"packing": True, "microbatch_tokens": 64, "num_microbatches": 2},
            r"num_microbatches=2 cannot be set with train.packing.*microbatch_tokens=64",
        ),
        ({"microbatch_tokens": 64}, r"microbatch_tokens=64 is of packed rows: set train.packing"),
        ({"pack_length": 64}, r"pack_length=64 is of packed rows"),
    ],
    ids=str,
)
def test_packing_that_cannot_be_is_refused(config, fields, message):
    for name, value in fields.items():
        config.train[name] = value
    with pytest.raises(ConfigError, match=message):
        checks.check(config)


def test_arithmetic_says_how_rows_are_packed(config):
    assert "in micro-batches of 8 rows × up to 24 tokens" in str(batch_arithmetic(config))
    config.train.packing, config.train.microbatch_tokens = True, 100
    sizes = batch_arithmetic(config)
    assert "micro-batches of 4 packed rows × 24 tokens" in str(sizes)
    assert (sizes.rows_per_microbatch, sizes.pack_length) == (4, 24)
    assert sizes.responses_per_microbatch == 4


def test_a_run_with_few_pages_is_that_with_many(finished, config, tmp_path):
    config.rollout.page_size = 4
    sampler = build(config).sampler
    config.rollout.cache_gb = (sampler.least_bytes + 3 * sampler.page_bytes) / 1e9
    run = build(config)
    workdir = workdirs.Workdir(tmp_path / "run", config, facts(run))
    train.train(run, workdir)
    workdir.close()
    got, expected = _results(tmp_path / "run"), _results(finished)
    assert sum(row.get("rollout/preemptions", 0) for row in got[0]) > 10
    assert_near_results(without_sampler_counts(got), without_sampler_counts(expected))


def test_a_run_on_a_mesh_is_that_of_one_device(finished, config, tmp_path):
    config.mesh.data, config.mesh.context = 2, 2
    config.rollout_mesh.context = 2
    run = build(config, jax.devices())
    assert run.rule.logprobs.how.layout.mesh.shape["fsdp"] == 2
    workdir = workdirs.Workdir(tmp_path / "run", config, facts(run))
    train.train(run, workdir)
    workdir.close()
    got, expected = _results(tmp_path / "run"), _results(finished)
    assert_near_results(without_sampler_counts(got), without_sampler_counts(expected))


def test_a_run_may_be_older_than_a_field():
    config = fields.default_config()
    old = json.loads(json.dumps(fields.flat(config)))
    del old["train.freeze_vision"], old["data.max_pixels"]
    assert fields.changes(old, config) == {}
    config.data.max_pixels = 1000
    assert fields.changes(old, config) == {"data.max_pixels": (0, 1000)}


def test_a_run_may_be_older_than_the_name_of_a_field():
    """Its value is compared, and read, under the new name."""
    config = fields.default_config()
    old = json.loads(json.dumps(fields.flat(config)))
    old["model.experts"] = old.pop("model.expert_kernel")
    assert fields.changes(old, config) == {}
    old["model.experts"] = "blocks"
    assert fields.changes(old, config) == {"model.expert_kernel": ("blocks", "auto")}
    fields.assign(config, old)
    assert config.model.expert_kernel == "blocks"


def test_a_tracker_shows_what_the_files_hold_and_one_that_fails_ends_nothing(
    config, tmp_path, monkeypatch
):
    good, bad = tracker_cases.Recorder(), tracker_cases.Raising("log")
    monkeypatch.setattr(checks, "not_installed", lambda text: ())
    monkeypatch.setitem(registry.TRACKERS, "mlflow", lambda: good)
    monkeypatch.setitem(registry.TRACKERS, "wandb", lambda: bad)
    config.num_steps, config.output.export = 2, False
    config.output.trackers, config.output.run_name = "mlflow,wandb", "mine"
    config.output.completions_every, config.output.num_completions = 2, 3
    _train(config, tmp_path / "run")
    rows = {row.pop("step"): row for row in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    logged = {call[1]: call[2] for call in good.calls if call[0] == "log"}
    assert list(logged) == list(rows) == [0, 1, 2]
    for step, row in rows.items():
        assert logged[step] == {k: v for k, v in row.items() if np.isfinite(v)}
    ((_, step, table),) = [call for call in good.calls if call[0] == "table"]
    dumped = (tmp_path / "run" / "rollouts" / "step_000002.jsonl").read_text().splitlines()
    expected = [json.loads(line) for line in dumped[:3]]
    assert step == 2
    assert [dict(zip(table.columns, row, strict=True)) for row in table.rows] == [
        {name: record[name] for name in table.columns} for record in expected
    ]
    assert {"prompt", "response", "reward", "advantage", "length", "truncated"} < {*table.columns}
    assert good.calls[-1] == ("close", False)
