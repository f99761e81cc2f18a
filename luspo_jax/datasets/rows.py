"""Rows of a jsonl, json, csv or parquet file, and the columns in them."""

import csv
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from luspo_jax.datasets.example import DataError

_LONGEST_CELL = 1 << 24  # characters of a CSV cell; a model's response may be long
Row = dict[str, Any]
KEY = "_key"  # column of a row's name, where a .json file is an object of named rows


def read_rows(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    """(row number from 1, row) of each row; blank lines of a jsonl file are no rows.

    Raises:
      DataError: unknown kind of file, or one that cannot be read; the message names the row.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: cannot read {path.suffix!r} files, only {', '.join(readers)}")
    return readers[path.suffix](path)


def _jsonl(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8", errors="strict") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _object(json.loads(line), path, number)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, row {number}: not valid JSON ({error})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, after row {number}: not UTF-8 ({error})") from error


def _json(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    if isinstance(items, dict) and items and all(isinstance(v, dict) for v in items.values()):
        items = [{KEY: key, **item} for key, item in items.items()]
    if not isinstance(items, list):
        raise DataError(
            f"{path}: a .json file must hold a list of objects, or an object of named objects; "
            "or use .jsonl"
        )
    for number, item in enumerate(items, start=1):
        yield number, _object(item, path, number)


def _csv(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8", newline="") as lines:
        number = 0
        try:
            for number, row in enumerate(csv.DictReader(lines), start=1):
                yield number, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, after row {number}: not readable CSV ({error})") from error
        finally:
            csv.field_size_limit(limit)  # it belongs to the process


def _parquet(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}, after row {number}: not a readable parquet file ({error})"
        ) from error


def _object(item: Any, path: pathlib.Path, number: int) -> Row:
    if not isinstance(item, dict):
        raise DataError(f"{path}, row {number}: not an object but {type(item).__name__}")
    return item


def column(row: Row, names: Sequence[str], place: str) -> tuple[str, Any]:
    """The first of the named columns that the row has: (its name, its value).

    A dot steps into a nested value: `reward_model.ground_truth`, `prompt.0.content`.

    Raises:
      DataError: the row has none of them; the message lists the columns it has.
    """
    for name in names:
        found, value = _step_in(row, name)
        if found:
            return name, value
    wanted = " or ".join(repr(name) for name in names)
    raise DataError(f"{place}: no column {wanted}; the columns are: {', '.join(_paths(row))}")


def _step_in(row: Any, name: str) -> tuple[bool, Any]:
    if isinstance(row, dict) and name in row:
        return True, row[name]
    head, dot, rest = name.partition(".")
    if not dot:
        if isinstance(row, list) and name.isdigit() and int(name) < len(row):
            return True, row[int(name)]
        return False, None
    found, value = _step_in(row, head)
    return _step_in(value, rest) if found else (False, None)


def _paths(row: Any, prefix: str = "") -> list[str]:
    if isinstance(row, dict):
        items = row.items()
    elif isinstance(row, list) and row and isinstance(row[0], dict):
        items = [("0", row[0])]
    else:
        return [prefix.removesuffix(".")]
    return [path for key, value in items for path in _paths(value, f"{prefix}{key}.")]
