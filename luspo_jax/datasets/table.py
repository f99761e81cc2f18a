"""A file of problems: which columns to read, how rows become examples, duplicates and conflicts."""

import array
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from luspo_jax.datasets import filters
from luspo_jax.datasets.example import DataError, Example
from luspo_jax.datasets.images import Reference, references
from luspo_jax.datasets.rows import Refuse, Row, column, read_rows, rows_of, step_in
from luspo_jax.datasets.selection import ALL, Selection

# Part of every built dataset's key: raise it when a rule from rows to examples changes.
READER_VERSION = 4


def text(value: Any) -> str:
    """Converts a cell to text; a whole number has no fraction, 27.0 becomes 27."""
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
    """Converts a cell to stripped text; empty if it is null or blank."""
    blank = value is None or value != value or (isinstance(value, str) and not value.strip())
    return "" if blank else text(value).strip()


def answer_text(value: Any) -> str:
    """Converts a cell to stripped text."""
    return text(value).strip()


def integer(value: Any) -> str:
    """Converts a whole number, perhaps zero-filled: 033 becomes 33. Other text is kept."""
    result = answer_text(value)
    return str(int(result)) if result.isascii() and result.isdigit() else result


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns of a file that a caller names; one that is empty is the dataset's own.

    Attributes:
      problem: of the problem.
      answer: of the answer.
      image: of the images; in a user's own file, by default `image` or `images` if a row has one.
        Its rows need not have images.
      keep: more columns to keep in `meta`, such as those that a template names.
    """

    problem: str = ""
    answer: str = ""
    image: str = ""
    keep: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """The columns of a source's rows.

    Attributes:
      problem: candidate columns of the problem; the first that a row has is read.
      answer: likewise for the reference answer.
      meta: columns to keep if present.
      keep: columns to keep as text; a row that lacks one is refused.
      clean_problem: cell → problem; raises ValueError on an invalid cell.
      clean_answer: cell → answer; likewise.
      fields: name in `meta` → its candidate columns; a row that has none of them is refused.
      identity: parts of a row's name, each with its candidate columns; joined by "/" they form
        `meta["id"]`, which must be unique. Rows with the same problem are then not merged, because
        their images differ.
      images: candidate columns of images; `meta["images"]` refers to them. Without an identity a
        row may lack images, and rows with images are not merged.
      rows: (path, callback for an unreadable row) → (row number from 1, row) of each row.
      folder: for sources with one folder per problem, the pattern of its file, `*/data.json`.
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

    def with_columns(self, columns: Columns) -> "Table":
        """Returns a copy with the caller's column names, and more columns to keep."""
        return dataclasses.replace(
            self,
            problem=(columns.problem,) if columns.problem else self.problem,
            answer=(columns.answer,) if columns.answer else self.answer,
            images=(columns.image,) if columns.image else self.images,
            keep=tuple(columns.keep),
        )

    def parse(self, row: Row, place: str, number: int = 0) -> tuple[str, str, dict]:
        """Parses a row into (problem, answer, meta); image references carry the number.

        Raises:
          DataError: a missing or invalid column; names the place and the column.
        """
        earlier, problem = _asked(row, self.problem, self.clean_problem, place)
        answer = _cell(row, self.answer, self.clean_answer, place)
        meta = {name: row[name] for name in self.meta if row.get(name) is not None}
        meta |= {name: column(row, names, place)[1] for name, names in self.fields.items()}
        meta |= {name: _cell(row, (name,), text, place) for name in self.keep}
        if earlier:
            meta[EARLIER] = earlier
        if self.identity:
            meta["id"] = "/".join(_cell(row, part, answer_text, place) for part in self.identity)
            if self.images:
                meta["images"] = references(*column(row, self.images, place), number, place)
        elif images := self._own_images(row, place, number):
            meta["images"] = images
        return problem, answer, meta

    def _own_images(self, row: Row, place: str, number: int) -> list[Reference]:
        """Returns the images of a row, which may have none."""
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


EARLIER = "earlier_messages"  # in `meta`: what is said before the problem, in a conversation


def _asked(row: Row, names, clean, place: str) -> tuple[list[dict[str, str]], str]:
    """Returns (the messages before it, the problem): of a list of messages the last is the problem.

    Raises:
      DataError: a list that is no conversation which ends with a message of the user.
    """
    name, value = column(row, names, place)
    if not isinstance(value, list):
        return [], _cell(row, names, clean, place)
    fields = {"role", "content"}
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not fields <= set(message):
            raise DataError(
                f"{place}: column {name!r} is a list, and its part {number} no message with role "
                "and content"
            )
        if not isinstance(message["content"], str):
            raise DataError(
                f"{place}: column {name!r}, message {number}: its content is no text; of images "
                "name their column, data.image_column"
            )
    if not value or value[-1]["role"] != "user":
        last = f"ends with a message of the {value[-1]['role']}" if value else "is empty"
        raise DataError(f"{place}: column {name!r} {last}: the last must be the user's")
    *before, last = value
    try:
        said = [{"role": m["role"], "content": encodable(m["content"])} for m in before]
        return said, encodable(clean(last["content"]))
    except ValueError as error:
        raise DataError(f"{place}: column {name!r} {error}") from error


def _cell(row: Row, names: tuple[str, ...], clean: Callable[[Any], str], place: str) -> str:
    name, value = column(row, names, place)
    try:
        return encodable(clean(value))
    except ValueError as error:
        raise DataError(f"{place}: column {name!r} {error}") from error


UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are not text, as read by `files.open_text`


def encodable(text: str) -> str:
    """Returns the text unchanged.

    Raises:
      ValueError: it holds half a character or a byte that is not text, which no file can store.
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
    """Rows by what became of them, dropped problems, and problems with images: as of a Report."""

    rows: int = 0
    duplicates: int = 0
    conflicts: int = 0
    unusable: int = 0
    pictured: int = 0
    filtered: int = 0


class Kept:
    """The examples kept of a file, in order of first appearance, as lines of JSON in a file.

    As objects, a million problems would take several times their bytes.
    """

    def __init__(self, spool: BinaryIO):
        self._spool, self._skipped, self._written = spool, set(), 0

    def __len__(self) -> int:
        return self._written - len(self._skipped)

    def add(self, problem: str, answer: str, meta: dict, place: str) -> int:
        """Writes an example and returns its index among all written ones.

        Raises:
          DataError: a column of `meta` holds a value that no file can store.
        """
        try:
            line = _ENCODE([problem, answer, meta]).encode()
        except (TypeError, ValueError):
            raise DataError(f"{place}: {_unwritable(meta)}") from None
        self._spool.write(line + b"\n")
        self._written += 1
        return self._written - 1

    def skip(self, place: int) -> None:
        """Leaves out an example already written."""
        self._skipped.add(place)

    def lines(self) -> Iterator[bytes]:
        """Yields [problem, answer, meta] of each as JSON."""
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
    """Unusable rows: their number, and the errors of the first few."""

    def __init__(self, path: pathlib.Path):
        self._path, self._first, self.count = path, [], 0

    def add(self, error: DataError) -> None:
        """Records a row."""
        self.count += 1
        if len(self._first) < _NAMED:
            self._first.append(str(error).removeprefix(f"{self._path}, ").partition(": "))

    def error(self, read: int) -> DataError:
        """Returns one error for all of them; `read` rows are usable."""
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


_NAMED = 10  # rows named in a message


def read_examples(table: Table, path: pathlib.Path) -> tuple[list[Example], Counts]:
    """Reads the examples of a file into memory; see `read_file`."""
    with tempfile.TemporaryFile() as spool:
        kept, counts = read_file(table, [path], spool)
        return list(kept), counts


def read_file(
    table: Table,
    paths: Sequence[pathlib.Path],
    spool: BinaryIO,
    selection: Selection = ALL,
) -> tuple[Kept, Counts]:
    """Reads the examples of files in order of first appearance, one per distinct problem.

    Rows with the same problem, character by character, and the same answer are merged; a problem
    whose rows disagree on the answer is dropped. Every row of a table with an identity is kept, and
    so is every row with images, because theirs may differ.

    Args:
      table: their columns.
      paths: the files, which are read as one.
      spool: file to which kept examples are written.
      selection: which rows to take.

    Raises:
      DataError: unusable rows, all in one message; or no example at all.
    """
    keeps, drop_bad_rows = filters.made(selection.filter), selection.drop_bad_rows
    kept, counts, bad = Kept(spool), Counts(), BadRows(paths[0])
    merged = _Merged(table, kept, counts)
    rows = itertools.islice(rows_of(paths, bad.add, table.rows), selection.limit or None)
    for place, number, row in rows:
        try:
            if keeps is not None and not keeps.keeps(row, place):
                counts.filtered += 1
                continue
            merged.add(row, place, number)
        except DataError as error:
            if keeps is not None and not (counts.rows or counts.filtered or drop_bad_rows):
                raise  # at the first row: a filter is easily wrong, and a file may be long
            bad.add(error)
    counts.conflicts = merged.drop_conflicts()
    if bad.count and not (drop_bad_rows and counts.rows):
        raise bad.error(counts.rows)
    counts.unusable = bad.count
    if not len(kept):
        if counts.filtered and not counts.rows:
            raise DataError(
                f"{paths[0]}: data.filter={keeps.text!r} keeps none of {counts.filtered:,} rows"
            )
        raise DataError(
            f"{paths[0]}: no examples ({counts.rows} rows, {counts.conflicts} conflicts)"
        )
    return kept, counts


class _Merged:
    """Adds rows to the kept ones, unless their problem is already there."""

    def __init__(self, table: Table, kept: Kept, counts: Counts):
        self._table, self._kept, self._counts = table, kept, counts
        self._places: dict[bytes, int] = {}  # of a problem's or identity's digest
        self._answers = array.array("q")  # by place: hashes, or row numbers for identities
        self._conflicts: set[int] = set()

    def add(self, row: Row, place: str, number: int) -> None:
        problem, answer, meta = self._table.parse(row, place, number)
        images, identified = bool(meta.get("images")), bool(self._table.identity)
        earlier = _ENCODE(meta[EARLIER]) if EARLIER in meta else ""
        key = _digest(meta["id"] if identified else problem + earlier)
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
