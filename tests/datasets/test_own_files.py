"""Files of one's own: whatever they hold is read, or named by file, row and column."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from luspo_jax import datasets
from luspo_jax.datasets import DataError
from luspo_jax.datasets.overlap import overlap
from luspo_jax.datasets.predictions import read_predictions


def _jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _load(path, cache, **settings):
    return datasets.load("file", path, "train", data_dir=cache, **settings)


@pytest.mark.parametrize("first", [{}, {"image": None}, {"images": []}, {"image": "b.png"}])
@pytest.mark.parametrize("later", [{"image": "a.png"}, {"images": ["a.png"]}])
def test_an_image_of_any_row_is_seen(tmp_path, first, later):
    rows = [{"problem": "sum?", "answer": "3", **first}, {"problem": "sum", "answer": "3", **later}]
    examples, report = _load(_jsonl(tmp_path / "x.jsonl", *rows), tmp_path / "cache")
    assert [bool(e.meta.get("images")) for e in examples] == [first.get("image") is not None, True]
    assert report.pictured == 1 + (first.get("image") is not None)


def test_an_image_that_is_no_number_is_none(tmp_path):
    rows = [{"problem": "a", "answer": "1", "image": float("nan")}]
    examples, _ = _load(_jsonl(tmp_path / "x.jsonl", *rows), tmp_path / "cache")
    assert not examples[0].meta.get("images")


@pytest.mark.parametrize("row", ["What is 1000+234?,1,234", "only one"])
def test_a_csv_row_of_other_cells_is_named(tmp_path, row):
    (tmp_path / "x.csv").write_text(f"problem,answer\nfirst,1\n{row}\n")
    with pytest.raises(DataError, match=r"x.csv, row 2: \d cells?, and its first line names 2"):
        _load(tmp_path / "x.csv", tmp_path / "cache")
    (tmp_path / "p.csv").write_text("id,prediction\n1,a,b\n")
    with pytest.raises(DataError, match=r"p\.csv, row 1: 3 cells"):
        read_predictions(tmp_path / "p.csv")


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path, name):
    row = {"problem": "a?", "answer": "1"}
    text = {
        "x.csv": "problem,answer\na?,1\n", "x.jsonl": json.dumps(row), "x.json": json.dumps([row])
    }  # fmt: skip
    (tmp_path / name).write_text(text[name], encoding="utf-8-sig")
    examples, _ = _load(tmp_path / name, tmp_path / "cache")
    assert (examples[0].problem, examples[0].answer) == ("a?", "1")


@pytest.mark.parametrize("column", ["problem", "answer"])
def test_half_a_character_is_named_by_row_and_column(tmp_path, column):
    rows = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2", column: "x \ud83d y"}]
    with pytest.raises(DataError, match=rf"x.jsonl, row 2: column '{column}'"):
        _load(_jsonl(tmp_path / "x.jsonl", *rows), tmp_path / "cache")


def test_a_narrow_float_is_the_decimal_that_was_written(tmp_path):
    table = pyarrow.table(
        {"problem": ["a", "b"], "answer": pyarrow.array(np.array([0.1, 2.5], np.float32))}
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    examples, _ = _load(tmp_path / "x.parquet", tmp_path / "cache")
    assert [e.answer for e in examples] == ["0.1", "2.5"]


def test_all_bad_rows_are_named_at_once_or_left_out_and_counted(tmp_path):
    rows = [{"problem": f"p{n}", "answer": "" if n in (2, 5) else str(n)} for n in range(1, 8)]
    path = _jsonl(tmp_path / "x.jsonl", *rows)
    with pytest.raises(DataError, match=r"2 rows cannot be used; rows 2, 5: .*drop_bad_rows"):
        _load(path, tmp_path / "cache")
    examples, report = _load(path, tmp_path / "cache", drop_bad_rows=True)
    assert (len(examples), report.unusable) == (5, 2)
    assert "2 rows that cannot be used left out" in str(report)


def test_a_file_is_read_by_what_it_holds_where_its_name_does_not_say(tmp_path):
    rows = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2"}]
    examples, _ = _load(_jsonl(tmp_path / "test.txt", *rows), tmp_path / "cache")
    assert len(examples) == 2


def test_a_damaged_cache_is_built_anew(tmp_path):
    path = _jsonl(tmp_path / "x.jsonl", *({"problem": f"p{n}", "answer": "1"} for n in range(99)))
    _load(path, tmp_path / "cache")
    for file in (tmp_path / "cache").rglob("*array_record*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:50])
    examples, _ = _load(path, tmp_path / "cache")
    assert examples[98].problem == "p98"


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    path = _jsonl(tmp_path / "x.jsonl", {"problem": "a", "answer": "1"})
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        _load(path, tmp_path / "cache")


def test_signs_tell_short_problems_apart():
    def examples(*texts):
        return [datasets.Example(i, text, "1") for i, text in enumerate(texts)]

    trained = examples("What is 5 - 9?", "Compute $3 \\times 4$")
    assert not overlap(examples("What is 5 + 9?"), trained).matches
    assert overlap(examples("what is $5 − 9$"), trained).matches
    assert overlap(examples("Compute 3·4"), trained).matches
