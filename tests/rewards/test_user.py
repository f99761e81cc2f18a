"""A user's function as a reward, from a file or a module."""

import pytest

from luspo_jax.rewards import Sample, score, verifier

SOURCE = """
from luspo_jax.rewards import Verdict

def short(response, answer, length):
    return 1.0 if length < 5 else -1

def verdict(response, answer, **known):
    return Verdict(0.5, "unparsed", detail=",".join(sorted(known)))

def broken(response, answer):
    return {}["no such key"]

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_function_of_a_file(file):
    name = f"{file}:short"
    assert score({name: 2.0}, "", "", length=3).value == 2.0
    assert score({name: 2.0}, "", "", length=9).parts == {name: -1.0}
    assert score({"user": 1.0}, "", "", length=3, options={"user": {"function": name}}).value == 1


def test_it_may_return_a_verdict_and_ask_for_all_that_is_known(file):
    reward = score({f"{file}:verdict": 1.0}, "", "")
    assert (reward.value, reward.status) == (0.5, "unparsed")
    assert reward.detail.endswith("length,max_length,meta")


def test_its_exception_is_an_error_status(file):
    reward = score({f"{file}:broken": 1.0}, "", "")
    assert (reward.value, reward.status) == (0.0, "error")
    assert "KeyError" in reward.detail


def test_a_function_of_a_module(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    built = verifier("mine:short")
    assert built.isolated
    assert built.check(Sample("", "", length=1)).value == 1.0


def test_its_version_is_that_of_its_source(file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(SOURCE + "\n# changed\n")
    assert verifier(f"{file}:short").version != verifier(f"{other}:short").version


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:f", "PYTHONPATH"),
        ("no/such/file.py:f", "does not exist"),
        ("FILE:absent", "no function 'absent'"),
        ("FILE:number", "no function 'number'"),
    ],
)
def test_wrong_places_are_refused(file, name, message):
    with pytest.raises(ValueError, match=message):
        verifier(name.replace("FILE", str(file)))
