"""A pair of jax and flax outside those that were tested is named in one line; others are not."""

import ast
import pathlib
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from experiments import command, versions

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("jax", "flax", "tested"),
    [
        ("0.10.2", "0.12.8", True),
        ("0.10.9", "0.12.11", True),
        ("0.12.0.1", "0.12.12", True),
        ("0.12.0rc1", "0.12.12", True),
        ("0.10.1", "0.12.8", False),
        ("0.10.2", "0.12.12", False),  # of two pairs
        ("0.12.0", "0.12.8", False),
        ("0.13.0", "0.12.12", False),
        ("0.12.0", "0.13.0", False),
        ("1.0", "1.0", False),
    ],
)
def test_a_pair_is_tested_or_named(jax, flax, tested):
    said = versions.untested({"jax": jax, "flax": flax})
    assert bool(said) != tested
    if said:
        assert said.startswith(f"jax {jax} with flax {flax} was never tested")
        assert "\n" not in said


def test_the_pairs_are_those_that_the_package_asks_for():
    (listed,) = (
        node.value.elts
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "INSTALL_REQUIRES"
    )
    needs = [Requirement(entry.value) for entry in listed]
    for python, pair in zip(("3.11", "3.12"), versions.TESTED, strict=True):
        for package, (low, high) in pair.items():
            (asked,) = (
                need.specifier
                for need in needs
                if need.name == package and need.marker.evaluate({"python_version": python})
            )
            assert asked == SpecifierSet(f">={low},<{high}")


def test_the_pair_installed_here_is_tested():
    assert set(versions.installed()) == {"jax", "flax"}
    assert versions.untested(versions.installed()) == ""


def test_a_command_says_it_once_and_runs(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(versions, "installed", lambda: {"jax": "0.13.0", "flax": "0.14.0"})
    monkeypatch.setattr(sys, "argv", ["experiments.plot"])
    assert command.call(lambda: ran.append(1)) == 0
    assert ran == [1]
    err = capsys.readouterr().err
    assert err.startswith("warning: jax 0.13.0 with flax 0.14.0 was never tested here")
    assert err.count("\n") == 1


def test_looking_imports_neither_package():
    code = (
        "import sys; from experiments import versions; "
        "assert not versions.untested(versions.installed()); "
        "assert not {'jax', 'flax'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
