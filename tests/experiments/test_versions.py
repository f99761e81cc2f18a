"""A pair of jax and flax outside those that were tested is named in one line; others are not."""

import ast
import pathlib
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from experiments import command, versions

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _listed(name):
    """Returns what setup.py asks for: INSTALL_REQUIRES, or an extra."""
    tree, values = ast.parse((ROOT / "setup.py").read_text()), {}
    for node in tree.body:  # without setuptools, which Python 3.12 does not bring
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict):
            exec(compile(ast.Module([node], []), "setup.py", "exec"), values)
    return values[name] if name in values else values["EXTRAS_REQUIRE"][name]


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
    needs = [Requirement(text) for text in _listed("INSTALL_REQUIRES")]
    for python, pair in zip(("3.11", "3.12"), versions.TESTED, strict=True):
        for package, (low, high) in pair.items():
            (asked,) = (
                need.specifier
                for need in needs
                if need.name == package and need.marker.evaluate({"python_version": python})
            )
            assert asked == SpecifierSet(f">={low},<{high}")


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_lock_has_what_the_package_asks_for(python):
    """One version of each package for this Python, within the bounds of setup.py."""
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    locked = {}
    for line in (ROOT / "requirements" / "lock.txt").read_text().splitlines():
        entry = Requirement(line) if line[:1].isalpha() else None
        if entry and (entry.marker is None or entry.marker.evaluate(here)):
            name, (pinned,) = canonicalize_name(entry.name), entry.specifier
            assert pinned.operator == "=="
            assert name not in locked
            locked[name] = pinned.version
    asked = [Requirement(text) for name in ("INSTALL_REQUIRES", "test") for text in _listed(name)]
    assert len(asked) > 30
    for need in asked:
        if need.marker is None or need.marker.evaluate(here):
            version = locked[canonicalize_name(need.name)]
            assert need.specifier.contains(version), need


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
