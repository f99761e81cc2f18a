"""A file of problems: which columns to read, how rows become examples, duplicates and conflicts."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from luspo_jax.datasets.example import DataError, Example
from luspo_jax.datasets.rows import Row, column, read_rows

# Part of every built dataset's key: raise it when a rule that turns rows into examples changes.
READER_VERSION = 1


def text(value: Any) -> str:
    """A cell as text; a whole number is written without a fraction, 27.0 as 27."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"must be text or a number, not {type(value).__name__}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    result = str(value)
    if not result.strip():
        raise ValueError("is empty")
    return result


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
      clean_problem: cell → problem; raises ValueError on a cell that is none.
      clean_answer: cell → answer; likewise.
      origin: where the data comes from.
    """

    problem: tuple[str, ...]
    answer: tuple[str, ...]
    meta: tuple[str, ...] = ()
    clean_problem: Callable[[Any], str] = text
    clean_answer: Callable[[Any], str] = answer_text
    origin: str = ""

    def with_columns(self, problem: str | None, answer: str | None) -> "Table":
        """The same with the caller's column names in place of its own."""
        return dataclasses.replace(
            self,
            problem=(problem,) if problem else self.problem,
            answer=(answer,) if answer else self.answer,
        )

    def parse(self, row: Row, place: str) -> tuple[str, str, dict]:
        """(problem, answer, meta) of a row.

        Raises:
          DataError: a column is missing or holds something else; names the place and the column.
        """
        problem = _cell(row, self.problem, self.clean_problem, place)
        answer = _cell(row, self.answer, self.clean_answer, place)
        meta = {name: row[name] for name in self.meta if row.get(name) is not None}
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
    whose rows disagree on the answer is dropped.

    Raises:
      DataError: a row that cannot be read, or no example at all.
    """
    counts = Counts()
    kept: dict[str, tuple[str, dict]] = {}
    conflicting = set()
    for number, row in read_rows(path):
        problem, answer, meta = table.parse(row, f"{path}, row {number}")
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
