"""A user's function as a reward, from a file or a module."""

import pytest

from luspo_jax.rewards import Sample, Scorer, score, verifier

SOURCE = """
from luspo_jax.rewards import Verdict

def short(response, answer, length):
    return 1.0 if length < 5 else -1

def verdict(response, answer, **known):
    return Verdict(0.5, "unparsed", detail=",".join(sorted(known)))

def broken(response, answer):
    return {}["no such key"]

number = 3

import functools

def weighted(response, answer, factor, length=None):
    return factor * (length or 0)

half = functools.partial(weighted, factor=0.5)

class Judge:
    def __call__(self, response, answer):
        return float(response == answer)

    def method(self, response, answer):
        return 0.25

judge = Judge()
method = judge.method

async def later(response, answer):
    return 1.0

def lonely(response):
    return 1.0

def demanding(response, answer, tokens):
    return 1.0

def wordy(response, answer):
    return Verdict(1, prediction=5, detail="x" * 10_000)
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


@pytest.mark.parametrize(("name", "value"), [("half", 2.0), ("judge", 1.0), ("method", 0.25)])
def test_it_may_be_anything_that_is_called(file, name, value):
    assert score({f"{file}:{name}": 1.0}, "a", "a", length=4).value == value


def test_what_it_says_is_text_of_bounded_length(file):
    reward = score({f"{file}:wordy": 1.0}, "", "")
    assert (reward.value, reward.prediction) == (1.0, "5")
    assert len(reward.detail) < 3_000


def test_the_version_of_a_part_of_a_function_is_that_of_both_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "whole_function.py").write_text("def f(response, answer, x):\n    return x\n")
    part = "import functools, whole_function\ng = functools.partial(whole_function.f, x={})\n"
    versions = set()
    for x in (1, 2):
        (tmp_path / f"part_{x}.py").write_text(part.format(x))
        versions.add(verifier(f"{tmp_path}/part_{x}.py:g").version)
    assert len(versions) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named"),
        ("from os import no_such_name\n", "ImportError"),
        ("raise RuntimeError('two\\nlines')\n", "RuntimeError: two lines"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_file_that_fails_is_one_line(tmp_path, monkeypatch, source, message):
    path = tmp_path / f"failing_{abs(hash(source))}.py"
    path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{path}:f", f"{path}:f", f"{path.stem}:f"):  # not taken for good the second time
        with pytest.raises(ValueError, match=message) as caught:
            Scorer({name: 1.0})
        assert "\n" not in str(caught.value)
        assert path.stem in str(caught.value)


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
        ("FILE:later", "async"),
        ("FILE:lonely", r"takes \(response\) and is called with \(response, answer\)"),
        ("FILE:demanding", "missing a required argument: 'tokens'"),
        ("FILE:weighted", "missing a required argument: 'factor'"),
    ],
)
def test_wrong_places_are_refused(file, name, message):
    with pytest.raises(ValueError, match=message):
        verifier(name.replace("FILE", str(file)))
