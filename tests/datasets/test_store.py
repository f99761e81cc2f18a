"""Built datasets: random access, built once, never half built."""

import json
import threading

import pytest

from luspo_jax.datasets import store
from luspo_jax.datasets.example import Example, Report

EXAMPLES = [Example(n, f"problem ∑ {n}", str(n), {"level": n, "tags": ["ä"]}) for n in range(7)]
REPORT = Report("toy", "toy.jsonl", "00", rows=9, examples=7, duplicates=2, conflicts=0)


def _read(_scratch):
    lines = (json.dumps([e.problem, e.answer, e.meta]).encode() for e in EXAMPLES)
    return lines, REPORT


def test_what_goes_in_comes_out(tmp_path, capsys):
    stored, report = store.build_once(tmp_path / "toy" / "key", _read)
    assert list(stored) == EXAMPLES
    assert (stored[3], stored[-1], stored[2:5]) == (EXAMPLES[3], EXAMPLES[6], EXAMPLES[2:5])
    assert (len(stored), report) == (7, REPORT)
    assert capsys.readouterr().out == ""
    for index in (7, -8):
        with pytest.raises(IndexError):
            stored[index]


def test_it_is_built_once(tmp_path):
    store.build_once(tmp_path / "key", _read)

    def again(_scratch):
        raise AssertionError("built twice")

    stored, report = store.build_once(tmp_path / "key", again)
    assert (stored[5], report) == (EXAMPLES[5], REPORT)


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(store, "_build", full)
    with pytest.raises(OSError, match="no space left"):
        store.build_once(tmp_path / "key", _read)
    assert list(tmp_path.iterdir()) == []


def test_two_builders_at_once_agree(tmp_path):
    barrier, results = threading.Barrier(2, timeout=30), []

    def read(scratch):
        barrier.wait()
        return _read(scratch)

    def build():
        results.append(list(store.build_once(tmp_path / "key", read)[0]))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [EXAMPLES, EXAMPLES]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
