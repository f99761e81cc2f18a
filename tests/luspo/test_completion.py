"""Completion offers what may follow, in the shells that are installed here."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from luspo import completion, flags, places, program

ROOT = pathlib.Path(__file__).resolve().parents[2]


@functools.cache
def _script(shell):
    return program.OWN["completion"]([shell])


def _run(shell, script, *arguments):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is absent")
    ran = subprocess.run([shell, *arguments, script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
    return ran.stdout.split("\n")[:-1]


def _bash(*words):
    """Returns what bash offers for the last word; it reads = as a word of its own."""
    listed = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _luspo; "
    # compopt works while bash completes only.
    script = f"compopt() {{ :; }}\n{_script('bash')}\n{ask}"
    return _run("bash", f"{script} printf '%s\\n' \"${{COMPREPLY[@]}}\"", "-c")


def test_bash_offers_commands_names_flags_fields_and_values():
    assert _bash("luspo", "sh") == ["show"]
    assert _bash("luspo", "train", "quickstart_v") == ["quickstart_vl"]
    assert _bash("luspo", "sft", "") == ["sft_label_sums"]
    assert set(_bash("luspo", "sweep", "")) == set(places.configs("configs/sweeps"))
    assert _bash("luspo", "train", "quickstart", "--fork") == ["--fork=", "--fork_step="]
    assert _bash("luspo", "train", "--dry") == ["--dry_run"]
    assert _bash("luspo", "train", "--config.rollout.gro") == ["--config.rollout.group_size="]
    assert _bash("luspo", "sft", "--config.rollout.gro") == [""]
    assert _bash("luspo", "train", "--coord") == ["--coordinator="]
    assert _bash("luspo", "show", "w", "--advantage", "=", "p") == ["pos"]
    assert _bash("luspo", "export", "--dtype", "=") == ["float32", "bfloat16", "float16"]
    assert _bash("luspo", "train", "--config", "=", "quickstart_m") == ["quickstart_moe"]
    assert _bash("luspo", "completion", "") == ["bash", "zsh", "fish"]


def test_zsh_reads_its_script():
    script = f"autoload -Uz compinit && compinit -u -D\n{_script('zsh')}\nprint $_comps[luspo]"
    assert _run("zsh", script, "-f", "-c") == ["_luspo"]


def test_fish_offers_commands_names_flags_and_values():
    def offered(line):
        script = f"{_script('fish')}\ncomplete -C '{line}'"
        return [said.split("\t")[0] for said in _run("fish", script, "--no-config", "-c")]

    assert offered("luspo sho") == ["show"]
    assert "quickstart_vl" in offered("luspo train quickstart_v")
    assert offered("luspo train --config.rollout.gro") == ["--config.rollout.group_size"]
    assert offered("luspo show w --advantage=p") == ["--advantage=pos"]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_command_and_flag_is_in_every_script(shell):
    script = _script(shell)
    for name in program.COMMANDS:
        assert name in script
        for flag in flags.flags(name):
            assert flag.name in script


def test_flags_read_as_text_are_those_that_the_launchers_define():
    """Names, words and values, against absl's own record of each launcher."""
    code = """
import importlib, json, sys
from absl import flags, logging  # which defines flags too
from luspo.program import COMMANDS
before, said = set(flags.FLAGS), {}
for name in COMMANDS:
    importlib.import_module(f"experiments.{name}")
    mine = set(flags.FLAGS) - before
    said[name] = {n: [flags.FLAGS[n].help, getattr(flags.FLAGS[n].parser, "enum_values", []),
                      not flags.FLAGS[n].boolean] for n in mine}
    for flag in mine:
        delattr(flags.FLAGS, flag)
    for module in [m for m in sys.modules if m.split(".")[0] == "experiments"]:
        del sys.modules[module]  # the next defines what they share again
print(json.dumps(said))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name, defined in json.loads(ran.stdout).items():
        read = {f.name: f for f in flags.flags(name)}
        assert set(read) == set(defined), name
        for flag, (about, values, takes_value) in defined.items():
            if "…" not in read[flag].about:  # a number is inserted there
                assert read[flag].about in about, flag
            assert list(read[flag].values) == list(values or []), flag
            assert read[flag].takes_value == takes_value, flag
