"""The wheel, installed in an environment of its own and used in an empty folder."""

import json
import os
import pathlib
import shutil
import site
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def _run(*command, cwd, status=0):
    # No folder of the checkout may help.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    ran = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert ran.returncode == status, ran.stdout[-2000:] + ran.stderr[-2000:]
    return ran


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from the files that git has, as an older `build` may hold more."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        if not name.startswith(("tests/", "docs/", "notebooks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, ".", cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def luspo(wheel, tmp_path_factory):
    """The program in a fresh environment; what it depends on is that of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    _run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # After the wheel's own, and without what .pth files there say: an editable luspo_jax stays out.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin" / "luspo"


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


TINY = [
    "--config.num_steps=2", "--config.rollout.prompts_per_step=4", "--config.eval.every=0",
    "--config.eval.num_problems=8", "--config.eval.num_samples=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(luspo, empty):
    """A finished run of the program, in a folder that holds a user's own `experiments`."""
    for name in ("experiments", "configs"):
        (empty / name).mkdir()
        (empty / name / "__init__.py").write_text("raise SystemExit('a user\\'s')\n")
    said = _run(luspo, "train", "quickstart", "--workdir=run", *TINY, cwd=empty)
    assert "final: accuracy" in said.stdout
    return empty / "run"


def test_site_packages_get_two_names_and_all_files(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
    assert {name.split("/")[0] for name in names} == {
        "luspo", "luspo_jax", next(n for n in names if "dist-info" in n).split("/")[0]
    }  # fmt: skip
    for folder, inside in (
        ("luspo_jax", ""), ("configs", "luspo/checkout/"), ("experiments", "luspo/checkout/"),
    ):  # fmt: skip
        tracked = subprocess.run(
            ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
        missing = {f"{inside}{name}" for name in tracked} - set(names)
        left_out = (
            *(f"{inside}experiments/{folder}/" for folder in ("studies", "site")),
            f"{inside}experiments/bench/README.md",
        )
        assert [name for name in sorted(missing) if not name.startswith(left_out)] == []


def test_commands_of_a_run(luspo, run, empty):
    assert "finished" in _run(luspo, "status", "run", cwd=empty).stdout
    assert "step 2" in _run(luspo, "show", "run", "--limit=1", cwd=empty).stdout
    (run / "summary.png").unlink()
    _run(luspo, "plot", "run", cwd=empty)
    assert (run / "summary.png").is_file()
    _run(luspo, "export", "run", "--out=out", cwd=empty)
    assert (empty / "out" / "model.safetensors").is_file()


def test_a_model_is_evaluated(luspo, run, empty):
    _run(
        luspo, "evaluate", "run", "--benchmarks=label_sums", "--limit=4", "--n=1",
        "--max_response_length=64", "--workdir=verdicts", cwd=empty,
    )  # fmt: skip
    assert json.loads((empty / "verdicts" / "results.json").read_text())


def test_a_sweep_runs_in_workers_and_prints_lines_that_work(luspo, run, empty):
    (empty / "mine.py").write_text(
        "from experiments.sweeps.spec import Sweep\n"
        "def get_sweep():\n"
        "    fields = {'num_steps': 1, 'rollout.prompts_per_step': 4, 'eval.every': 0,\n"
        "              'eval.num_problems': 8, 'eval.num_samples': 1}\n"
        "    return Sweep('configs/quickstart.py', members={'one': fields}, seeds=[0])\n"
    )
    dry = _run(luspo, "sweep", "mine.py", "--dry_run", cwd=empty).stdout
    (line,) = [line for line in dry.split("\n") if line.startswith("luspo train ")]
    _run(luspo, *line.split()[1:], "--dry_run", cwd=empty)
    _run(luspo, "sweep", "mine.py", "--workdir=swept", cwd=empty)
    assert (empty / "swept" / "table.md").is_file()
    assert "length_scale" in _run(luspo, "sweep", "length_scale", "--dry_run", cwd=empty).stdout


def test_rehearsal_and_fine_tuning_find_what_they_need(luspo, run, empty):
    said = _run(luspo, "rehearse", "quickstart", "--topology=local", "--nocompile", cwd=empty)
    assert "No program was compiled." in said.stdout
    said = _run(luspo, "sft", "sft_label_sums", "--dry_run", cwd=empty)
    assert "13,677 demonstrations" in said.stdout


def test_a_process_of_several_starts_its_worker(luspo, run, empty):
    _run(
        luspo, "train", "quickstart", "--workdir=several", *TINY, "--coordinator=localhost:0",
        "--num_processes=2", "--process_id=7", cwd=empty, status=2,
    )  # fmt: skip
