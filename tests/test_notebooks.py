"""Notebooks carry no outputs, import the package alone, and run on small runs."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SWEEP = """
from experiments.sweeps.spec import Outcome, Sweep

def get_sweep():
    return Sweep(
        base="configs/quickstart.py",
        fixed={
            "num_steps": 3, "eval.every": 1, "eval.num_problems": 16, "eval.num_samples": 2,
            "rollout.prompts_per_step": 4, "rollout.group_size": 4, "output.tensorboard": False,
            "output.export": False,
        },
        axes={
            "scale": {"none (GSPO)": {"objective.length_scale": "none"}, "length (LUSPO)": {}},
        },
        seeds=(0, 1),
        baseline={"scale": "none (GSPO)"},
    )
"""


def _cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _code(path):
    sources = ["".join(cell["source"]) for cell in _cells(path) if cell["cell_type"] == "code"]
    return "\n".join(line for source in sources for line in source.split("\n") if line[:1] != "%")


def test_there_are_six():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    code = [cell for cell in _cells(path) if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_installs_only_what_is_missing(path):
    """The first code cell, or the second of one with settings, makes a free runtime ready."""
    code = ["".join(cell["source"]) for cell in _cells(path) if cell["cell_type"] == "code"]
    install = next(source for source in code if '"pip"' in source)
    assert code.index(install) <= 1
    assert 'find_spec("luspo_jax") is None' in install
    before = "\n".join(code[: code.index(install)])
    assert "luspo_jax" not in {
        node.names[0].name.split(".")[0]
        for node in ast.walk(ast.parse(before))
        if isinstance(node, ast.Import)
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_the_look_of_all_figures(path):
    assert "plt = figure_style.use()" in _code(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_imports_what_is_installed(path):
    """Launchers are no package: a notebook runs from any folder."""
    roots = set()
    for node in ast.walk(ast.parse(_code(path))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    allowed = {"luspo_jax", "jax", "numpy", "pandas", "matplotlib"}
    if path.stem == "05_borrow_the_loss":  # a loop of one's own has an optimizer
        allowed |= {"optax"}
    if path.stem == "06_adapters":  # what reads an adapter elsewhere, where it is installed
        allowed |= {"peft", "torch", "transformers"}
    assert roots <= allowed | set(sys.stdlib_module_names)


def _launch(name, *arguments):
    ran = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]


@pytest.mark.slow
def test_all_run(tmp_path):
    """On a run and a sweep of a few steps; what they print is for people."""
    nbformat = pytest.importorskip("nbformat", reason="needs pip install -e '.[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install -e '.[notebooks]'")
    run, sweep = tmp_path / "run", tmp_path / "sweep"
    _launch(
        "train", "--config=configs/quickstart.py", f"--workdir={run}", "--config.num_steps=6",
        "--config.length.every=2", "--config.output.dump_every=3",
        "--config.eval.num_problems=16", "--config.eval.every=3",
    )  # fmt: skip
    (tmp_path / "sweep.py").write_text(SWEEP)
    _launch("sweep", f"--sweep={tmp_path / 'sweep.py'}", f"--workdir={sweep}", "--parallel=2")
    environment = os.environ | {
        "LUSPO_RUN": str(run),
        "LUSPO_SWEEP": str(sweep),
        # What makes its own run, does it on the embedded model, with this checkout's launchers.
        "LUSPO_TINY": "1",
        "LUSPO_CHECKOUT": str(ROOT),
        "LUSPO_ADAPTER": str(tmp_path / "adapter"),
        "PYTHONPATH": str(ROOT),
    }
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        client = nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute(env=environment)
        figures = [
            output
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        assert len(figures) >= 2, path
