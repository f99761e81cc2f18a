"""What a tracker is told of a run, and what it must be able to do."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol


@dataclasses.dataclass(frozen=True)
class About:
    """A run, as trackers are told of it.

    Attributes:
      folder: of the run, on this host.
      project: the tracker's project or experiment.
      group: runs that belong together, such as a sweep; empty for none.
      name: of the run.
      config: its configuration, by dotted field.
      after: the last step that is kept of an earlier attempt; what it wrote later is void.
    """

    folder: pathlib.Path
    project: str
    group: str
    name: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    after: int = -1


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text and numbers; a row has a value, or None, for each column."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


class Tracker(Protocol):
    """Shows the numbers of one run; used by one thread at a time.

    Any method may raise anything: the run goes on without it.

    Attributes:
      PACKAGE: the package that it needs.
      EXTRA: the extra of setup.py that brings it; empty if it is always there.
      OVERWRITES: whether a step that is logged again replaces what the tracker has of it.
    """

    PACKAGE: ClassVar[str]
    EXTRA: ClassVar[str]
    OVERWRITES: ClassVar[bool]

    def prepare(self) -> None:
        """Does, before training, what may need the user, such as a login.

        Raises:
          ConfigError: it cannot work as this machine is set up.
        """

    def start(self, about: About, known: str) -> str:
        """Starts a run, or continues the one with the id `known`; returns the id."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows the metrics of a step, all of them finite; a step's table comes before them."""

    def table(self, step: int, table: Table) -> None:
        """Shows a table of completions."""

    def close(self, *, failed: bool) -> None:
        """Ends it; `failed` says that the run did not come to its end."""
