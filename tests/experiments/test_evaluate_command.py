"""The evaluate command on the embedded model, from sampling to comparison."""

import csv
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import quickstart
from experiments.command import UsageError
from experiments.evaluation import comparison, plan, policy, scoring, session, storage
from experiments.evaluation.plan import Options
from luspo_jax import prompts
from luspo_jax.benchmarks import BENCHMARKS, BenchmarkError, Summary, protocol
from luspo_jax.experience import held_out
from luspo_jax.learner.state import initial_state
from luspo_jax.models import decoder, decoder_weights
from luspo_jax.models.decoder_config import decoder_config
from luspo_jax.rewards.answers.math_equal import VERSION
from luspo_jax.rewards.gsm8k import gsm8k
from luspo_jax.run import workdir as workdirs
from luspo_jax.run.build import update_rule
from luspo_jax.run.checkpoint import Checkpointer, CheckpointError
from luspo_jax.run.model import load_model
from luspo_jax.run.workdir import WorkdirError

GSM8K = gsm8k().label

MODEL = "embedded:label_sums"
CHOSEN = [BENCHMARKS["label_sums"]]
OPTIONS = Options(
    protocol=protocol("dapo", max_response_length=40, num_samples=4),
    limit=6,
    num_slots=8,
    save_every=2,
    workers=1,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An evaluation of six problems in three parts, and the table it printed."""
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    return folder, session.run(MODEL, CHOSEN, folder, OPTIONS)


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def _parts(folder):
    return {p.name: p.read_bytes() for p in (folder / "generations" / "label_sums").iterdir()}


def _results(folder):
    return json.loads((folder / "results.json").read_text())


def test_results_say_how_they_came_about(finished):
    folder, table = finished
    stored = _results(folder)
    entry = stored["benchmarks"]["label_sums"]
    assert stored["protocol"] == OPTIONS.protocol.label
    assert {"seed", "weights", "packages", "model", "sampling"} <= set(stored)
    assert entry["scorers"] == {"gsm8k": GSM8K}
    assert (entry["problems"], entry["num_samples"]) == (6, 4)
    assert entry["template_hash"]
    assert entry["problems_hash"]
    assert set(entry["results"]) == {field.name for field in dataclasses.fields(Summary)}
    low, high = entry["results"]["accuracy_ci95"]
    assert 0 <= low <= entry["results"]["accuracy"] <= high <= 1
    report = (folder / "results.md").read_text()
    for shown in (OPTIONS.protocol.label, GSM8K, entry["template_hash"], "first 6 of"):
        assert shown in report
    assert "avg@n" in table


def test_every_generation_is_kept(finished):
    lines = b"".join(_parts(finished[0]).values()).decode().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 24
    assert {(r["problem_id"], r["sample_id"]) for r in records} == {
        (p, s) for p in {r["problem_id"] for r in records} for s in range(4)
    }
    first = records[0]
    assert len(first["tokens"]) == first["length"]
    assert {"value", "status", "prediction", "parts"} <= set(first["verdict"])


def test_stopped_evaluation_goes_on_identically(finished, tmp_path, monkeypatch):
    """A crash in the second part; the first one is not sampled again, and all bytes agree."""
    real, calls = held_out.ask, []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(held_out, "ask", crash)
    with pytest.raises(KeyboardInterrupt):
        session.run(MODEL, CHOSEN, tmp_path / "out", OPTIONS)
    assert list(_parts(tmp_path / "out")) == ["part_00000.jsonl"]
    with pytest.raises(UsageError, match="8 of 24 responses"):
        comparison.compare(finished[0], tmp_path / "out")
    session.run(MODEL, CHOSEN, tmp_path / "out", OPTIONS)
    assert len(calls) == 4
    assert _parts(tmp_path / "out") == _parts(finished[0])
    assert _results(tmp_path / "out") == _results(finished[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 1}, "seed: 0 in the workdir, 1 now"),
        ({"protocol": protocol("qwen3", max_response_length=40, num_samples=4)}, "protocol: "),
        ({"limit": 4}, "label_sums.problems: 6 in the workdir, 4 now"),
    ],
)
def test_another_evaluation_is_refused(copy, fields, message):
    with pytest.raises(UsageError, match=message):
        session.run(MODEL, CHOSEN, copy, dataclasses.replace(OPTIONS, **fields))


def test_protocol_that_does_not_fit_says_what_does(tmp_path):
    options = dataclasses.replace(OPTIONS, protocol=protocol("dapo"))
    with pytest.raises(UsageError, match=r"give --max_response_length=\d+ or less"):
        session.run(MODEL, CHOSEN, tmp_path / "out", options)


def test_rescoring_changes_nothing_and_counts_what_it_changes(copy):
    before = _parts(copy)
    assert "0 verdicts changed" in scoring.rescore(copy, OPTIONS)
    assert _parts(copy) == before
    path = storage.part_path(copy, "label_sums", 0)
    records = storage.read_part(path)
    other = dataclasses.replace(records[0], response="nothing", scorers={"gsm8k": "gsm8k@0"})
    storage.write_part(path, [other, *records[1:]])
    with pytest.raises(UsageError, match="different scorers"):
        comparison.compare(copy, copy)
    assert "1 verdicts changed" in scoring.rescore(copy, OPTIONS)
    statuses = _results(copy)["benchmarks"]["label_sums"]["results"]["statuses"]
    assert statuses["unparsed"] >= 1


def test_a_rescore_that_stopped_is_not_compared(finished, copy):
    """Records of other scorers than the manifest states are no evaluation."""
    manifest = storage.read_manifest(copy)
    manifest["benchmarks"]["label_sums"]["scorers"] = {"gsm8k": "gsm8k@0"}
    storage.write_manifest(copy, manifest)
    with pytest.raises(UsageError, match="judged by different scorers"):
        comparison.compare(copy, copy)


def test_half_a_surrogate_pair_is_kept(finished):
    """A response may hold what UTF-8 cannot."""
    record = storage.read_part(storage.part_path(finished[0], "label_sums", 0))[0]
    record = dataclasses.replace(record, response="\ud83d")
    line = record.to_json()
    line.encode("utf-8")
    assert type(record).from_json(line, "here") == record


def test_comparison_with_itself_is_zero(finished):
    text = comparison.compare(finished[0], finished[0])
    assert "+0.0 points" in text
    assert "equal on 6" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"sampling": {}, "protocol": "greedy"}, "protocols: dapo .* and greedy"),
        (lambda m: _with(m, scorers={"gsm8k": "gsm8k@x"}), f"scorers: {GSM8K} .* and gsm8k@x"),
        (lambda m: _with(m, problems_hash="0"), "label_sums: problems: "),
        (lambda m: _with(m, template="chat"), "prompt template: plain and chat"),
        (lambda m: m | {"benchmarks": {}}, "no benchmark in common"),
    ],
)
def test_comparison_of_different_things_is_refused(finished, copy, change, message):
    storage.write_manifest(copy, change(storage.read_manifest(copy)))
    with pytest.raises(UsageError, match=message):
        comparison.compare(finished[0], copy)


def _with(manifest, **fields):
    entry = manifest["benchmarks"]["label_sums"] | fields
    return manifest | {"benchmarks": {"label_sums": entry}}


def _prediction_file(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", "prediction"])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _problems():
    return plan.examples(CHOSEN, OPTIONS)["label_sums"][0]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_predictions_are_scored_the_same_way(tmp_path, suffix):
    rows = [{"id": p.id, "prediction": f"so #### {p.answer}"} for p in _problems()]
    rows[0]["prediction"], rows[1]["prediction"] = "I do not know", ""
    file = _prediction_file(tmp_path / f"predictions{suffix}", rows)
    table = scoring.predictions(file, CHOSEN[0], tmp_path / "out", OPTIONS)
    results = _results(tmp_path / "out")["benchmarks"]["label_sums"]["results"]
    assert results["accuracy"] == pytest.approx(4 / 6)
    assert results["statuses"] == {"ok": 4, "unparsed": 2}
    assert "sampling unknown" in table


def test_predictions_are_not_compared_with_a_sampled_evaluation(finished, tmp_path):
    rows = [{"id": p.id, "prediction": ""} for p in _problems()]
    file = _prediction_file(tmp_path / "p.jsonl", rows)
    table = scoring.predictions(file, CHOSEN[0], tmp_path / "out", OPTIONS)
    assert "no response states an answer" in table
    with pytest.raises(UsageError, match="protocols: "):
        comparison.compare(finished[0], tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda p: [], "there are no predictions"),
        (lambda p: [{"id": "x", "prediction": ""}], "unknown ids x"),
        (lambda p: [{"id": p[0].id, "prediction": ""}], "5 problems of label_sums have no"),
        (lambda p: [{"id": q.id, "prediction": ""} for q in [*p, p[2]]], "most ids have 1"),
        (lambda p: [{"id": p[0].id, "text": ""}], "no column 'prediction'"),
    ],
)
def test_unusable_predictions_are_named(tmp_path, rows, message):
    file = _prediction_file(tmp_path / "p.jsonl", rows(_problems()))
    with pytest.raises(ValueError, match=message):
        scoring.predictions(file, CHOSEN[0], tmp_path / "out", OPTIONS)


def test_data_is_looked_for_by_name(tmp_path):
    (tmp_path / "aime24").mkdir()
    (tmp_path / "math500.jsonl").touch()
    chosen = [BENCHMARKS[name] for name in ("aime24", "math500", "label_sums")]
    assert plan.data_paths(str(tmp_path), chosen) == {
        "aime24": tmp_path / "aime24",
        "math500": tmp_path / "math500.jsonl",
    }
    # The same problems asked in another way: their own place first, then the dataset's.
    boxed = [BENCHMARKS["aime24_boxed"]]
    assert plan.data_paths(str(tmp_path), boxed) == {"aime24_boxed": tmp_path / "aime24"}
    (tmp_path / "aime24_boxed.jsonl").touch()
    own = tmp_path / "aime24_boxed.jsonl"
    assert plan.data_paths(str(tmp_path), boxed) == {"aime24_boxed": own}
    named = plan.data_paths("aime24=x.jsonl,math500=y", chosen)
    assert named == {"aime24": pathlib.Path("x.jsonl"), "math500": pathlib.Path("y")}
    for text, message in (
        ("", "--data=FOLDER or --data=aime24=FILE"),
        ("aime25=x", "names aime25, which"),
        (f"{tmp_path},{tmp_path}", "takes one folder"),
        (str(tmp_path / "aime24"), "holds nothing for aime24"),
    ):
        with pytest.raises(UsageError, match=message):
            plan.data_paths(text, chosen)


def test_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        policy.load(str(tmp_path / "none"), step="latest", dtype="float32")
    (tmp_path / "run.json").write_text('{"config": {"nonsense": 1}}')
    with pytest.raises(WorkdirError, match="does not fit this version"):
        policy.load(str(tmp_path), step="latest", dtype="float32")


def test_checkpoint_of_a_run_is_a_model(tmp_path):
    """The weights of the step that was asked for, at no more than the run's folder."""
    config = quickstart.get_config()
    model = load_model(config)
    rule = update_rule(config, model)
    workdirs.Workdir(tmp_path / "run", config, {}).close()
    with pytest.raises(CheckpointError, match="comes with the first checkpoint"):
        policy.load(str(tmp_path / "run"), step="latest", dtype="float32")
    base = decoder_weights.load_params(model.folder, model.config)
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", keep_latest=2, keep_best=1)
    for step, scale in ((1, 1.0), (2, 2.0)):
        params = jax.tree.map(lambda x, scale=scale: scale * x, base)
        checkpointer.save(step, initial_state(params, rule), {"a": 1}, metric=1 / step)
    checkpointer.close()
    latest, best = (
        policy.load(str(tmp_path / "run"), step=step, dtype="float32")
        for step in ("latest", "best")
    )
    assert latest.name.endswith("step 2")
    assert best.name.endswith("step 1")
    assert best.digest == policy.load(MODEL, step="latest", dtype="float32").digest
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), latest.params, base)
    with pytest.raises(CheckpointError, match="latest, best or a number"):
        policy.load(str(tmp_path / "run"), step="newest", dtype="float32")
    # A run under way may be read: nothing in its folder changes.
    busy = workdirs.Workdir(tmp_path / "run", config, {})
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    again = policy.load(str(tmp_path / "run"), step="latest", dtype="float32")
    assert again.digest == latest.digest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    busy.close()


def _command(*arguments):
    root = pathlib.Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", *arguments],
        cwd=root, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=x", "--benchmarks=aime-24", "--workdir=w"], "did you mean 'aime24'"),
        (["--model=x", "--benchmarks=aime24", "--protocol=qwen", "--workdir=w"], "'qwen3'"),
        (["--benchmarks=aime24"], "give one of --model, --rescore"),
        (["--compare=a"], "--compare takes two folders"),
    ],
)
def test_mistakes_get_one_message(arguments, message):
    ran = _command(*arguments)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_nonsense_protocol_is_refused_before_the_model_is_read():
    with pytest.raises(BenchmarkError, match="num_samples"):
        protocol("greedy", num_samples=32)


@pytest.mark.slow
def test_real_files_with_a_random_model(shared_data, tmp_path):
    """AIME 2024 and MATH500 through the Qwen3 tokenizer, chat template and both scorers."""
    source = shared_data / "qwen" / "Qwen3-1.7B"
    fields = {
        "num_hidden_layers": 1, "max_window_layers": 1, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    staged = tmp_path / "staged"
    shutil.copytree(source, staged)
    (staged / "config.json").write_text(
        json.dumps(json.loads((source / "config.json").read_text()) | fields)
    )
    architecture = decoder_config(json.loads((staged / "config.json").read_text()))
    params = jax.device_get(decoder.init_params(jax.random.key(0), architecture))
    decoder_weights.export(tmp_path / "model", params, architecture, source=staged)
    options = dataclasses.replace(
        OPTIONS,
        protocol=protocol("qwen3", max_response_length=8, num_samples=2),
        data=str(shared_data / "math_eval"),
        cache_dir=str(tmp_path / "cache"),
        limit=3,
    )
    chosen = [BENCHMARKS["aime24"], BENCHMARKS["math500"]]
    table = session.run(str(tmp_path / "model"), chosen, tmp_path / "out", options)
    stored = _results(tmp_path / "out")["benchmarks"]
    assert stored["aime24"]["dataset"]["sha256"]
    assert stored["math500"]["results"]["by_field"].keys() == {"subject", "level"}
    assert stored["math500"]["scorers"] == {"boxed_math": f"boxed_math@{VERSION}"}
    assert all(entry["results"]["truncated"] > 0 for entry in stored.values())
    assert "first 3 of 30" in table


@pytest.mark.parametrize(
    ("name", "remedy"), [("label_sums", "no response can follow it"), ("mathvista", "--max_pixels")]
)
def test_a_prompt_that_fills_the_model_is_told_what_would_help(name, remedy):
    record = prompts.PromptRecord(0, np.zeros(200, np.int32), "", None)
    with pytest.raises(UsageError, match="has 200 tokens, and the model holds 128") as refused:
        plan._fitting(BENCHMARKS[name], [record], 128, OPTIONS)
    assert remedy in str(refused.value)
    assert ("--max_pixels" in str(refused.value)) == (name == "mathvista")
