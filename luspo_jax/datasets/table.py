"""A file of problems: which columns to read, how rows become examples, duplicates and conflicts."""

import array
import dataclasses
import hashlib
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from tqdm import tqdm

from luspo_jax.datasets.example import DataError, Example
from luspo_jax.datasets.images import Reference, references
from luspo_jax.datasets.rows import Refuse, Row, column, read_rows, step_in

# Part of every built dataset's key: raise it when a rule that turns rows into examples changes.
READER_VERSION = 4


def text(value: Any) -> str:
    """A cell as text; a whole number is written without a fraction, 27.0 as 27."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"must be text or a number, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"is {value}, which stands for no value")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    result = str(value)
    if not result.strip():
        raise ValueError("is empty")
    return result


def optional_text(value: Any) -> str:
    """A cell as text without white space around it; empty where it is null or blank."""
    blank = value is None or value != value or (isinstance(value, str) and not value.strip())
    return "" if blank else text(value).strip()


def answer_text(value: Any) -> str:
    """A cell as text without white space around it."""
    return text(value).strip()


def integer(value: Any) -> str:
    """A cell that holds a whole number, perhaps zero-filled: 033 is 33. Other text is kept."""
    result = answer_text(value)
    return str(int(result)) if result.isascii() and result.isdigit() else result


@dataclasses.dataclass(frozen=True)
class Table:
    """How one source lays out its rows.

    Attributes:
      problem: columns that may hold the problem; the first that a row has is read.
      answer: likewise for the reference answer.
      meta: columns to keep where present.
      keep: columns to keep as text; a row that lacks one is refused.
      clean_problem: cell → problem; raises ValueError on a cell that is none.
      clean_answer: cell → answer; likewise.
      fields: name in `meta` → columns that may hold it; a row that has none of them is refused.
      identity: what names a row, in parts, each with the columns that may hold it; joined by "/"
        they are `meta["id"]`, which no two rows share. Rows with the same problem are then not
        merged: their images differ.
      images: columns that may hold images; `meta["images"]` refers to them. Without an identity a
        row may do without any, and rows that have some are not merged.
      rows: path, and what takes note of a row that cannot be read → (row number from 1, row) of
        each row.
      folder: for sources with a folder a problem, the pattern of its file, `*/data.json`.
      origin: where the data comes from.
    """

    problem: tuple[str, ...]
    answer: tuple[str, ...]
    meta: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    clean_problem: Callable[[Any], str] = text
    clean_answer: Callable[[Any], str] = answer_text
    fields: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    identity: tuple[tuple[str, ...], ...] = ()
    images: tuple[str, ...] = ()
    rows: Callable[[pathlib.Path, Refuse], Iterator[tuple[int, Row]]] = read_rows
    folder: str = ""
    origin: str = ""

    def with_columns(
        self,
        problem: str | None,
        answer: str | None,
        image: str | None = None,
        keep: Sequence[str] = (),
    ) -> "Table":
        """The same with the caller's column names in place of its own, and with more to keep."""
        return dataclasses.replace(
            self,
            problem=(problem,) if problem else self.problem,
            answer=(answer,) if answer else self.answer,
            images=(image,) if image else self.images,
            keep=tuple(keep),
        )

    def parse(self, row: Row, place: str, number: int = 0) -> tuple[str, str, dict]:
        """(problem, answer, meta) of a row; the number goes into references to its images.

        Raises:
          DataError: a column is missing or holds something else; names the place and the column.
        """
        problem = _cell(row, self.problem, self.clean_problem, place)
        answer = _cell(row, self.answer, self.clean_answer, place)
        meta = {name: row[name] for name in self.meta if row.get(name) is not None}
        meta |= {name: column(row, names, place)[1] for name, names in self.fields.items()}
        meta |= {name: _cell(row, (name,), text, place) for name in self.keep}
        if self.identity:
            meta["id"] = "/".join(_cell(row, part, answer_text, place) for part in self.identity)
            if self.images:
                meta["images"] = references(*column(row, self.images, place), number, place)
        elif images := self._own_images(row, place, number):
            meta["images"] = images
        return problem, answer, meta

    def _own_images(self, row: Row, place: str, number: int) -> list[Reference]:
        """The images of a row that need not have any."""
        found = {}
        for name in self.images:
            has, cell = step_in(row, name)
            if has and (images := references(name, cell, number, place)):
                found[name] = images
        if len(found) > 1:
            raise DataError(
                f"{place}: images in the columns {' and '.join(found)}: data.image_column says "
                "which is meant"
            )
        return next(iter(found.values()), [])


def _cell(row: Row, names: tuple[str, ...], clean: Callable[[Any], str], place: str) -> str:
    name, value = column(row, names, place)
    try:
        return encodable(clean(value))
    except ValueError as error:
        raise DataError(f"{place}: column {name!r} {error}") from error


UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are no text, as `files.open_text` reads them


def encodable(text: str) -> str:
    """The text.

    Raises:
      ValueError: it holds half a character, or a byte that is no text; no file could hold it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        sign, place = text[error.start], error.start + 1
        half = f"half a character, U+{ord(sign):X}"
        what = f"the byte 0x{ord(sign) - 0xDC00:02x}" if UNDECODED.match(sign) else half
        raise ValueError(f"is not UTF-8: {what}, is at place {place}") from None
    return text


@dataclasses.dataclass
class Counts:
    """Rows read, rows merged, problems dropped, rows left out, problems with images."""

    rows: int = 0
    duplicates: int = 0
    conflicts: int = 0
    unusable: int = 0
    pictured: int = 0


class Kept:
    """What was kept of a file, in order of first appearance, as lines of JSON in a file.

    A million problems would take several times their bytes as objects.
    """

    def __init__(self, spool: BinaryIO):
        self._spool, self._skipped, self._written = spool, set(), 0

    def __len__(self) -> int:
        return self._written - len(self._skipped)

    def add(self, problem: str, answer: str, meta: dict, place: str) -> int:
        """Writes one; its place among all that were written.

        Raises:
          DataError: a column of `meta` holds what no file can.
        """
        try:
            line = _ENCODE([problem, answer, meta]).encode()
        except (TypeError, ValueError):
            raise DataError(f"{place}: {_unwritable(meta)}") from None
        self._spool.write(line + b"\n")
        self._written += 1
        return self._written - 1

    def skip(self, place: int) -> None:
        """Leaves out one that was written."""
        self._skipped.add(place)

    def lines(self) -> Iterator[bytes]:
        """[problem, answer, meta] of each as JSON."""
        self._spool.seek(0)
        for place, line in enumerate(self._spool):
            if place not in self._skipped:
                yield line.rstrip()

    def __iter__(self) -> Iterator[Example]:
        return (Example(n, *json.loads(line)) for n, line in enumerate(self.lines()))


_ENCODE = json.JSONEncoder(ensure_ascii=False).encode


def _unwritable(meta: dict) -> str:
    for name, value in meta.items():
        try:
            _ENCODE(value).encode()
        except UnicodeEncodeError:
            return f"column {name!r} is not UTF-8"
        except (TypeError, ValueError) as error:
            return f"column {name!r} cannot be kept ({error})"
    raise AssertionError("every column of it can be written")


class BadRows:
    """Rows that cannot be used: how many, and what is wrong with the first."""

    def __init__(self, path: pathlib.Path):
        self._path, self._first, self.count = path, [], 0

    def add(self, error: DataError) -> None:
        """Takes note of a row."""
        self.count += 1
        if len(self._first) < _NAMED:
            self._first.append(str(error).removeprefix(f"{self._path}, ").partition(": "))

    def error(self, read: int) -> DataError:
        """All of them in one message; `read` rows can be used."""
        rows: dict[str, list[str]] = {}
        for place, _, what in self._first:
            rows.setdefault(what, []).append(place.removeprefix("row "))
        named = "; ".join(
            f"row{'s' * (len(places) > 1)} {', '.join(places)}: {what}"
            for what, places in rows.items()
        )
        more = self.count - len(self._first)
        named += f"; and {more:,} rows more" * bool(more)
        remedy = "; mend them, or leave them out with data.drop_bad_rows=True" if read else ""
        if self.count == 1:
            return DataError(f"{self._path}, {named}{remedy}")
        return DataError(f"{self._path}: {self.count:,} rows cannot be used; {named}{remedy}")


_NAMED = 10  # rows that a message names


def read_examples(table: Table, path: pathlib.Path) -> tuple[list[Example], Counts]:
    """The examples of a file, in memory; see `read_file`."""
    with tempfile.TemporaryFile() as spool:
        kept, counts = read_file(table, path, spool)
        return list(kept), counts


def read_file(
    table: Table, path: pathlib.Path, spool: BinaryIO, *, drop_bad_rows: bool = False
) -> tuple[Kept, Counts]:
    """The examples of a file in order of first appearance, one for each distinct problem.

    Rows with the same problem, character by character, and the same answer are merged; a problem
    whose rows disagree on the answer is dropped. In a table with an identity every row is kept, and
    so is every row with images: theirs may differ.

    Args:
      table: how its rows are laid out.
      path: the file.
      spool: where what is kept is written.
      drop_bad_rows: whether rows that cannot be used are left out and counted.

    Raises:
      DataError: rows that cannot be used, all in one message; or no example at all.
    """
    kept, counts, bad = Kept(spool), Counts(), BadRows(path)
    merged = _Merged(table, kept, counts)
    rows = table.rows(path, bad.add)
    for number, row in tqdm(
        rows, f"reading {path.name}", _about(path), disable=None, delay=1, unit=" rows"
    ):
        try:
            merged.add(row, f"{path}, row {number}", number)
        except DataError as error:
            bad.add(error)
    counts.conflicts = merged.drop_conflicts()
    if bad.count and not (drop_bad_rows and counts.rows):
        raise bad.error(counts.rows)
    counts.unusable = bad.count
    if not len(kept):
        raise DataError(f"{path}: no examples ({counts.rows} rows, {counts.conflicts} conflicts)")
    return kept, counts


class _Merged:
    """Adds rows to those that are kept, unless their problem is there already."""

    def __init__(self, table: Table, kept: Kept, counts: Counts):
        self._table, self._kept, self._counts = table, kept, counts
        self._places: dict[bytes, int] = {}  # of a problem's or identity's digest
        self._answers = array.array("q")  # hashes, by place; of identities the rows' numbers
        self._conflicts: set[int] = set()

    def add(self, row: Row, place: str, number: int) -> None:
        problem, answer, meta = self._table.parse(row, place, number)
        images, identified = bool(meta.get("images")), bool(self._table.identity)
        key = _digest(meta["id"] if identified else problem)
        first = None if images and not identified else self._places.get(key)
        if first is None:
            at = self._kept.add(problem, answer, meta, place)
            self._answers.append(number if identified else hash(answer))
            if identified or not images:
                self._places[key] = at
            self._counts.pictured += images
        elif identified:
            raise DataError(
                f"{place}: id {meta['id']!r} stands in row {self._answers[first]} already"
            )
        else:
            self._counts.duplicates += 1
            if self._answers[first] != hash(answer):
                self._conflicts.add(first)
        self._counts.rows += 1

    def drop_conflicts(self) -> int:
        for place in self._conflicts:
            self._kept.skip(place)
        return len(self._conflicts)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _about(path: pathlib.Path) -> int | None:
    """Rows of a file of lines, roughly, for a progress bar."""
    if path.suffix.lower() not in (".jsonl", ".csv"):
        return None
    with path.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
