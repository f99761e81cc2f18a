"""Predictions by named columns, from every kind of file; mistakes are named."""

import json

import pytest

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.predictions import read_predictions

ROWS = [{"id": 1, "prediction": "B"}, {"id": "2", "prediction": None}]


def test_rows_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.csv").write_text("id,prediction\n1,B\n2,\n")
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert read_predictions(tmp_path / name) == {"1": ["B"], "2": [""]}


def test_rows_with_one_id_are_several_responses(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,prediction\n1.0,a\n2,b\n1,c\n")
    assert read_predictions(path) == {"1.0": ["a"], "2": ["b"], "1": ["c"]}
    (tmp_path / "a.json").write_text('[{"id": 1.0, "prediction": 3}, {"id": 1, "prediction": 4}]')
    assert read_predictions(tmp_path / "a.json") == {"1": ["3", "4"]}


def test_columns_may_have_other_names(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('qid,varid,out\n1,1,"two\nlines"\n1,2,x\n')
    found = read_predictions(path, id_columns=("qid", "varid"), response="out")
    assert found == {"1/1": ["two\nlines"], "1/2": ["x"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.jsonl: there are no predictions"),
        ('{"id": 1}', "row 1: no column 'prediction'; the columns are: id"),
        ('{"prediction": "x"}', "row 1: no column 'id'"),
        ('{"id": null, "prediction": "x"}', "row 1: column 'id' must be text"),
        ("{", "row 1: not valid JSON"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_predictions(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"predictions: no file .*gone.jsonl"):
        read_predictions(tmp_path / "gone.jsonl")


def test_long_responses(tmp_path):
    (tmp_path / "a.csv").write_text('id,prediction\n1,"' + "x" * 200_000 + '"\n')
    assert len(read_predictions(tmp_path / "a.csv")["1"][0]) == 200_000
    (tmp_path / "a.csv").write_bytes(b"id,prediction\n1,\xff\n")
    with pytest.raises(DataError, match=r"a.csv, row 1: column 'prediction' is not UTF-8"):
        read_predictions(tmp_path / "a.csv")


def test_a_list_is_no_response(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": 1, "prediction": ["Answer: 3"]}\n')
    with pytest.raises(DataError, match="row 1: column 'prediction' must be text"):
        read_predictions(file)
