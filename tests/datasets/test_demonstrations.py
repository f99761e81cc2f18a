"""Demonstrations of files: columns, chats, bad rows by name, and what is held out."""

import json

import pytest

from luspo_jax.datasets import DataError, Selection
from luspo_jax.datasets.demonstrations import (
    GENERATED,
    Columns,
    SumTraces,
    read_demonstrations,
    split_off,
)
from luspo_jax.rewards.registry import score

PAIRS = Columns()
CHATS = Columns(messages="messages")


def _file(folder, rows, name="f.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _said(*turns):
    return {"messages": [{"role": role, "content": said} for role, said in turns]}


def test_rows_are_kept_as_they_are(tmp_path):
    rows = [
        {"prompt": " p ", "response": "r\n"}, {"prompt": "p", "response": 4, "other": None},
        {"prompt": "p", "response": 4},
    ]  # fmt: skip
    examples, report = read_demonstrations(_file(tmp_path, rows), PAIRS)
    assert [(e.id, e.problem, e.answer) for e in examples] == [
        (1, " p ", "r\n"), (2, "p", "4"), (3, "p", "4"),
    ]  # fmt: skip
    assert (report.rows, report.examples, report.unusable, len(report.sha256)) == (3, 3, 0, 64)


def test_other_kinds_of_files_and_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "f.csv").write_text('q,a.b\n"x, y",z\n')
    (example,), _ = read_demonstrations(tmp_path / "f.csv", Columns("q", "a.b"))
    assert (example.problem, example.answer) == ("x, y", "z")
    (tmp_path / "f.json").write_text(json.dumps([{"x": {"q": "p"}, "a": "r"}]))
    (example,), _ = read_demonstrations(tmp_path / "f.json", Columns("x.q", "a"))
    assert (example.problem, example.answer) == ("p", "r")
    table = pa.table({"messages": [_said(("user", "u"), ("assistant", "a"))["messages"]]})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    (example,), _ = read_demonstrations(tmp_path / "f.parquet", CHATS)
    assert example.meta == _said(("user", "u"), ("assistant", "a"))


def test_chats(tmp_path):
    talk = _said(("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c"),
                 ("assistant", "d"))  # fmt: skip
    (example,), _ = read_demonstrations(_file(tmp_path, [talk]), CHATS)
    assert (example.problem, example.answer) == ("c", "d")
    assert example.meta == talk


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"prompt": "p"}, PAIRS, "no column 'response'; the columns are: prompt"),
        ({"prompt": "p", "response": ""}, PAIRS, "column 'response' is empty"),
        ({"prompt": "p", "response": " \n"}, PAIRS, "column 'response' is empty"),
        ({"prompt": "", "response": "r"}, PAIRS, "column 'prompt' is empty"),
        ({"prompt": "p", "response": None}, PAIRS, "column 'response' must be text or a number"),
        ({"prompt": ["p"], "response": "r"}, PAIRS, "column 'prompt' must be text or a number"),
        ({"messages": "hello"}, CHATS, "column 'messages' must be a list of messages"),
        ({"messages": []}, CHATS, "column 'messages' must be a list of messages"),
        (_said(("user", "u")), CHATS, "ends with a message of the user"),
        (_said(("assistant", "a")), CHATS, "begins with a message of the assistant"),
        (_said(("user", "u"), ("asistant", "a")), CHATS, "did you mean 'assistant'?"),
        (_said(("user", "u"), ("assistant", " ")), CHATS, "empty message of the assistant (number"),
        (_said(("user", "u"), ("assistant", [1])), CHATS, "content is not text but list (number 2"),
        ({"messages": [{"from": "human"}]}, CHATS, "number 1 has from"),
        ({"messages": ["x"]}, CHATS, "number 1 is no object"),
    ],
)
def test_bad_rows_are_named_by_file_row_and_column(row, columns, message, tmp_path):
    good = _said(("user", "u"), ("assistant", "a")) | {"prompt": "p", "response": "r"}
    path = _file(tmp_path, [good, row, good])
    with pytest.raises(DataError) as refused:
        read_demonstrations(path, columns)
    assert str(refused.value).startswith(f"{path}, row 2: ")
    assert message in str(refused.value)
    examples, report = read_demonstrations(path, columns, selection=Selection(drop_bad_rows=True))
    assert [e.id for e in examples] == [1, 3]
    assert (report.rows, report.unusable) == (3, 1)


def test_all_bad_rows_come_in_one_message(tmp_path):
    path = _file(tmp_path, [{"prompt": "p", "response": ""}] * 3)
    with pytest.raises(DataError, match=r"3 rows cannot be used; rows 1, 2, 3: column 'response'"):
        read_demonstrations(path, PAIRS, selection=Selection(drop_bad_rows=True))
    with pytest.raises(DataError, match="no rows"):
        read_demonstrations(_file(tmp_path, [], "empty.jsonl"), PAIRS)
    with pytest.raises(DataError, match="no file"):
        read_demonstrations(tmp_path / "absent.jsonl", PAIRS)


def test_a_share_is_held_out_and_no_prompt_is_on_both_sides(tmp_path):
    rows = [{"prompt": f"p{n // 2}", "response": f"r{n}"} for n in range(20)]
    examples, _ = read_demonstrations(_file(tmp_path, rows), PAIRS)
    rest, held_out = split_off(examples, 0.2, seed=0)
    assert sorted(e.id for e in (*rest, *held_out)) == list(range(1, 21))
    assert len(held_out) == 4
    assert {e.problem for e in rest}.isdisjoint(e.problem for e in held_out)
    assert split_off(examples, 0.2, seed=0) == (rest, held_out)
    assert split_off(examples, 0.2, seed=1)[1] != held_out
    assert len(split_off(examples, 0.001, seed=0)[1]) == 2  # at least one prompt
    with pytest.raises(DataError, match="leaves none to train on"):
        split_off(examples[:2], 0.9, seed=0)


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_made_is_right(name):
    train, test = (GENERATED[name](split) for split in ("train", "test"))
    assert {train[n].id for n in range(50)}.isdisjoint(test[n].id for n in range(50))
    for example in (train[0], test[len(test) - 1]):
        right = str(sum(int(c) for c in example.problem if c.isdigit()) % 5)
        assert score({"gsm8k": 1.0}, example.answer, right).value == 1.0
    assert SumTraces("train", 3)[0].answer.count("=") == 3


def test_several_files_a_filter_and_a_limit(tmp_path):
    for part in range(2):
        rows = [{"prompt": f"p{part}{n}", "response": "r", "level": n} for n in range(4)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"train-{part}.jsonl").write_text(text)
    chosen = Selection(filter="level != 1", limit=6)
    for path in (tmp_path, f"{tmp_path}/*.jsonl"):
        examples, report = read_demonstrations(path, PAIRS, selection=chosen)
        assert [(e.id, e.problem) for e in examples] == [
            (1, "p00"), (3, "p02"), (4, "p03"), (5, "p10")
        ]  # fmt: skip
        assert (report.rows, report.filtered, report.source) == (4, 2, "train-0.jsonl and 1 more")
    with pytest.raises(DataError, match=r"row 1: data\.filter='x > 1': no column 'x'"):
        read_demonstrations(path, PAIRS, selection=Selection(filter="x > 1"))
    with pytest.raises(DataError, match="leaves out all 8"):
        read_demonstrations(path, PAIRS, selection=Selection(filter="level > 9"))
