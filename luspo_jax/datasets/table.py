"""A file of problems: which columns to read, how rows become examples, duplicates and conflicts."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from luspo_jax.datasets.example import DataError, Example
from luspo_jax.datasets.images import references
from luspo_jax.datasets.rows import Row, column, read_rows

# Part of every built dataset's key: raise it when a rule that turns rows into examples changes.
READER_VERSION = 3


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


_NUMBER = "(row number)"  # names the rows of a table that has images and no identity


def _numbered(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    for number, row in read_rows(path):
        yield number, row | {_NUMBER: number}


@dataclasses.dataclass(frozen=True)
class Table:
    """How one source lays out its rows.

    Attributes:
      problem: columns that may hold the problem; the first that a row has is read.
      answer: likewise for the reference answer.
      meta: columns to keep where present.
      clean_problem: cell → problem; raises ValueError on a cell that is none.
      clean_answer: cell → answer; likewise.
      fields: name in `meta` → columns that may hold it; a row that has none of them is refused.
      identity: what names a row, in parts, each with the columns that may hold it; joined by "/"
        they are `meta["id"]`, which no two rows share. Rows with the same problem are then not
        merged: their images differ.
      images: columns that may hold images; `meta["images"]` refers to them. Needs an identity.
      rows: path → (row number from 1, row) of each row.
      folder: for sources with a folder a problem, the pattern of its file, `*/data.json`.
      origin: where the data comes from.
    """

    problem: tuple[str, ...]
    answer: tuple[str, ...]
    meta: tuple[str, ...] = ()
    clean_problem: Callable[[Any], str] = text
    clean_answer: Callable[[Any], str] = answer_text
    fields: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    identity: tuple[tuple[str, ...], ...] = ()
    images: tuple[str, ...] = ()
    rows: Callable[[pathlib.Path], Iterator[tuple[int, Row]]] = read_rows
    folder: str = ""
    origin: str = ""

    def __post_init__(self):
        if self.images and not self.identity:
            raise ValueError("a table with images needs an identity")

    def with_columns(
        self, problem: str | None, answer: str | None, image: str | None = None
    ) -> "Table":
        """The same with the caller's column names in place of its own."""
        named = dataclasses.replace(
            self,
            problem=(problem,) if problem else self.problem,
            answer=(answer,) if answer else self.answer,
            images=(image,) if image else self.images,
            identity=self.identity or ((_NUMBER,),) if image else self.identity,
        )
        return named if self.identity or not image else dataclasses.replace(named, rows=_numbered)

    def parse(self, row: Row, place: str, number: int = 0) -> tuple[str, str, dict]:
        """(problem, answer, meta) of a row; the number goes into references to its images.

        Raises:
          DataError: a column is missing or holds something else; names the place and the column.
        """
        problem = _cell(row, self.problem, self.clean_problem, place)
        answer = _cell(row, self.answer, self.clean_answer, place)
        meta = {name: row[name] for name in self.meta if row.get(name) is not None}
        meta |= {name: column(row, names, place)[1] for name, names in self.fields.items()}
        if self.identity:
            meta["id"] = "/".join(_cell(row, part, answer_text, place) for part in self.identity)
        if self.images:
            meta["images"] = references(*column(row, self.images, place), number, place)
        return problem, answer, meta


def _cell(row: Row, names: tuple[str, ...], clean: Callable[[Any], str], place: str) -> str:
    name, value = column(row, names, place)
    try:
        return clean(value)
    except ValueError as error:
        raise DataError(f"{place}: column {name!r} {error}") from error


@dataclasses.dataclass
class Counts:
    """Rows read, rows merged, problems dropped."""

    rows: int = 0
    duplicates: int = 0
    conflicts: int = 0


def read_examples(table: Table, path: pathlib.Path) -> tuple[list[Example], Counts]:
    """The examples of a file in order of first appearance, one for each distinct problem.

    Rows with the same problem, character by character, and the same answer are merged; a problem
    whose rows disagree on the answer is dropped. In a table with an identity every row is kept.

    Raises:
      DataError: a row that cannot be read, two rows with one identity, or no example at all.
    """
    if table.identity:
        return _read_identified(table, path)
    counts = Counts()
    kept: dict[str, tuple[str, dict]] = {}
    conflicting = set()
    for number, row in table.rows(path):
        problem, answer, meta = table.parse(row, f"{path}, row {number}", number)
        counts.rows += 1
        if problem not in kept:
            kept[problem] = answer, meta
            continue
        counts.duplicates += 1
        if kept[problem][0] != answer:
            conflicting.add(problem)
    counts.conflicts = len(conflicting)
    agreed = [item for item in kept.items() if item[0] not in conflicting]
    if not agreed:
        raise DataError(f"{path}: no examples ({counts.rows} rows, {counts.conflicts} conflicts)")
    examples = [
        Example(number, problem, answer, meta)
        for number, (problem, (answer, meta)) in enumerate(agreed)
    ]
    return examples, counts


def _read_identified(table: Table, path: pathlib.Path) -> tuple[list[Example], Counts]:
    examples: list[Example] = []
    places: dict[str, int] = {}
    for number, row in table.rows(path):
        problem, answer, meta = table.parse(row, f"{path}, row {number}", number)
        first = places.setdefault(meta["id"], number)
        if first != number:
            raise DataError(
                f"{path}, row {number}: id {meta['id']!r} stands in row {first} already"
            )
        examples.append(Example(len(examples), problem, answer, meta))
    if not examples:
        raise DataError(f"{path}: no examples (0 rows)")
    return examples, Counts(rows=len(examples))
