"""Geometry3K: problems about diagrams, each with four choices (arXiv:2105.04165).

It reads two file formats: the authors' folders, `train/11/data.json` beside `img_diagram.png`, and
the hub's table of `images`, `problem` and `answer`. In both, the answer is the value, not its
letter.
"""

import pathlib
import string
from collections.abc import Iterator

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.rows import Refuse, Row, column, read_rows, stop
from luspo_jax.datasets.table import Table
from luspo_jax.hosts import files

_DIAGRAM = "img_diagram.png"


def problem_rows(path: pathlib.Path, refuse: Refuse = stop) -> Iterator[tuple[int, Row]]:
    """Yields (row number, row) for each problem of a file or folder: `id`, `answer`, `images`."""
    if path.is_file():
        for number, row in read_rows(path, refuse):  # the hub's table has no id column
            yield number, {"id": number, **row}
        return
    found = sorted(path.glob("*/data.json"), key=lambda file: (len(file.parent.name), file))
    for number, file in enumerate(found, start=1):
        place = f"{path}, row {number}"
        try:
            yield number, _folder_row(file, f"{place}: {file.parent.name}/{file.name}")
        except DataError as error:
            refuse(error)


def _folder_row(file: pathlib.Path, place: str) -> Row:
    try:
        row = files.read_json(file)
    except ValueError as error:
        raise DataError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: not an object but {type(row).__name__}")
    choices, letter = (column(row, (name,), place)[1] for name in ("choices", "answer"))
    labels = string.ascii_uppercase[: len(choices)] if isinstance(choices, list) else ""
    if not isinstance(letter, str) or len(letter) != 1 or letter not in labels:
        raise DataError(f"{place}: column 'answer' must be the letter of a choice, not {letter!r}")
    return row | {
        "letter": letter,
        "answer": choices[labels.index(letter)],
        "images": [f"{file.parent.name}/{_DIAGRAM}"],
    }


GEOMETRY3K = Table(
    problem=("problem", "problem_text"),
    answer=("answer",),
    meta=("choices", "letter", "problem_type_graph", "problem_type_goal", "unit"),
    identity=(("id",),),
    images=("images",),
    rows=problem_rows,
    folder="*/data.json",
    origin="github.com/lupantech/InterGPS or huggingface.co/datasets/hiyouga/geometry3k",
)
