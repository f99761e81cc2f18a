"""Trackio: Hugging Face's tracker, local (TRACKIO_DIR) or in a Space (TRACKIO_SPACE_ID)."""

import uuid
from collections.abc import Mapping

from luspo_jax.run.trackers.tracker import About, Table


class Trackio:
    """Writes to Trackio.

    A run is continued by its name, so a name gets an ending that no other has. Trackio keeps every
    row that is logged for a step, so steps that are repeated are not sent.
    """

    PACKAGE, EXTRA, OVERWRITES = "trackio", "trackio", False

    def __init__(self):
        self._run = None

    def prepare(self) -> None:
        """Needs nothing."""

    def start(self, about: About, known: str) -> str:
        """Starts or continues a run."""
        import trackio

        name = known or f"{about.name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(
            project=about.project,
            name=name,
            group=about.group or None,
            config=dict(about.config),
            resume="must" if known else "never",
            embed=False,
        )
        return name

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes a row."""
        self._run.log(dict(numbers), step=step)

    def table(self, step: int, table: Table) -> None:
        """Writes a row with the table alone."""
        import trackio

        rows = [list(row) for row in table.rows]
        self._run.log(
            {"completions": trackio.Table(columns=list(table.columns), data=rows)}, step=step
        )

    def close(self, *, failed: bool) -> None:
        """Sends what waits; Trackio knows no failed runs."""
        self._run.finish()
