"""Every command that writes refuses a place that holds something of a user's, and leaves it so."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = "--config=configs/quickstart.py"
# Command → how it names a folder, or a file, that it writes. {place} holds a user's file, or is it.
FOLDERS = {
    "train": [QUICKSTART, "--workdir={place}"],
    "sweep": ["--sweep=configs/sweeps/length_scale.py", "--workdir={place}"],
    "evaluate": [
        "--model=embedded:label_sums", "--benchmarks=label_sums", "--workdir={place}",
        "--protocol=greedy", "--limit=2", "--max_response_length=8",
    ],
    "export": ["--workdir={run}", "--out={place}"],
    "make_base": ["--out={place}"],
    "bench.head_memory": ["--out={place}"],
    "bench.long_context": ["--out={place}"],
    "score_mutations": ["--out={place}", "--sets=math500"],
}  # fmt: skip
FILES = {
    "rehearse": [QUICKSTART, "--topology=local", "--json={place}"],
    "show": ["somewhere", "--html={place}"],
    "preview": [QUICKSTART, "--html={place}"],
    "bench.rl_step": ["--json={place}"],
    "bench.instruments": ["--json={place}"],
    "bench.length_scale": ["--json={place}", "--small"],
    "bench.adapters": ["--json={place}", "--small"],
    "studies.rehearsal.calibrate": ["--out={place}"],
}


def _refused(name, arguments, **places):
    command = [
        sys.executable,
        "-m",
        f"experiments.{name}",
        *(a.format(**places) for a in arguments),
    ]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def _check(found, place):
    assert found.returncode in (1, 2), found.stderr
    lines = [line for line in found.stderr.splitlines() if str(place) in line]
    assert len(lines) == 1, found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.slow  # each starts a process
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_others(name, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    _check(_refused(name, FOLDERS[name], place=place, run=tmp_path), place)
    assert [p.name for p in place.iterdir()] == ["thesis.txt"]
    assert (place / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_others(name, tmp_path):
    place = tmp_path / "thesis.json"
    place.write_text("years of work")
    _check(_refused(name, FILES[name], place=place), place)
    assert place.read_text() == "years of work"
