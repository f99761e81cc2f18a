"""Reads rows of jsonl, json, csv or parquet files, and their columns."""

import csv
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from luspo_jax.datasets.example import DataError
from luspo_jax.hosts import files

_LONGEST_CELL = 1 << 24  # characters of a CSV cell; a model's response may be long
Row = dict[str, Any]
Refuse = Callable[[DataError], None]  # records a row that cannot be read
# Our own columns: a row's name, if a .json file is an object of named rows; its variant.
KEY, VARIANT = "_key", "_variant"


def stop(error: DataError) -> None:
    """Raises the error: no row may be left out."""
    raise error


def read_rows(path: pathlib.Path, refuse: Refuse = stop) -> Iterator[tuple[int, Row]]:
    """Yields (row number from 1, row); skips blank lines of a jsonl file.

    The suffix determines the file type; with any other suffix, the content does.

    Args:
      path: the file.
      refuse: called with the error of an unreadable row; if it returns, reading continues.

    Raises:
      DataError: unknown file type, or an unreadable file; the message names the row.
    """
    try:
        yield from _READERS[_kind(path)](path, refuse)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def rows_of(
    paths: Sequence[pathlib.Path],
    refuse: Refuse,
    read: Callable[[pathlib.Path, Refuse], Iterator[tuple[int, Row]]] = read_rows,
) -> Iterator[tuple[str, int, Row]]:
    """Yields (file and row in words, number among the rows of all files, row), with a progress bar.

    Arguments as for `read_rows`, which `read` replaces.
    """
    before = 0
    for path in paths:
        number, rows = 0, read(path, refuse)
        for number, row in tqdm(
            rows, f"reading {path.name}", _about(path), disable=None, delay=1, unit=" rows"
        ):
            yield f"{path}, row {number}", before + number, row
        before += number


def _about(path: pathlib.Path) -> int | None:
    """Estimates the rows of a file of lines, for a progress bar."""
    if path.suffix.lower() not in (".jsonl", ".csv"):
        return None
    with path.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))


def _kind(path: pathlib.Path) -> str:
    """Returns the suffix that determines the file type."""
    suffix = path.suffix.lower()
    if suffix in _READERS and suffix != ".json":
        return suffix
    with path.open("rb") as stream:
        if stream.read(4) == b"PAR1":
            return ".parquet"
    with files.open_text(path) as lines:
        first = next((line for line in lines if line.strip()), "")
        second = next((line for line in lines if line.strip()), "")
    if second and first.lstrip().startswith("{") and _is_json(first):
        return ".jsonl"
    if suffix == ".json" or first.lstrip().startswith(("{", "[")):
        return ".json"
    raise DataError(
        f"{path}: cannot read {path.suffix!r} files, only {', '.join(_READERS)}, or under any name "
        "what is JSON or parquet"
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _jsonl(path: pathlib.Path, refuse: Refuse) -> Iterator[tuple[int, Row]]:
    with files.open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                refuse(DataError(f"{path}, row {number}: not valid JSON ({error})"))
                continue
            yield from _object(item, path, number, refuse)


def _json(path: pathlib.Path, refuse: Refuse) -> Iterator[tuple[int, Row]]:
    try:
        items = files.read_json(path)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    if isinstance(items, dict) and items and all(isinstance(v, dict) for v in items.values()):
        items = [{KEY: key, **item} for key, item in items.items()]
    if not isinstance(items, list):
        raise DataError(
            f"{path}: a .json file must hold a list of objects, or an object of named objects; "
            "or use .jsonl"
        )
    for number, item in enumerate(items, start=1):
        yield from _object(item, path, number, refuse)


def _csv(path: pathlib.Path, refuse: Refuse) -> Iterator[tuple[int, Row]]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    number = 0
    with files.open_text(path, newline="") as lines:
        try:
            cells = csv.reader(lines)
            header = next(cells, [])
            for name in header:
                if header.count(name) > 1:
                    raise DataError(f"{path}: its first line names the column {name!r} twice")
            for number, row in enumerate(filter(None, cells), start=1):
                if len(row) == len(header):
                    yield number, dict(zip(header, row, strict=True))
                else:
                    refuse(_ragged(path, number, row, header))
        except csv.Error as error:
            raise DataError(f"{path}, after row {number}: not readable CSV ({error})") from error
        finally:
            csv.field_size_limit(limit)  # the limit is global to the process


def _ragged(path: pathlib.Path, number: int, row: list[str], header: list[str]) -> DataError:
    return DataError(
        f"{path}, row {number}: {len(row)} cells, and its first line names {len(header)} columns "
        f"({', '.join(header)}); a cell with a comma in it stands in double quotes"
    )


def _parquet(path: pathlib.Path, refuse: Refuse) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            narrow = [field for field in table.schema_arrow if _has_narrow(field.type)]
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row | {f.name: _plain(row[f.name], f.type) for f in narrow}
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}, after row {number}: not a readable parquet file ({error})"
        ) from error


def _has_narrow(kind: Any) -> bool:
    return "halffloat" in str(kind) or bool(re.search(r"\bfloat\b", str(kind)))


def _plain(value: Any, kind: Any) -> Any:
    """Converts an Arrow value; narrow floats become the shortest decimals that denote them.

    A float32 written as 0.1 is 0.10000000149011612 in Python's floats.
    """
    from pyarrow import types

    if isinstance(value, float) and (types.is_float32(kind) or types.is_float16(kind)):
        return float(str(kind.to_pandas_dtype()(value)))
    if types.is_struct(kind) and value is not None:
        return {field.name: _plain(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and not types.is_map(kind):
        return [_plain(item, kind.value_type) for item in value]
    return _plain(value, kind.value_type) if types.is_dictionary(kind) else value


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
SUFFIXES = tuple(_READERS)


def _object(item: Any, path: pathlib.Path, number: int, refuse: Refuse) -> Iterator:
    if isinstance(item, dict):
        yield number, item
    else:
        refuse(DataError(f"{path}, row {number}: not an object but {type(item).__name__}"))


def column(row: Row, names: Sequence[str], place: str) -> tuple[str, Any]:
    """Returns (name, value) of the first of the named columns that the row has.

    A dot steps into a nested value: `reward_model.ground_truth`, `prompt.0.content`.

    Raises:
      DataError: the row has none of them; the message lists its columns.
    """
    for name in names:
        found, value = step_in(row, name)
        if found:
            return name, value
    wanted = " or ".join(repr(name) for name in names)
    raise DataError(f"{place}: no column {wanted}; the columns are: {', '.join(names_in(row))}")


def names_in(row: Row) -> list[str]:
    """Returns the dotted names of a row's columns."""
    return _paths({name: value for name, value in row.items() if name not in (KEY, VARIANT)})


def step_in(row: Any, name: str) -> tuple[bool, Any]:
    """Returns (whether a column of this dotted name exists, its value)."""
    if isinstance(row, dict) and name in row:
        return True, row[name]
    head, dot, rest = name.partition(".")
    if not dot:
        if isinstance(row, list) and name.isdigit() and int(name) < len(row):
            return True, row[int(name)]
        return False, None
    found, value = step_in(row, head)
    return step_in(value, rest) if found else (False, None)


def _paths(row: Any, prefix: str = "") -> list[str]:
    if isinstance(row, dict):
        items = row.items()
    elif isinstance(row, list) and row and isinstance(row[0], dict):
        items = [("0", row[0])]
    else:
        return [prefix.removesuffix(".")]
    return [path for key, value in items for path in _paths(value, f"{prefix}{key}.")]
