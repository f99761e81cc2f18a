"""Visual datasets: real annotation files are read whole, and what is missing is refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luspo_jax.datasets import DATASETS, DataError, load
from luspo_jax.datasets.images import open_image
from luspo_jax.datasets.table import read_examples


@pytest.mark.parametrize(
    ("name", "path", "rows", "first", "images"),
    [
        ("mathvista", "mathvista/testmini.json", 1000, "1", 1000),
        ("mathvision", "math_vision/test.jsonl", 3040, "1", 3040),
        ("mathvision", "math_vision/testmini.jsonl", 304, "4", 304),
        ("mathverse", "mathverse/testmini_text_only.json", 788, "1", 0),
        ("mathverse", "mathverse/visualizer_all.json", 726, "1", 605),
        ("dynamath", "dynamath/trial3.dataset.json", 501, "1/3", 501),
        ("wemath", "wemath/testmini.json", 1740, "2steps_1/2steps_1", 1740),
        ("logicvista", "logicvista/dataset.json", 448, "v1_0", 448),
        ("geometry3k", "geometry3k", 10, "11", 10),
    ],
)
def test_real_annotation_files_are_read_whole(shared_data, name, path, rows, first, images):
    examples, counts = read_examples(DATASETS[name], shared_data / "vl" / path)
    assert (len(examples), counts.rows) == (rows, rows)
    assert examples[0].meta["id"] == first
    assert sum(len(e.meta["images"]) for e in examples) == images
    assert sum(not e.answer for e in examples) == (1 if name == "logicvista" else 0)


@pytest.mark.parametrize(
    ("name", "path", "folder", "readable"),
    [
        ("mathvision", "math_vision/test.jsonl", None, 28),
        ("logicvista", "logicvista/dataset.json", "logicvista/images", 24),
        ("geometry3k", "geometry3k", None, 10),
    ],
)
def test_the_images_at_hand_open(shared_data, name, path, folder, readable):
    data = shared_data / "vl"
    place = data / folder if folder else data / path
    folder = data / folder if folder else place if place.is_dir() else place.parent
    examples, _ = read_examples(DATASETS[name], data / path)
    present = [r for e in examples for r in e.meta["images"] if (folder / r["path"]).is_file()]
    opened = [open_image(r, data / path, image_dir=folder) for r in present]
    assert len(opened) == readable


def test_all_variants_of_dynamath(shared_data):
    folder = shared_data / "vl" / "dynamath"
    examples, _ = read_examples(DATASETS["dynamath"], folder)
    assert len(examples) == 5010
    assert {e.meta["variant"] for e in examples} == set(range(1, 11))
    assert len({e.meta["id"] for e in examples}) == 5010
    single, _ = read_examples(DATASETS["dynamath"], folder / "trial3.dataset.json")
    assert single[0].meta["id"] == "1/3"
    assert len(read_examples(DATASETS["dynamath"], folder / "dataset.json")[0]) == 501
    present = [e for e in examples if _opens(e, folder)]
    assert {e.meta["variant"] for e in present} == {1, 2, 3}
    assert len(present) == 24


def _opens(example, source):
    try:
        open_image(example.meta["images"][0], source)
    except DataError:
        return False
    return True


def _variant_files(folder, *names):
    row = {"q1": {"question": "q", "answer": "1", "image": "image/a.png"}}
    row["q1"] |= {"answer_type": "float", "subject": "s", "level": "l"}
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(row))


def test_a_variant_of_dynamath_has_its_images_in_its_folder(tmp_path):
    """The authors' layout, and a flat one; what has no number is left out."""
    _variant_files(tmp_path, "trial1/dataset.json", "trial2.dataset.json", "dataset.json")
    examples, report = load("dynamath", tmp_path, data_dir=tmp_path / "built")
    images = {e.meta["id"]: e.meta["images"][0]["path"] for e in examples}
    assert images == {"q1/1": "trial1/image/a.png", "q1/2": "trial2/image/a.png"}
    assert report.sha256


def test_variants_need_a_number_of_their_own(tmp_path):
    _variant_files(tmp_path, "trial1.json", "variant_1.json")
    with pytest.raises(DataError, match=r"variant_1.json: is variant 1, and so is .*trial1.json"):
        read_examples(DATASETS["dynamath"], tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="whose name says which variant"):
        read_examples(DATASETS["dynamath"], tmp_path / "none")


def test_geometry3k_answers_with_the_value(shared_data, tmp_path):
    examples, report = load("geometry3k", shared_data / "vl" / "geometry3k", data_dir=tmp_path)
    assert (report.rows, len(report.sha256)) == (10, 16)
    assert (examples[0].answer, examples[0].meta["letter"]) == ("80", "D")


def test_geometry3k_refuses_a_letter_without_a_choice(tmp_path):
    folder = tmp_path / "train" / "3"
    folder.mkdir(parents=True)
    row = {"problem_text": "Find x.", "choices": ["1", "2"], "answer": "C", "id": 3}
    (folder / "data.json").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"3/data.json.*must be the letter of a choice, not 'C'"):
        load("geometry3k", tmp_path, data_dir=tmp_path / "built")


def test_geometry3k_of_the_hub_keeps_equal_problems_with_other_images(tmp_path):
    rows = [{"images": [f"{n}.png"], "problem": "<image>Find x.", "answer": n} for n in "12"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    examples, _ = load("geometry3k", tmp_path, data_dir=tmp_path / "built")
    assert [(e.answer, e.meta["id"]) for e in examples] == [("1", "1"), ("2", "2")]


VIRL_ROW = {
    "qid": "Processed-1",
    "question": "<image>How many?",
    "answer": "\\boxed{17^\\circ}",
    "image": ["images/Processed-1-0.jpg"],
    "category": "Spatial Reasoning",
    "source": "Processed",
    "PassRate_32BTrained": 0.5,
    "PassRate_7BBase": None,
}


def test_virl39k(tmp_path):
    rows = [VIRL_ROW, VIRL_ROW | {"qid": "2", "image": [], "PassRate_7BBase": 0.25}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "39Krelease.parquet")
    examples, _ = load("virl39k", tmp_path / "39Krelease.parquet", data_dir=tmp_path / "built")
    assert [e.answer for e in examples] == ["17^\\circ"] * 2
    assert examples[0].meta["images"] == [{"row": 1, "path": "images/Processed-1-0.jpg"}]
    assert examples[1].meta["images"] == []
    assert "PassRate_7BBase" not in examples[0].meta
    assert examples[1].meta["PassRate_7BBase"] == 0.25


@pytest.mark.parametrize("column", ["qid", "question", "answer", "image", "category", "source"])
def test_virl39k_refuses_a_missing_column_by_name(tmp_path, column):
    row = {name: value for name, value in VIRL_ROW.items() if name != column}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=f"a.jsonl, row 1: no column '{column}'"):
        load("virl39k", tmp_path / "a.jsonl", data_dir=tmp_path / "built")


@pytest.mark.parametrize("column", ["choices", "answer_type", "question_type", "pid", "image"])
def test_a_benchmark_refuses_a_missing_column_by_name(tmp_path, column):
    row = dict.fromkeys(("question", "answer", "choices", "answer_type", "question_type"), "1")
    row |= {"pid": "1", "image": "a.png", "metadata": {"task": "t", "skills": []}}
    del row[column]
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match=f"row 1: no column .*'{column}'; the columns are"):
        read_examples(DATASETS["mathvista"], tmp_path / "a.json")


def test_images_inside_a_hub_file_come_before_their_names(tmp_path):
    row = {"pid": "1", "question": "q", "answer": "1", "choices": None, "question_type": "f"}
    row |= {"answer_type": "integer", "metadata": {"task": "t", "skills": ["s"]}}
    row |= {"image": "images/1.jpg", "decoded_image": {"bytes": b"x", "path": None}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "testmini.parquet")
    (example,), _ = read_examples(DATASETS["mathvista"], tmp_path / "testmini.parquet")
    assert example.meta["images"] == [{"row": 1, "column": "decoded_image"}]


def test_latex_read_as_an_escape_is_restored(tmp_path):
    row = {"id": 1, "question": "q", "answer": "\frac{36}{13}", "options": []}
    row |= {"subject": "s", "level": 1, "image": "a"}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (example,), _ = read_examples(DATASETS["mathvision"], tmp_path / "a.json")
    assert example.answer == r"\frac{36}{13}"
