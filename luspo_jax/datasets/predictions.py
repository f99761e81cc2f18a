"""Reads a model's responses to a benchmark, by id, from a file with named columns."""

import pathlib
from collections.abc import Sequence

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.rows import column, read_rows
from luspo_jax.datasets.table import UNDECODED, answer_text, encodable, optional_text
from luspo_jax.hosts import files


def read_predictions(
    path: str | pathlib.Path, *, id_columns: Sequence[str] = ("id",), response: str = "prediction"
) -> dict[str, list[str]]:
    """Maps ids to responses, in row order; a null cell is an empty response.

    Args:
      path: a .jsonl, .json, .csv or .parquet file.
      id_columns: columns that together identify a row; several are joined by "/".
      response: column of the response.

    Raises:
      DataError: no such file, a row that cannot be read, a missing column, or no rows.
    """
    path = files.local(path)
    if not path.is_file():
        raise DataError(f"predictions: no file {path}")
    found: dict[str, list[str]] = {}
    for number, row in read_rows(path):
        place = f"{path}, row {number}"
        name = "/".join(_name(*column(row, (part,), place), place) for part in id_columns)
        cell = column(row, (response,), place)[1]
        found.setdefault(name, []).append(_text(response, cell, place))
    if not found:
        raise DataError(f"{path}: there are no predictions")
    return found


def _name(name: str, cell, place: str) -> str:
    return _text(name, cell, place, answer_text)


def _text(name: str, cell, place: str, read=optional_text) -> str:
    try:
        said = read(cell)
        # A model that stops mid-character may leave half of it.
        return encodable(said) if UNDECODED.search(said) else said
    except ValueError as error:
        raise DataError(f"{place}: column {name!r} {error}") from error
