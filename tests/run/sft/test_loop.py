"""Supervised runs on a tiny random model: artefacts, resume, refusals, and what RL starts from."""

import json
import pathlib
import signal
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import figures
from experiments.evaluation.policy import stored_policy
from luspo_jax import train
from luspo_jax.datasets import DataError
from luspo_jax.hosts.guard import Preempted
from luspo_jax.hosts.values import ConfigError
from luspo_jax.learner import programs
from luspo_jax.metrics import read_metrics
from luspo_jax.models import char_tokenizer, decoder, decoder_weights
from luspo_jax.models.decoder_config import DecoderConfig, hf_config
from luspo_jax.run import build as rl
from luspo_jax.run import fields
from luspo_jax.run.sft.build import build, facts
from luspo_jax.run.sft.loop import fine_tune
from luspo_jax.run.workdir import Workdir, WorkdirError, fork, stored_config
from luspo_jax.sharding import MeshError

MODEL = DecoderConfig(
    model_type="qwen3", vocab_size=32, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=2,
    num_kv_heads=1, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6, qkv_bias=False, qk_norm=True,
    tie_embeddings=True, max_position=64, eos_token_ids=(char_tokenizer.END_ID,),
    pad_token_id=char_tokenizer.PAD_ID,
)  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    source = folder / "tokenizer"
    source.mkdir()
    char_tokenizer.write_tokenizer(source, " =?.0123456789abcdefghij", max_length=64)
    (source / "config.json").write_text(json.dumps(hf_config(MODEL)))
    decoder_weights.export(
        folder / "hf", decoder.init_params(jax.random.key(1), MODEL), MODEL, source=source
    )
    return folder / "hf"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Forty short sums, each row with its text as a pair and as a chat."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for n in range(40):
        prompt, response = f"a{n % 10}b{n // 10}?", f"#### {(n % 10 + n // 10) % 5}"
        messages = [
            {"role": "user", "content": prompt}, {"role": "assistant", "content": response},
        ]  # fmt: skip
        lines.append(json.dumps({"prompt": prompt, "response": response, "messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def config(model_folder, rows):
    config = fields.default_sft_config()
    config.num_steps = 4
    config.model.path = str(model_folder)
    config.data.path = str(rows)
    config.data.held_out_fraction = 0.2
    config.data.max_length = 16
    config.train.batch_size = 8
    config.train.num_length_buckets = 1
    config.train.learning_rate = 1e-2
    config.train.warmup_steps = 2
    config.eval.every = 2
    config.eval.num_generations = 3
    config.eval.max_response_length = 8
    config.eval.num_slots = 4
    config.output.checkpoint_every = 2
    config.output.tensorboard = False
    return config


def _train(config, folder):
    run = build(config, jax.devices()[:1])
    workdir = Workdir(folder, config, facts(run))
    try:
        return fine_tune(run, workdir)
    finally:
        workdir.close()


def _results(folder):
    metrics = [
        {k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    answers = {p.name: p.read_text() for p in sorted((folder / "answers").iterdir())}
    return metrics, answers, load_file(folder / "export" / "model.safetensors")


def _assert_same(got, expected):
    assert got[:2] == expected[:2]
    assert got[2].keys() == expected[2].keys()
    for name, tensor in got[2].items():
        np.testing.assert_array_equal(tensor, expected[2][name], err_msg=name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder for the uninterrupted run, made by the first test that needs it."""
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def finished(straight, config):
    if not straight.exists():
        _train(config, straight)
    return straight


def test_a_run_leaves_all_artefacts(finished, config):
    metrics, answers, weights = _results(finished)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert {"sft/loss", "sft/trained_tokens", "actor/grad_norm", "actor/lr"} <= set(metrics[1])
    assert not any(name.startswith(("reward", "clip_ratio", "rollout")) for name in metrics[1])
    for row in (metrics[0], metrics[2], metrics[4]):
        assert row["held_out/perplexity"] == pytest.approx(np.exp(row["held_out/loss"]))
        assert {"answers/length/mean", "answers/reference_length/mean"} <= set(row)
    assert "held_out/loss" not in metrics[1]
    assert metrics[4]["held_out/loss"] < metrics[0]["held_out/loss"] - 0.5
    assert metrics[4]["training/epoch"] == pytest.approx(1.0)
    assert [row["actor/lr"] for row in metrics[1:]] == [5e-3, 1e-2, 1e-2, 1e-2]
    assert sorted(answers) == [f"step_00000{n}.jsonl" for n in (0, 2, 4)]
    first = json.loads(answers["step_000000.jsonl"].splitlines()[0])
    assert first["reference_length"] == 4  # "####", " ", a digit, the end
    assert first["reference"].startswith("#### ")
    assert first["length"] == len(first["tokens"]) <= 8
    base = load_file(pathlib.Path(config.model.path) / "model.safetensors")
    assert any(np.any(weights[name] != base[name]) for name in base)
    stored = json.loads((finished / "run.json").read_text())
    assert (stored["config"]["data.turns"], stored["datasets"][0]["rows"]) == ("last", 40)


def test_an_interrupted_run_goes_on_bit_for_bit(finished, config, tmp_path, monkeypatch):
    """A crash in the step after a checkpoint: step 3 is begun twice and counted once."""
    real, calls = programs.update_step, []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(programs, "update_step", crash)
    with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "run")
    monkeypatch.setattr(programs, "update_step", real)
    (tmp_path / "run" / "answers" / "step_000004.jsonl").write_text("from beyond the checkpoint")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "sft')
    _train(config, tmp_path / "run")
    _assert_same(_results(tmp_path / "run"), _results(finished))


def test_a_run_that_is_asked_to_end_saves_and_goes_on_bit_for_bit(finished, config, tmp_path):
    """SIGTERM during step 3, of which there would be no checkpoint."""
    run = build(config)
    real, taken = run.data.stream.take, []

    def asked(count):
        taken.append(count)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(count)

    run.data.stream.take = asked
    with Workdir(tmp_path / "run", config, facts(run)) as workdir, pytest.raises(Preempted):
        fine_tune(run, workdir)
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    _train(config, tmp_path / "run")
    _assert_same(_results(tmp_path / "run"), _results(finished))


def test_an_adapter_is_trained_alone_and_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    config.lora.rank = 2
    config.lora.base = "float32"
    _train(config, tmp_path / "straight")
    real, calls = programs.update_step, []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(programs, "update_step", crash)
    with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "run")
    monkeypatch.setattr(programs, "update_step", real)
    _train(config, tmp_path / "run")
    got, expected = _results(tmp_path / "run"), _results(tmp_path / "straight")
    _assert_same(got, expected)
    base = load_file(pathlib.Path(config.model.path) / "model.safetensors")
    changed = {name for name in base if np.any(got[2][name] != base[name])}
    assert changed == {name for name in base if "_proj." in name}
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert got[0][4]["held_out/loss"] < got[0][0]["held_out/loss"] - 0.1


def test_a_finished_run_runs_again_without_change_and_another_is_refused(finished, config):
    before = _results(finished)
    outcome = _train(config, finished)
    _assert_same(_results(finished), before)
    assert [step for step, _ in outcome.evaluations] == [0, 2, 4]
    config.train.aggregation = "seq-mean-token-mean"
    with pytest.raises(WorkdirError, match=r"train\.aggregation: 'token-mean' in the workdir"):
        _train(config, finished)


def test_chats_are_trained_as_pairs_are(finished, config, tmp_path):
    """The tokenizer writes a chat as its texts, one after another: the same tokens."""
    config.data.messages_column = "messages"
    _train(config, tmp_path / "run")
    _assert_same(_results(tmp_path / "run"), _results(finished))


def test_packed_rows_and_two_devices_train_alike(finished, config, tmp_path):
    expected = _results(finished)
    config.train.packing, config.train.microbatch_tokens = True, 64
    config.train.pack_length = 32
    run = build(config, jax.devices()[:2])
    workdir = Workdir(tmp_path / "run", config, facts(run))
    fine_tune(run, workdir)
    workdir.close()
    metrics, _, weights = _results(tmp_path / "run")
    for a, b in zip(metrics, expected[0], strict=True):
        for name in {"sft/loss", "held_out/loss", "actor/grad_norm"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    for name, tensor in weights.items():
        scale = np.abs(expected[2][name]).max()
        assert np.abs(tensor - expected[2][name]).max() <= 2e-3 * scale, name


@pytest.mark.slow
def test_rl_begins_from_the_export(finished, config, tmp_path):
    config = fields.default_config()
    config.num_steps = 1
    config.model.path = str(finished / "export")
    config.data.name, config.data.options = "label_sums", {"num_terms": 4}
    config.data.max_prompt_length = 12
    config.reward.parts = {"gsm8k": 1.0}
    config.rollout.prompts_per_step = config.rollout.group_size = 4
    config.rollout.max_response_length, config.rollout.num_slots = 12, 8
    config.train.num_length_buckets = 1
    config.eval.num_problems, config.eval.num_samples, config.eval.num_slots = 4, 2, 8
    config.output.tensorboard = False
    run = rl.build(config, jax.devices()[:1])
    workdir = Workdir(tmp_path / "rl", config, rl.facts(run))
    outcome = train.train(run, workdir)
    workdir.close()
    assert outcome.final.num_problems == 4
    with pytest.raises(WorkdirError, match="holds a run with another configuration"):
        Workdir(finished, config, rl.facts(run))


def test_a_checkpoint_is_read_as_that_of_rl(finished):
    assert stored_config(finished).train.batch_size == 8
    stored = stored_policy(finished, "latest")
    assert stored.step == 4
    exported = decoder_weights.load_params(finished / "export", MODEL, dtype=np.float32)
    jax.tree.map(np.testing.assert_array_equal, stored.params, exported)
    assert stored_policy(finished, "best").step in (2, 4)


def test_rl_does_not_fork_from_it_and_it_is_drawn(finished, tmp_path):
    with pytest.raises(WorkdirError, match=r"holds a supervised run: .*model\.path=.*/export"):
        fork(tmp_path / "rl", finished, None, fields.default_config(), {})
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("metrics.jsonl", "run.json"):
        (copy / name).write_bytes((finished / name).read_bytes())
    assert figures.run_figure(copy).stat().st_size > 20_000


def test_nothing_held_out(config, tmp_path):
    config.data.held_out_fraction, config.num_steps = 0.0, 1
    outcome = _train(config, tmp_path / "run")
    assert "nothing is held out" in str(outcome.final)
    assert not (tmp_path / "run" / "answers").exists()


def test_what_is_left_out_and_what_is_on_both_sides_is_said(config, rows, tmp_path):
    long = {"prompt": "a1b0?", "response": "0" * 30}
    (tmp_path / "other.jsonl").write_text(
        "".join([rows.read_text().splitlines(keepends=True)[0], json.dumps(long) + "\n"])
    )
    config.data.held_out_path, config.data.held_out_fraction = str(tmp_path / "other.jsonl"), 0.0
    told = build(config, jax.devices()[:1]).data.described
    assert "too long" not in told["training"]
    assert told["held out"].startswith("1 demonstrations of other.jsonl (2 rows)")
    assert told["held out"].endswith(
        "; 1 too long, left out (rows 2); PROMPTS OF 1 OF THEM ARE TRAINED ON"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.path": ""}, r"data\.path is empty"),
        ({"data.path": "absent.jsonl"}, r"data\.path: no file absent\.jsonl"),
        ({"data.prompt_column": "question"}, r"rows\.jsonl.*no column 'question'"),
        ({"data.held_out_path": "x.jsonl"}, r"held_out_path and data\.held_out_fraction both"),
        ({"data.max_length": 65}, r"data\.max_length=65: the model of .* holds 64"),
        ({"data.max_length": 5}, r"all .* demonstrations are longer"),
        ({"data.too_long": "refuse", "data.max_length": 8}, r"longer than data\.max_length=8"),
        ({"data.too_long": "truncate"}, r"data\.too_long='truncate' does not exist"),
        ({"data.turns": "all"}, r"data\.turns=all is of chats"),
        ({"data.template": "no mark"}, r"data\.template='no mark'"),
        ({"data.template": "{problem} {hint}"}, r"names the column \{hint\}"),
        ({"data.system_prompt": "hi"}, r"data\.template='plain' is no chat template"),
        ({"data.name": "label_sums"}, r"data\.path is of data\.name=file"),
        ({"train.num_microbatches": 3}, r"num_microbatches=3 does not divide train\.batch_size=8"),
        ({"train.microbatch_tokens": 9}, r"microbatch_tokens=9 is of packed rows"),
        ({"train.packing": True}, r"microbatch_tokens=0 holds no packed row of 16"),
        ({"train.aggregation": "token-sum"}, r"train\.aggregation='token-sum' does not exist"),
        ({"train.router_aux_coef": 0.1}, r"router_aux_coef=0\.1 is of a mixture of experts"),
        ({"eval.num_samples": 2}, r"eval\.num_samples=2 must be 1 at eval\.temperature=0"),
        ({"eval.max_response_length": 60}, r"at most 59 are left"),
        ({"output.keep_best": -1}, r"output\.keep_best=-1 must be at least 0"),
    ],
)
def test_bad_values_are_refused_by_name(config, changes, message):
    for name, value in changes.items():
        section, _, field = name.partition(".")
        config[section][field] = value
    with pytest.raises((ConfigError, DataError), match=message):
        build(config, jax.devices()[:1])


def test_unknown_fields_are_refused_with_the_nearest(config):
    with config.unlocked():
        config.train.batchsize = 3
    with pytest.raises(ConfigError, match=r"train\.batchsize: did you mean 'train\.batch_size'"):
        build(config)
    with config.unlocked():
        del config.train["batchsize"], config.train["batch_size"]
    with pytest.raises(ConfigError, match=r"missing train\.batch_size: .*default_sft_config"):
        build(config)


def test_processes_that_only_sample_are_refused_by_name(config):
    config.rollout_mesh.apart = 1
    devices = [types.SimpleNamespace(process_index=i) for i in range(2)]
    with pytest.raises(MeshError, match=r"rollout_mesh\.apart=1: in supervised .* set it to 0"):
        build(config, devices=devices)
