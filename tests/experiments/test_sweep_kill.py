"""A real sweep in its own processes: killed and run again, and with a member that fails."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

SWEEP = """
from experiments.sweeps.spec import Sweep

def get_sweep():
    return Sweep(
        base="configs/quickstart.py",
        fixed={
            "num_steps": 3, "eval.every": 1, "eval.num_problems": 16, "eval.num_samples": 2,
            "rollout.prompts_per_step": 4, "rollout.group_size": 4, "output.tensorboard": False,
            "output.export": False, "output.checkpoint_every": 1,
        },
        members={MEMBERS},
        seeds=(0, 1),
        baseline={"member": "BASELINE"},
    )
"""
OBJECTIVES = """
            "gspo": {"objective.preset": "gspo"},
            "luspo": {"objective.preset": "luspo"},
"""
RANKS = """
            "full": {},
            "rank 1": {"lora.rank": 1, "lora.base": "float32"},
"""
BROKEN = """
            "broken": {
                "reward.parts": {"bad": 1.0},
                "reward.options": {"bad": {"function": "REWARD:fails"}},
            },
"""


def _start(tmp_path, workdir, members=OBJECTIVES, baseline="gspo"):
    file = tmp_path / "sweep.py"
    (tmp_path / "bad.py").write_text("def fails(response, answer):\n    raise OSError('no disk')\n")
    members = members.replace("REWARD", str(tmp_path / "bad.py"))
    file.write_text(SWEEP.replace("MEMBERS", members).replace("BASELINE", baseline))
    return subprocess.Popen(
        [
            sys.executable, "-m", "experiments.sweep", f"--sweep={file}",
            f"--workdir={workdir}", "--parallel=2",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _csv(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _tables(workdir):
    return [(workdir / name).read_text() for name in ("table.md", "table.csv", "results.csv")]


@pytest.mark.parametrize(
    ("members", "baseline", "until"),
    [
        (OBJECTIVES, "gspo", "*/*/finished.json"),
        (RANKS, "full", "rank_1/*/checkpoints/1/commit_success.txt"),  # amid an adapter's run
    ],
    ids=["objectives", "ranks"],
)
def test_killed_in_the_middle_and_run_again_gives_the_same_table(
    tmp_path, members, baseline, until
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = _start(tmp_path, cut, members, baseline)
    while not list(cut.glob(f"members/{until}")):
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.2)
    children = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert len(list(cut.glob("members/*/*/finished.json"))) < 4
    for workdir in (cut, whole):
        run = _start(tmp_path, workdir, members, baseline)
        output, _ = run.communicate(timeout=600)
        assert run.returncode == 0, output
    assert _tables(cut) == _tables(whole)
    if members == RANKS:
        rows = {row["member"]: row for row in _csv(whole / "table.csv")}
        assert float(rows["rank 1"]["Δ accuracy ±95%"]) >= 0
        stored = (json.loads(f.read_text()) for f in whole.glob("members/*/seed_0/run.json"))
        assert sorted(found.get("adapter_parameters", 0) for found in stored) == [0, 3 * 1024]


def test_a_member_that_fails_is_reported_and_the_others_finish(tmp_path):
    run = _start(tmp_path, tmp_path / "out", OBJECTIVES + BROKEN)
    output, _ = run.communicate(timeout=600)
    assert run.returncode != 0
    assert "FAILED broken/seed_0" in output
    assert "no disk" in output
    assert "2 of 6 members failed" in output
    assert len(list((tmp_path / "out").glob("members/*/*/finished.json"))) == 4
    assert "broken/seed_1" in (tmp_path / "out" / "table.md").read_text()
