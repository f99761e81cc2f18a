"""A problem with its reference answer, and a report on the rows of its source."""

import dataclasses
from typing import Any


class DataError(ValueError):
    """A data file is not usable as it is; the message names file, row and remedy."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem.

    Attributes:
      id: unique and stable within its dataset.
      problem: the bare problem, without a prompt template.
      answer: the reference answer.
      meta: other fields of the source.
    """

    id: int
    problem: str
    answer: str
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of a source's rows by outcome.

    Attributes:
      name: the dataset.
      source: the file read, or the name of the generator.
      sha256: of the file; empty for a generator.
      rows: rows read.
      examples: examples kept.
      duplicates: rows merged into an earlier row with the same problem.
      conflicts: problems dropped because their rows disagree on the answer.
      unusable: unreadable rows left out, if the caller allows that.
      pictured: examples with images.
      filtered: rows left out by a filter; they are no part of `rows`.
    """

    name: str
    source: str
    sha256: str
    rows: int
    examples: int
    duplicates: int = 0
    conflicts: int = 0
    unusable: int = 0
    pictured: int = 0
    filtered: int = 0

    def facts(self) -> dict[str, Any]:
        """Returns the counts that a run depends on; without a filter, as before there were any."""
        found = dataclasses.asdict(self)
        return found if self.filtered else {k: v for k, v in found.items() if k != "filtered"}

    def __str__(self) -> str:
        unusable = f", {self.unusable:,} rows that cannot be used left out" * bool(self.unusable)
        read = f"{self.rows:,} rows"
        if self.filtered:
            read += f" (of {self.rows + self.filtered:,}, which data.filter leaves)"
        return (
            f"{self.name}: {self.examples:,} examples from {read} of {self.source} "
            f"({self.duplicates:,} duplicates merged, {self.conflicts:,} problems with conflicting "
            f"answers dropped{unusable})"
        )
