"""Files of one's own: whatever they hold is read, or named by file, row and column."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from luspo_jax import datasets
from luspo_jax.datasets import DataError
from luspo_jax.datasets.images import ImageFiles
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
    examples, report = _load(
        path, tmp_path / "cache", selection=datasets.Selection(drop_bad_rows=True)
    )
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


def _numbered(*numbers):
    return [{"problem": f"p{n}", "answer": str(n), "level": n % 3} for n in numbers]


def test_several_files_of_a_folder_or_pattern_are_one_table(tmp_path):
    folder = tmp_path / "d" / "parts"
    folder.mkdir(parents=True)
    _jsonl(folder / "train-00001-of-00002.jsonl", *_numbered(3, 4, 1))
    _jsonl(folder / "train-00000-of-00002.jsonl", *_numbered(1, 2))
    _jsonl(folder / "test.jsonl", *_numbered(9))
    for path in (tmp_path / "d", folder, f"{folder}/train-*", f"{tmp_path}/**/train*.jsonl"):
        examples, report = _load(path, tmp_path / "cache")
        assert [e.problem for e in examples] == ["p1", "p2", "p3", "p4"]
        assert (report.rows, report.duplicates) == (5, 1)
    with pytest.raises(DataError, match=r"no .*jsonl.* file matches .*none\*"):
        _load(f"{folder}/none*", tmp_path / "cache")
    _jsonl(folder / "train-00001-of-00002.jsonl", {"problem": "?"}, *_numbered(3))
    with pytest.raises(DataError, match=r"train-00001-of-00002.jsonl, row 1: no column 'answer'"):
        _load(folder, tmp_path / "cache")


def test_a_filter_and_a_limit_choose_rows_and_say_so(tmp_path):
    path = _jsonl(tmp_path / "x.jsonl", *_numbered(*range(12)))
    examples, report = _load(
        path, tmp_path / "cache", selection=datasets.Selection(filter="level == 1", limit=9)
    )
    assert [e.answer for e in examples] == ["1", "4", "7"]
    assert (report.rows, report.filtered) == (3, 6)
    assert "3 examples from 3 rows (of 9, which data.filter leaves) of x.jsonl" in str(report)
    assert report.facts()["filtered"] == 6
    whole, report = _load(path, tmp_path / "cache")
    assert (len(whole), "filtered" in report.facts()) == (12, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("level == 7", r"data\.filter='level == 7' keeps none of 12 rows"),
        ("levl == 1", r"x\.jsonl, row 1: .*no column 'levl'; did you mean 'level'"),
        ("level ==", "cannot be read"),
    ],
)
def test_a_filter_that_keeps_nothing_or_is_none_is_refused(tmp_path, text, message):
    path = _jsonl(tmp_path / "x.jsonl", *_numbered(*range(12)))
    with pytest.raises(DataError, match=message):
        _load(path, tmp_path / "cache", selection=datasets.Selection(filter=text))


def _talk(*said):
    return [{"role": role, "content": content} for role, content in said]


def test_a_conversation_ends_with_the_problem(tmp_path):
    system = ("system", "Be brief.")
    rows = [
        {"problem": _talk(("user", "1+1?")), "answer": 2},
        {"problem": _talk(system, ("user", "1+1?")), "answer": 3},
        {"problem": _talk(system, ("user", "1+1?")), "answer": 3},
        {"problem": "1+1?", "answer": 2},
    ]
    examples, report = _load(_jsonl(tmp_path / "x.jsonl", *rows), tmp_path / "cache")
    assert [(e.problem, e.answer) for e in examples] == [("1+1?", "2"), ("1+1?", "3")]
    assert (report.duplicates, report.conflicts) == (2, 0)
    assert [e.meta for e in examples] == [{}, {"earlier_messages": _talk(system)}]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (_talk(("user", "a"), ("assistant", "b")), "ends with a message of the assistant"),
        ([], "is empty: the last must be the user's"),
        (["a"], "its part 1 no message with role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: its content is no text"),
        (_talk(("user", " ")), "is empty"),
    ],
)
def test_a_list_that_is_no_conversation_is_refused(tmp_path, cell, message):
    path = _jsonl(tmp_path / "x.jsonl", {"problem": cell, "answer": "1"})
    with pytest.raises(DataError, match=f"row 1: column 'problem'.*{message}"):
        _load(path, tmp_path / "cache")


def test_images_inside_several_files_are_found_in_theirs(tmp_path):
    cells = [[b"a0", b"a1"], [b"b0"], [b"c0", b"c1"]]
    for n, images in enumerate(cells):
        rows = {
            "problem": [f"{n} {k}" for k in range(len(images))], "answer": ["1"] * len(images),
            "image": [{"bytes": data, "path": None} for data in images],
        }  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"train-{n}.parquet")
    examples, _ = _load(tmp_path, tmp_path / "cache")
    source = datasets.image_source("file", tmp_path)
    files = ImageFiles(source)
    found = [files.images(example)[0] for example in examples]
    assert [image.read() for image in found] == [b"a0", b"a1", b"b0", b"c0", b"c1"]
    assert [image.place.split(", image")[0] for image in found[2:4]] == [
        f"{tmp_path}/train-1.parquet, row 1", f"{tmp_path}/train-2.parquet, row 1"
    ]  # fmt: skip
