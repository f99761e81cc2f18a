"""TensorBoard: files in the run's folder."""

from collections.abc import Mapping

from luspo_jax.run.trackers.tracker import About, Table


class TensorBoard:
    """Writes scalars to `tensorboard/`; a step that is written again hides what was there."""

    PACKAGE, EXTRA, OVERWRITES = "tensorboardX", "", True

    def __init__(self):
        self._about: About | None = None
        self._writer = None

    def prepare(self) -> None:
        """Needs nothing."""

    def start(self, about: About, known: str) -> str:
        """Notes the folder; the file is made when there is something to write."""
        self._about = about
        return known

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # TensorBoard's own file names tell runs apart only by the second.
            self._writer = SummaryWriter(
                str(self._about.folder / "tensorboard"),
                purge_step=self._about.after + 1 if self._about.after >= 0 else None,
                filename_suffix=f".from_{step}",
            )
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(self, step: int, table: Table) -> None:
        """Shows none: `experiments.show` reads the responses of a run."""

    def close(self, *, failed: bool) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
