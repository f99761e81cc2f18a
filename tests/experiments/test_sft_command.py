"""What a user of experiments.sft sees: what would run, and mistakes in one line."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _sft(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.sft", "--config=configs/sft_label_sums.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_dry_run_tells_what_would_run(tmp_path):
    ran = _sft("--dry_run", "--config.seed=3")
    assert ran.returncode == 0, ran.stderr[-2000:]
    for told in (
        "seed = 3", "112,864 parameters", "13,677 demonstrations of generator (train)",
        "200 steps × 64 demonstrations = 0.94 epochs", "256 prompts answered", "memory    : about",
        "negative log-likelihood of answers, token-mean",
    ):  # fmt: skip
        assert told in ran.stdout, told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.batchsize=4"], "did you mean '--config.train.batch_size'?"),
        (["--config.rollout.group_size=4"], "has no field 'rollout.group_size'"),
        (["--config.data.name=file"], "data.path is empty: name a file of demonstrations"),
        (["--config.train.batch_size=0"], "train.batch_size=0 must be at least 1"),
    ],
)
def test_mistakes_get_one_message(arguments, message):
    ran = _sft("--dry_run", *arguments)
    assert ran.returncode in (1, 2)
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert "Traceback" not in ran.stderr
