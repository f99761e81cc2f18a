"""Rows come out of every kind of file alike; what cannot be read is named by file and row."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.rows import column, read_rows

ROWS = [{"problem": "1+1", "answer": "2"}, {"problem": 'größer, "x"\nthan', "answer": "3"}]


def _write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text('problem,answer\n1+1,2\n"größer, ""x""\nthan",3\n', encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    assert [row for _, row in read_rows(_write(tmp_path / f"data{suffix}", ROWS))] == ROWS


def test_rows_are_numbered_by_line_where_lines_are_blank(tmp_path):
    numbers = [number for number, _ in read_rows(_write(tmp_path / "data.jsonl", ROWS))]
    assert numbers == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "row 2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "row 2: not an object but list"),
        ("a.json", b'{"a": 1}', "list of objects"),
        ("a.json", b"{", "not valid JSON"),
        ("a.parquet", b"PAR1 but not really", "not a readable parquet file"),
        ("a.txt", b"x", r"cannot read '.txt' files"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(read_rows(path))
    assert name in str(error.value)


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = _write(tmp_path / "data.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"data\.parquet"):
        list(read_rows(path))


def test_columns_are_found_by_dotted_names():
    row = {"prompt": [{"content": "p"}], "gold": {"x": {"y": 3}}, "a.b": 4}
    assert column(row, ["prompt.0.content"], "here") == ("prompt.0.content", "p")
    assert column(row, ["absent", "gold.x.y"], "here") == ("gold.x.y", 3)
    assert column(row, ["a.b"], "here") == ("a.b", 4)


def test_a_missing_column_lists_those_present():
    row = {"prompt": [{"content": "p"}], "gold": {"x": 3}, "tags": []}
    with pytest.raises(DataError) as error:
        column(row, ["answer", "prompt.1.content"], "f.jsonl, row 7")
    message = str(error.value)
    assert "f.jsonl, row 7" in message
    assert "'answer' or 'prompt.1.content'" in message
    assert "prompt.0.content, gold.x, tags" in message
