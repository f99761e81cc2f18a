"""Images are carried as references and opened when asked for; what is wrong is named."""

import io
import json
import os

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luspo_jax.datasets.example import DataError, Example
from luspo_jax.datasets.images import ImageFiles, open_image, read_bytes, references
from luspo_jax.datasets.table import Table, read_examples
from luspo_jax.images.record import ImageError

TABLE = Table(problem=("q",), answer=("a",), identity=(("id",),), images=("image",))


def _png(color) -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (3, 2), color).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (None, []),
        ("", []),
        ([], []),
        ("a.png", [{"row": 7, "path": "a.png"}]),
        (["a.png", "b.png"], [{"row": 7, "path": "a.png"}, {"row": 7, "path": "b.png"}]),
        ({"bytes": None, "path": "a.png"}, [{"row": 7, "path": "a.png"}]),
        ({"bytes": b"x", "path": "a.png"}, [{"row": 7, "column": "image"}]),
        ([{"bytes": b"x", "path": None}], [{"row": 7, "column": "image.0"}]),
        ({"bytes": b"", "path": None}, [{"row": 7, "column": "image"}]),
        ([{"bytes": None, "path": " "}], [{"row": 7, "column": "image.0"}]),
    ],
)
def test_references(cell, found):
    assert references("image", cell, 7, "f, row 7") == found


def test_a_cell_that_is_no_image_is_refused():
    with pytest.raises(DataError, match=r"f, row 7: column 'image' must hold a path .* not int"):
        references("image", 3, 7, "f, row 7")


def test_paths_are_relative_to_the_file_or_a_named_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for folder, color in ((tmp_path, "red"), (tmp_path / "elsewhere", "blue")):
        (folder / "a.png").write_bytes(_png(color))
    source = tmp_path / "data.jsonl"
    source.write_text(json.dumps({"id": "x", "q": "1", "a": "1", "image": "a.png"}))
    (example,), _ = read_examples(TABLE, source)
    reference = example.meta["images"][0]
    assert open_image(reference, source).getpixel((0, 0)) == (255, 0, 0)
    blue = open_image(reference, source, image_dir=tmp_path / "elsewhere")
    assert blue.getpixel((0, 0)) == (0, 0, 255)


def test_a_missing_or_unreadable_image_is_named_by_file_and_row(tmp_path):
    (tmp_path / "bad.png").write_bytes(_png("red")[:40])
    source = tmp_path / "data.jsonl"
    with pytest.raises(DataError, match=r"data.jsonl, row 4: image .*gone.png is missing"):
        open_image({"row": 4, "path": "gone.png"}, source)
    with pytest.raises(DataError, match=r"data.jsonl, row 5: image .*bad.png cannot be read"):
        open_image({"row": 5, "path": "bad.png"}, source)


def test_embedded_images_of_every_row_group(tmp_path):
    colors = ["red", "lime", "blue", "white", "black"]
    rows = [
        {"id": str(n), "q": "?", "a": "1", "image": [{"bytes": _png(c), "path": None}]}
        for n, c in enumerate(colors)
    ]
    rows[4]["image"][0]["bytes"] = b"no image"
    source = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=2)
    examples, _ = read_examples(TABLE, source)
    found = [open_image(e.meta["images"][0], source).getpixel((1, 1)) for e in examples[:4]]
    assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    with pytest.raises(DataError, match=r"data.parquet, row 5: image in column 'image.0' cannot"):
        open_image(examples[4].meta["images"][0], source)
    with pytest.raises(DataError, match="row 9: column 'image' cannot be read"):
        open_image({"row": 9, "column": "image.0"}, source)


def test_rows_are_kept_apart_by_their_identity(tmp_path):
    source = tmp_path / "data.jsonl"
    rows = [{"id": n, "q": "Find x.", "a": str(n), "image": f"{n}.png"} for n in (1, 2)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, counts = read_examples(TABLE, source)
    assert [e.meta["id"] for e in examples] == ["1", "2"]
    assert (counts.rows, counts.duplicates, counts.conflicts) == (2, 0, 0)
    source.write_text("".join(json.dumps(rows[0]) + "\n" for _ in range(2)))
    with pytest.raises(DataError, match=r"row 2: id '1' stands in row 1 already"):
        read_examples(TABLE, source)
    # Without an identity, equal texts beside images are different problems.
    unnamed = Table(problem=("q",), answer=("a",), images=("image",))
    examples, counts = read_examples(unnamed, source)
    assert (len(examples), counts.duplicates, counts.pictured) == (2, 0, 2)


def test_real_embedded_images(shared_data):
    source = shared_data / "vl" / "deepeyes_mini" / "deepeyes_mini_10.parquet"
    table = Table(
        problem=("extra_info.question",),
        answer=("reward_model.ground_truth",),
        identity=(("data_source",), ("extra_info.index",)),
        images=("images",),
    )
    examples, _ = read_examples(table, source)
    assert len(examples) == 10
    assert all(open_image(r, source).size > (1, 1) for e in examples for r in e.meta["images"])


def test_images_are_read_when_they_are_asked_for(tmp_path):
    (tmp_path / "a.png").write_bytes(_png("red"))
    source = tmp_path / "data.jsonl"
    references = [{"row": 4, "path": "a.png"}, {"row": 4, "path": "gone.png"}]
    example = Example(0, "p", "", {"images": references})
    first, second = ImageFiles(source).images(example)
    assert first.read() == _png("red") == read_bytes(references[0], source)
    assert first.place == f"{source}, row 4, image a.png"
    with pytest.raises(ImageError, match=r"missing: .*data.jsonl, row 4: image .*gone.png is"):
        second.read()
    with (tmp_path / "gone.png").open("wb") as sparse:
        sparse.truncate(3 << 30)
    with pytest.raises(ImageError, match=r"huge: .*row 4: image .*gone.png has 3,221,225,472 byt"):
        second.read()
    assert ImageFiles(source).images(Example(0, "p", "")) == []
    (unknown,) = ImageFiles().images(Example(0, "p", "", {"images": references[:1]}))
    with pytest.raises(ImageError, match="no data file is known"):
        unknown.read()


def test_a_file_that_changes_is_read_anew(tmp_path):
    source = tmp_path / "data.parquet"
    for color in ("red", "blue"):
        pq.write_table(pa.table({"image": [[{"bytes": _png(color), "path": None}]]}), source)
        os.utime(source, ns=(0, len(color)))
        assert read_bytes({"row": 1, "column": "image.0"}, source) == _png(color)


def test_an_image_without_bytes_or_path_is_empty_and_not_left_out(tmp_path):
    source = tmp_path / "data.parquet"
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    cells = [[{"bytes": b"", "path": None}], [{"bytes": None, "path": None}], []]
    pq.write_table(
        pa.table({"id": [1, 2, 3], "q": ["x"] * 3, "a": ["1"] * 3, "image": pa.array(cells, kind)}),
        source,
    )
    examples, _ = read_examples(TABLE, source)
    first, second, none = (ImageFiles(source).images(example) for example in examples)
    assert [image.read() for image in (*first, *second)] == [b"", b""]
    assert none == []
