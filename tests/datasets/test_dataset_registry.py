"""Datasets by name, from real files where they are at hand."""

import json

import pytest

from luspo_jax.datasets import DATASETS, Columns, DataError, image_source, load
from luspo_jax.datasets.dapo_math import PREFIX, SUFFIX
from luspo_jax.datasets.table import Table


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("built")


@pytest.mark.parametrize(
    ("name", "path", "examples", "duplicates", "first_answer"),
    [
        ("aime24", "aime24/test.jsonl", 30, 0, "204"),
        ("aime24", "aime24/nemo_skills_aime24.jsonl", 30, 0, "73"),
        ("aime24", "aime24/dapo_aime-2024.parquet", 30, 930, "540"),
        ("aime25", "aime25/test.jsonl", 30, 0, "70"),
        ("aime25", "aime25/nemo_skills_aime25.jsonl", 30, 0, "70"),
        ("aime25", "aime25/rlvr_decomposed_test.parquet", 30, 0, "70"),
        ("amc23", "amc23/test.jsonl", 40, 0, "27"),
        ("amc23", "amc23/rlvr_decomposed_test.parquet", 40, 0, "27"),
        ("gsm8k", "gsm8k", 1319, 0, "18"),
        ("minerva_math", "minerva_math/test.jsonl", 272, 0, "1.6"),
        ("olympiadbench", "olympiadbench/test.jsonl", 675, 0, "2"),
        ("math500", "math500/test.jsonl", 500, 0, r"\left( 3, \frac{\pi}{2} \right)"),
    ],
)
def test_benchmarks(shared_data, cache, name, path, examples, duplicates, first_answer):
    found, report = load(name, shared_data / "math_eval" / path, "test", data_dir=cache)
    assert (len(found), report.duplicates, report.conflicts) == (examples, duplicates, 0)
    assert found[0].answer == first_answer
    assert len({example.id for example in found}) == examples
    assert not any(example.problem.startswith(PREFIX) for example in found)


def test_copies_of_a_benchmark_agree(shared_data, cache):
    folder = shared_data / "math_eval"
    for name, files in {
        "aime24": ("aime24/test.jsonl", "aime24/nemo_skills_aime24.jsonl"),
        "amc23": ("amc23/test.jsonl", "amc23/rlvr_decomposed_test.parquet"),
    }.items():
        answers = [
            sorted(e.answer for e in load(name, folder / file, data_dir=cache)[0]) for file in files
        ]
        assert answers[0] == answers[1]


def test_dapo_math_17k(shared_data, cache):
    path = shared_data / "math_train" / "dapo17k" / "dapo_math_17k.parquet"
    examples, report = load("dapo_math_17k", path, data_dir=cache)
    assert report.rows == 17_917
    assert report.rows - report.duplicates == 17_290
    assert report.conflicts == 11
    assert len(examples) == report.examples == 17_279
    assert "17,279 examples from 17,917 rows" in str(report)
    assert examples[0].answer == "34"
    assert len(report.sha256) == 64


def test_the_original_dapo_layout_loses_its_prompt_and_its_copies(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": f"{PREFIX}What is 1+1?{SUFFIX}"}],
        "reward_model": {"ground_truth": "02", "style": "rule"},
    }
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps(row) + "\n") * 100)
    examples, report = load("dapo_math_17k", path, data_dir=tmp_path / "built")
    assert [(e.problem, e.answer) for e in examples] == [("What is 1+1?", "2")]
    assert (report.rows, report.duplicates) == (100, 99)


def test_a_users_own_file_by_its_columns(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"q": "1+1", "a": {"text": "2"}}\n')
    columns = Columns(problem="q", answer="a.text")
    examples, _ = load("file", tmp_path, columns=columns, data_dir=tmp_path / "b")
    assert [(e.problem, e.answer) for e in examples] == [("1+1", "2")]
    with pytest.raises(DataError, match=r"no column 'problem'; the columns are: q, a\.text"):
        load("file", path, data_dir=tmp_path / "b")


def test_a_changed_file_is_built_anew(tmp_path):
    path = tmp_path / "data.jsonl"
    for answer in ("2", "3"):
        path.write_text(json.dumps({"problem": "1+1", "answer": answer}))
        assert load("file", path, data_dir=tmp_path / "b")[0][0].answer == answer


def _asked(example):
    """What tells a problem from others: its text, and what its image shows, whatever its look."""
    shown = [(image["kind"], image["code"]) for image in example.meta.get("images", ())]
    return example.problem, *shown


@pytest.mark.parametrize(
    "name",
    # The splits of reasoning_gym are those of its options: tests/datasets/test_reasoning_gym.py.
    [n for n, entry in DATASETS.items() if not isinstance(entry, Table) and n != "reasoning_gym"],
)
def test_generated_tasks_have_disjoint_splits(name):
    (train, report), (test, _) = load(name, split="train"), load(name, split="test")
    assert report.examples == len(train)
    assert {_asked(e) for e in train}.isdisjoint(_asked(e) for e in test)
    assert len({e.id for e in train}) == len(train)
    with pytest.raises(DataError, match="takes no path"):
        load(name, "some/file.jsonl")


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("aime2024", "x", "did you mean 'aime24'"),
        ("zzz", "x", "known: aime24, aime25"),
        ("math500", None, "needs a path to its file .*MATH-500"),
        ("math500", "absent.jsonl", "no file .*download it from .*MATH-500"),
        ("math500", ".", "0 files fit split .train."),
    ],
)
def test_wrong_names_and_places_are_refused(tmp_path, name, path, message):
    with pytest.raises(DataError, match=message):
        load(name, path and tmp_path / path, data_dir=tmp_path / "built")


def test_options_of_a_file_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": "1"}')
    with pytest.raises(DataError, match=r"no options \['num_terms'\]"):
        load("file", tmp_path / "a.jsonl", num_terms=3)


def test_where_images_start_from(tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    assert image_source("virl39k", tmp_path, "test") == tmp_path / "test.jsonl"
    assert image_source("shapes") is None
    with pytest.raises(DataError, match="no file"):
        image_source("virl39k", tmp_path / "gone")
