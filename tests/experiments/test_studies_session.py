"""What the commands of all studies share, with runs that are made up, and each study's --help."""

import pathlib
import subprocess
import sys

import pytest

from experiments import command
from experiments.studies import session
from experiments.sweeps import runner

STUDIES = pathlib.Path(session.__file__).parent
COMMANDS = sorted(path.parent.name for path in STUDIES.glob("*/study.py"))


def _session(folder, **changed):
    given = {"parallel": 3, "analyse_only": False, "publish": False} | changed
    return session.Session(folder, **given)


def test_failures_of_all_sweeps_are_told_at_the_end(tmp_path, monkeypatch, capsys):
    asked = []

    def run(sweep, folder, **options):
        asked.append((sweep, folder, options))
        return {f"{sweep}/seed_0": "it broke"} if sweep == "b" else {}

    monkeypatch.setattr(runner, "run", run)
    study = _session(tmp_path)
    assert study.run("a", "tuning") == ("a", tmp_path / "tuning")
    study.check()
    study.run("b", only=["x"], environment={"N": "1"})
    assert asked == [
        ("a", tmp_path / "tuning", {"parallel": 3, "only": (), "environment": None}),
        ("b", tmp_path, {"parallel": 3, "only": ["x"], "environment": {"N": "1"}}),
    ]
    with pytest.raises(command.UsageError, match="1 members failed:\n  - b/seed_0: it broke"):
        study.finish("the table", tmp_path, ["results.md"])
    assert capsys.readouterr().out == "the table\n"


def test_analysing_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("it ran"))
    assert _session(tmp_path, analyse_only=True).run("a", "main") == ("a", tmp_path / "main")


@pytest.mark.parametrize("suffix", ["", "_sums"])
def test_publishing_copies_what_is_named(suffix, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "results.md").write_text("text")
    (tmp_path / "other.md").write_text("text")
    _session(tmp_path).finish("", home, ["results.md"], suffix)
    assert not list(home.iterdir())
    _session(tmp_path, publish=True).finish("", home, ["results.md"], suffix)
    assert [path.name for path in home.iterdir()] == [f"results{suffix}.md"]


def test_what_failed_is_published_too(tmp_path):
    """The tables say what is missing."""
    (tmp_path / "results.md").write_text("text")
    (tmp_path / "home").mkdir()
    study = _session(tmp_path, publish=True)
    study.failures["a/seed_0"] = "it broke"
    with pytest.raises(command.UsageError):
        study.finish("", tmp_path / "home", ["results.md"])
    assert (tmp_path / "home/results.md").is_file()


def test_a_base_is_trained_once(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(subprocess, "run", lambda line, **_: called.append(line))
    session.make_base(tmp_path / "one", ("--seed=1",))
    assert called[0][1:] == [
        "-m", "experiments.make_base", "--overwrite", "--seed=1", f"--out={tmp_path / 'one'}",
    ]  # fmt: skip
    (tmp_path / "two").mkdir()
    (tmp_path / "two/README.md").write_text("trained")
    session.make_base(tmp_path / "two", ())
    assert len(called) == 1


def test_help_shows_the_flags_of_every_study():
    """They are key flags of the study's own module; and asking for help loads no jax."""
    code = """
import importlib, sys
from absl import flags
for name in sys.argv[1:]:
    found = importlib.import_module(f"experiments.studies.{name}.study")
    print(name, *sorted(flag.name for flag in flags.FLAGS.get_key_flags_for_module(found)))
    for flag in flags.FLAGS.get_flags_for_module(found):
        delattr(flags.FLAGS, flag.name)
assert "jax" not in sys.modules
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS],
        cwd=STUDIES.parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [name for name, *_ in lines] == COMMANDS
    assert len(COMMANDS) == 7
    for name, *found in lines:
        assert {"workdir", "parallel", "publish", "analyse_only"} <= set(found), name
