"""Commands on runs in buckets: what reads them does, and what cannot write there says so."""

import ast
import contextlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import quickstart
from experiments import command, figures
from experiments.evaluation import plan, policy
from experiments.responses import reading
from luspo_jax.benchmarks.registry import benchmarks
from luspo_jax.hosts import fetched, files
from luspo_jax.learner.state import initial_state
from luspo_jax.metrics import json_line
from luspo_jax.models import decoder_weights
from luspo_jax.models.locate import EMBEDDED
from luspo_jax.run import workdir as workdirs
from luspo_jax.run.build import update_rule
from luspo_jax.run.checkpoint import Checkpointer
from luspo_jax.run.model import load_model
from luspo_jax.run.workdir import WorkdirError
from tests.bucket_cases import bucket_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESPONSE = {
    "prompt_id": 3, "sample_id": 0, "prompt": "p", "response": "r", "answer": "1", "reward": 1.0,
    "parts": {"gsm8k": 1.0}, "status": "ok", "prediction": "1", "advantage": 0.0, "length": 2,
    "truncated": False,
}  # fmt: skip


@pytest.fixture
def bucket(bucket_ports, monkeypatch, tmp_path):
    """A run with the responses of two steps."""
    bucket = bucket_of("gs", bucket_ports["gs"], monkeypatch, tmp_path)
    bucket.write("run.json", json.dumps({"config": {"reward.parts.gsm8k": 1.0}}).encode())
    rows = [json_line(step, {"reward": step / 2, "val-core/x/acc": 0.5}) for step in (1, 2)]
    bucket.write("metrics.jsonl", "".join(rows).encode())
    for step in (1, 2):
        row = json.dumps(RESPONSE | {"response": f"of step {step}"})
        bucket.write(f"rollouts/step_{step:06d}.jsonl", f"{row}\n".encode())
    return bucket


def test_show_downloads_the_steps_that_it_shows(bucket):
    run = reading.found(bucket.url)
    assert (list(run.steps), reading.chosen(run, [])) == ([1, 2], [2])
    assert not list(files.user_cache().rglob("step_*"))
    with run.steps[2].open("rb") as file:
        step = reading.read(file, 2, lambda response: True)
        assert reading.load(file, step.rows[0]).response == "of step 2"
    assert [p.name for p in files.user_cache().rglob("step_*")] == ["step_000002.jsonl"]
    assert reading.verdicts(run, {3}, "gsm8k", [1]) == {3: (1, 1, 1)}
    assert reading.held_out(run, 2) == {"x/acc": 0.5}
    assert run.accuracy == "gsm8k"
    bucket.delete([name for name in bucket.entries("rollouts")])
    with pytest.raises(FileNotFoundError, match=f"^no responses at {bucket.url}/rollouts: "):
        reading.found(bucket.url)
    with pytest.raises(FileNotFoundError, match=f"^{bucket.url}/x holds no run"):
        reading.found(f"{bucket.url}/x")


def test_plot_draws_into_the_copy(bucket):
    copy = fetched.RunCopy(bucket.url)
    copy.fetch("run.json", "metrics.jsonl")
    figure = figures.run_figure(copy.folder)
    assert figure.is_relative_to(files.user_cache())
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_evaluate_reads_models_and_data(bucket):
    assert policy._is_run(bucket.url)
    assert not policy._is_run(f"{bucket.url}/model")
    for path in (EMBEDDED / "label_sums").iterdir():
        bucket.upload(f"model/{path.name}", path)
    ours = policy.load("embedded:label_sums", step="latest", dtype="float32")
    theirs = policy.load(f"{bucket.url}/model", step="latest", dtype="float32")
    assert (theirs.name, theirs.digest) == (f"{bucket.url}/model", ours.digest)
    chosen = benchmarks(["aime24", "math500"])
    bucket.write("data/aime24/test.jsonl", b"")
    bucket.write("data/math500.parquet", b"")
    assert plan.data_paths(f"{bucket.url}/data/", chosen) == {
        "aime24": f"{bucket.url}/data/aime24",
        "math500": f"{bucket.url}/data/math500.parquet",
    }
    named = plan.data_paths(f"{bucket.url}/data,aime24={bucket.url}/x.jsonl", chosen)
    assert named["aime24"] == f"{bucket.url}/x.jsonl"
    with pytest.raises(command.UsageError, match=f"--data={bucket.url}/none holds nothing for"):
        plan.data_paths(f"{bucket.url}/none", chosen)


def test_a_checkpoint_in_a_bucket_is_a_model(bucket_ports, monkeypatch, tmp_path):
    url = bucket_of("s3", bucket_ports["s3"], monkeypatch, tmp_path).url
    config = quickstart.get_config()
    model = load_model(config)
    with workdirs.Workdir(url, config, {}) as workdir:
        params = decoder_weights.load_params(model.folder, model.config)
        with contextlib.closing(Checkpointer(workdir.checkpoints)) as checkpointer:
            state = initial_state(params, update_rule(config, model))
            checkpointer.save(1, state, {"a": 1})
            checkpointer.wait()
    found = policy.load(url, step="latest", dtype="float32")
    assert found.name == f"{url} step 1"
    assert found.digest == policy.load(config.model.path, step="latest", dtype="float32").digest
    with pytest.raises(WorkdirError, match=f"{url}/none holds no run"):
        policy.stored_policy(f"{url}/none", "latest")
    before, config.train.learning_rate = config.train.learning_rate, 0.5
    for child in (str(tmp_path / "child"), f"{url}-child"):
        fork = workdirs.fork(child, url, None, config, {})
        changed = {"train.learning_rate": [before, 0.5]}
        assert fork == {"run": url, "step": 1, "changed": changed}


QUICKSTART = "--config=configs/quickstart.py"
REFUSED = {
    "sweep": ["--sweep=configs/sweeps/length_scale.py", "--workdir=gs://b/x"],
    "evaluate": ["--model=embedded:label_sums", "--workdir=s3://b/x"],
    "export": ["--workdir=runs/x", "--out=gs://b/x"],
    "show": ["runs/x", "--html=gs://b/x.html"],
    "make_base": ["--out=gs://b/x"],
    "rehearse": [QUICKSTART, "--topology=local", "--json=gs:/b/x"],
    "studies.age.study": ["--workdir=gs://b/x"],
    "bench.head_memory": ["--out=gs://b/x"],
}


@pytest.mark.parametrize("name", ["sweep", "export"])
def test_what_cannot_write_to_a_bucket_says_so(name, tmp_path):
    _check_refused(name, tmp_path)


@pytest.mark.slow  # each starts a process
@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"sweep", "export"}))
def test_nor_do_others(name, tmp_path):
    _check_refused(name, tmp_path)


def _check_refused(name, tmp_path):
    os.symlink(ROOT / "configs", tmp_path / "configs")
    ran = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *REFUSED[name]],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert "only experiments.train and experiments.sft write to buckets" in ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["configs"]


def test_flags_that_take_addresses_are_there():
    """The commands of the table define the flags that it names."""
    for name, allowed in command._ADDRESSES.items():
        [path] = (ROOT / "experiments").rglob(f"{name}.py")  # the table knows them by file name
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
        defined = {
            call.args[0].value
            for call in calls
            if getattr(call.func, "attr", "").startswith("DEFINE_")
            and isinstance(call.args[0], ast.Constant)
        }
        assert set(allowed) <= defined, name


def test_a_text_may_say_anything(monkeypatch):
    def given(**values):
        flags = type("", (), {"flag_values_dict": lambda: values})
        monkeypatch.setattr(command.flags, "FLAGS", flags)
        command._check_addresses()

    monkeypatch.setattr(sys, "argv", ["/x/show.py"])
    given(workdir="gs://b/x", find="gs://b/x", step=["last"], limit=3, html="")
    for values in ({"html": "gs://b/x"}, {"step": ["1", "gs://b"]}, {"data": "a=s3:/b/x"}):
        with pytest.raises(command.UsageError, match="this must be on this host"):
            given(**values)
    with pytest.raises(command.UsageError, match="--workdir=gs:/b/x: write two slashes"):
        given(workdir="gs:/b/x")
