"""What a user sees who mistypes: one message that names the field, and a non-zero status."""

import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from absl import flags

from experiments import command, train

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = "--config=configs/quickstart.py"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Calls the launcher with arguments; gives status, standard output and standard error."""

    def call(*arguments, workdir=True):
        where = [f"--workdir={tmp_path / 'run'}"] if workdir else []
        monkeypatch.setattr(sys, "argv", ["experiments.train", *arguments, *where])
        try:
            status = command.call(train.main, required=("config", "workdir"))
        finally:
            for name in [n for n in flags.FLAGS if n.startswith("config.")]:
                delattr(flags.FLAGS, name)  # each call of a process of its own declares them
            flags.FLAGS.unparse_flags()
            flags.FLAGS.dry_run = False
            flags.FLAGS.workdir = None
            flags.FLAGS.profile_steps = ""
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.rollout.group_siz=4"], "did you mean '--config.rollout.group_size'?"),
        (["--config.model.experts=blocks"], "'model.experts': it is model.expert_kernel now"),
        (["--config.objective.clip_hi=0.1"], "did you mean '--config.objective.clip_high'?"),
        (["--config.rollout.group_size=many"], "rollout.group_size=many"),
        (["--wrkdir=x"], "wrkdir"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config.train.num_minibatches=3"], "train.num_minibatches=3 does not divide"),
        (["--config.train.num_microbatches=5"], "train.num_microbatches=5 does not divide"),
        (["--config.rollout.group_size=1"], "rollout.group_size=1 must be at least 2"),
        (["--config.rollout.temperature=0"], "rollout.temperature=0"),
        (["--config.objective.preset=lupso"], "did you mean 'luspo'?"),
        (["--config.objective.aggregation=token-mean"], "counts length twice"),
        (["--config.shaping.gfpo_keep=99"], "gfpo_keep=99 exceeds rollout.group_size"),
        (["--config.data.name=label_sum"], "did you mean 'label_sums'?"),
        (["--config.data.name=gsm8k"], "needs a path to its file"),
        (["--config.data.max_prompt_length=4"], "max_prompt_length"),
        (["--config.model.path=embedded:label_sum"], "there are: "),
        (["--config.model.path=/no/such/folder"], "no model folder at /no/such/folder"),
        (["--config.train.ref_every=5"], "objective.kl_coef is 0"),
        (["--config.rollout.max_response_length=5000"], "the model of embedded:label_sums holds"),
        (["--config.data.system_prompt=hi"], "data.template='plain' is no chat template"),
        (["--config.seed=4294967296"], "seed=4294967296 must be at least 0 and at most 4294967295"),
        (["--config.rollout.temperature=inf"], "rollout.temperature=inf must be"),
        (["--config.data.options={'foo':3}"], "data.options.foo: label_sums has no such option"),
        (["--config.reward.parts={'gsm8k':'1'}"], "reward.parts.gsm8k='1' must be a number"),
        (["--config.reward.parts.format=0.5"], "\"--config.reward.parts={'format': …}\""),
        (["--config.data.options.x=3"], "\"--config.data.options={'x': …}\""),
        (["--config.data.mixture.a.name=x"], "\"--config.data.mixture={'a': {'name': …}}\""),
        (["--config.model.overrides.x=3"], "\"--config.model.overrides={'x': …}\""),
        (["--config.reward.parts={'gsm8k':1.0"], "no dictionary: write"),
        (["--config.reward.parts={gsm8k:1.0}"], "no dictionary: write"),
        (["--profile_steps=4to6"], "--profile_steps=4to6 is no range of steps"),
        (["--profile_steps=78-81"], "--profile_steps=78-81 goes beyond the run: num_steps=80"),
    ],
)
def test_mistakes_get_one_message(run, arguments, message):
    status, _, err = run(QUICKSTART, "--dry_run", *arguments)
    assert status in (1, 2)
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "16 prompts x 8"), ("latin-1", "16 prompts × 8")]
)
def test_a_console_that_is_not_utf8_shows_what_it_can(encoding, shown, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.train", QUICKSTART, "--dry_run",
         "--config.data.cache_dir=" + str(tmp_path / "∑ …")],
        cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    out = ran.stdout.decode(encoding)
    assert shown in out
    assert "\\u2211 ..." in out  # what has no plain form is spelt out


def test_signs_of_our_messages_have_plain_forms():
    command.say_plainly()
    assert "3 × 2 … 5 — 4 − 1 → ≤".encode("ascii", "plain") == b"3 x 2 ... 5 - 4 - 1 -> <="
    assert "x² α".encode("ascii", "plain") == b"x2 \\u03b1"


def test_missing_config_file_is_named(run):
    status, _, err = run("--config=configs/quick.py", "--dry_run")
    assert status != 0
    assert "configs/quick.py" in err


def test_required_flags_are_named(run):
    status, _, err = run(QUICKSTART, workdir=False)
    assert (status, "--workdir is required" in err) == (2, True)


def test_dry_run_tells_what_would_run(run, tmp_path):
    status, out, _ = run(QUICKSTART, "--dry_run", "--config.seed=3", workdir=False)
    assert status == 0
    assert "seed = 3" in out
    assert "16 prompts × 8 responses = 128 responses a step" in out
    assert "112,864 parameters" in out
    assert "memory    : about" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config", ["configs/quickstart.py", "configs/quickstart_format.py", "configs/smoke_dapo17k.py"]
)
def test_configurations_are_valid(config):
    import importlib.util

    from luspo_jax.run.checks import check

    spec = importlib.util.spec_from_file_location("config", config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert check(module.get_config()) is not None


def test_reward_of_several_parts_must_say_which_is_accuracy():
    from configs import quickstart_format
    from luspo_jax.hosts.values import ConfigError
    from luspo_jax.run.checks import check

    config = quickstart_format.get_config()
    config.eval.metric = ""
    with pytest.raises(ConfigError, match=r"eval\.metric is empty"):
        check(config)


@pytest.mark.parametrize("launcher", ["train", "evaluate", "sft", "sweep"])
def test_help_says_what_it_is_and_lists_the_flags(launcher):
    ran = subprocess.run(
        [sys.executable, "-m", f"experiments.{launcher}", "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert f"python -m experiments.{launcher}" in ran.stdout
    assert "--workdir" in ran.stdout


TWO_STEPS = (
    "--config.num_steps=2", "--config.rollout.prompts_per_step=4", "--config.rollout.group_size=2",
    "--config.rollout.max_response_length=8", "--config.rollout.num_slots=8",
    "--config.train.num_minibatches=2", "--config.eval.num_problems=2",
    "--config.eval.num_samples=1", "--config.output.checkpoint_every=1",
    "--config.output.keep_latest=2", "--config.output.tensorboard=False",
    "--config.output.export=False",
)  # fmt: skip


def test_steps_are_profiled_also_after_a_resume(run, tmp_path):
    assert run(QUICKSTART, *TWO_STEPS)[0] == 0
    profile = tmp_path / "run" / "profile"
    assert not profile.exists()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    status, _, err = run(QUICKSTART, *TWO_STEPS, "--profile_steps=1")
    assert (status, profile.exists()) == (2, False)
    assert "--profile_steps=1-1: the run goes on at step 2" in err
    assert run(QUICKSTART, *TWO_STEPS, "--profile_steps=1-2")[0] == 0
    (trace,) = profile.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    seconds = {e["name"]: e["dur"] / 1e6 for e in events if e.get("ph") == "X"}
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    phases = ("step", "gen", "reward", "adv", "update_actor", "testing")
    assert all(seconds[p] == pytest.approx(last[f"timing_s/{p}"], 0.1, 0.01) for p in phases)
    assert [e["args"]["step_num"] for e in events if e.get("name") == "rollout_step"] == ["2"]
    status, out, _ = run(QUICKSTART, *TWO_STEPS, "--profile_steps=1-2", "--dry_run")
    assert (status, f"{profile} has these steps already" in out) == (0, True)
    status, _, err = run(QUICKSTART, *TWO_STEPS, "--profile_steps=2", "--dry_run")
    assert (status, err.count("\n")) == (2, 1)
    assert "--profile_steps=2-2:" in err
    assert "a profile of steps 1-2" in err
