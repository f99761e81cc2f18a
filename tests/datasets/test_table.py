"""Rows become examples: duplicates merged, conflicting answers dropped, both counted."""

import json

import pytest

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.table import (
    Table,
    answer_text,
    integer,
    optional_text,
    read_examples,
    text,
)

TABLE = Table(problem=("problem",), answer=("answer",), meta=("level",))


def _file(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_examples_keep_order_and_get_ids(tmp_path):
    rows = [{"problem": f"p{n}", "answer": n, "level": n if n else None} for n in range(3)]
    examples, counts = read_examples(TABLE, _file(tmp_path, rows))
    assert [(e.id, e.problem, e.answer) for e in examples] == [
        (0, "p0", "0"),
        (1, "p1", "1"),
        (2, "p2", "2"),
    ]
    assert [e.meta for e in examples] == [{}, {"level": 1}, {"level": 2}]
    assert (counts.rows, counts.duplicates, counts.conflicts) == (3, 0, 0)


def test_duplicates_are_merged_and_conflicts_dropped(tmp_path):
    pairs = [("a", "1"), ("b", "2"), ("a", " 1 "), ("b", "3"), ("b", "2"), ("c", "4"), ("a", 1.0)]
    examples, counts = read_examples(
        TABLE, _file(tmp_path, [{"problem": p, "answer": a} for p, a in pairs])
    )
    assert [(e.id, e.problem, e.answer) for e in examples] == [(0, "a", "1"), (1, "c", "4")]
    assert (counts.rows, counts.duplicates, counts.conflicts) == (7, 4, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "p"}, "row 2: no column 'answer'; the columns are: problem"),
        ({"problem": "p", "answer": None}, "row 2: column 'answer' must be text"),
        ({"problem": "p", "answer": ["1"]}, "row 2: column 'answer' must be text"),
        ({"problem": "p", "answer": True}, "row 2: column 'answer' must be text"),
        ({"problem": " ", "answer": "1"}, "row 2: column 'problem' is empty"),
    ],
)
def test_a_malformed_row_is_named_by_file_row_and_column(tmp_path, row, message):
    path = _file(tmp_path, [{"problem": "a", "answer": "1"}, row])
    with pytest.raises(DataError, match=message) as error:
        read_examples(TABLE, path)
    assert "data.jsonl" in str(error.value)


@pytest.mark.parametrize("answers", [[], ["1", "2"]])
def test_an_empty_dataset_is_refused(tmp_path, answers):
    path = _file(tmp_path, [{"problem": "a", "answer": a} for a in answers])
    with pytest.raises(DataError, match=f"no examples .{len(answers)} rows"):
        read_examples(TABLE, path)


def test_cells():
    assert [text(cell) for cell in ("a ", 3, 27.0, 2.5)] == ["a ", "3", "27", "2.5"]
    assert answer_text(" 27 ") == "27"
    cells = ("033", "0", "-03", "336^\\circ", "27.0", 27.0, "٣")
    assert [integer(cell) for cell in cells] == ["33", "0", "-03", "336^\\circ", "27.0", "27", "٣"]


def test_not_a_number_is_no_answer():
    with pytest.raises(ValueError, match="stands for no value"):
        text(float("nan"))
    assert optional_text(float("nan")) == ""
