"""The command that makes a folder of a GGUF file."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("gguf", reason="GGUF files need the package gguf (pip install '.[gguf]')")

from luspo_jax.models.decoder_config import read_config
from tests.models import gguf_cases as cases

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _import(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.import_gguf", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_folder_is_written_and_another_not_replaced(tmp_path):
    config = cases.config("llama")
    cases.small_file(tmp_path / "a.gguf", config)
    flags = [f"--gguf={tmp_path / 'a.gguf'}", f"--out={tmp_path / 'out'}"]
    made = _import(*flags)
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.startswith("a.gguf: llama, ")
    assert read_config(tmp_path / "out") == config
    refused = _import(*flags)
    assert refused.returncode == 1
    assert "exists already and is not empty" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_what_is_no_gguf_file_is_one_line(tmp_path):
    (tmp_path / "a.gguf").write_text("no")
    refused = _import(f"--gguf={tmp_path / 'a.gguf'}", f"--out={tmp_path / 'out'}")
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "a.gguf is not a GGUF file" in refused.stderr
    assert not (tmp_path / "out").exists()
