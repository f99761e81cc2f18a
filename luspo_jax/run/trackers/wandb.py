"""Weights & Biases: its runs, online or offline, as WANDB_MODE says."""

import os
import uuid
from collections.abc import Mapping

from luspo_jax.hosts.values import ConfigError
from luspo_jax.run.trackers.tracker import About, Table

_PROMPT_S = 120.0  # that a login waits for the user


class Wandb:
    """Writes to Weights & Biases.

    W&B never takes a step again once it has a later one, and rewinding a run is a preview for some
    accounts only (docs.wandb.ai, "Rewind a run"), so steps that are repeated are not sent.
    """

    PACKAGE, EXTRA, OVERWRITES = "wandb", "wandb", False

    def __init__(self):
        self._run = None

    def prepare(self) -> None:
        """Logs in, unless W&B is offline; may ask the user for a key."""
        import wandb

        if wandb.setup().settings.mode not in ("online", "run", "shared"):
            return
        try:
            wandb.login(timeout=_PROMPT_S)
        except wandb.errors.Error as error:
            raise ConfigError(
                f"output.trackers: W&B has no key on this machine ({error}): run `wandb login`, "
                "set WANDB_API_KEY, or set WANDB_MODE=offline and use `wandb sync` later"
            ) from error

    def start(self, about: About, known: str) -> str:
        """Starts or continues a run; its files are in the run's folder or in WANDB_DIR."""
        import wandb

        self._run = wandb.init(
            project=about.project,
            group=about.group or None,
            name=about.name,
            id=known or uuid.uuid4().hex[:8],
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(about.folder),
            config=dict(about.config),
            # The console is a progress bar of another thread.
            settings=wandb.Settings(console="off"),
        )
        return self._run.id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes a row of the history."""
        self._run.log(dict(numbers), step=step, commit=True)

    def table(self, step: int, table: Table) -> None:
        """Adds a table to the row of the step, which `log` completes."""
        import wandb

        shown = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._run.log({"completions": shown}, step=step, commit=False)

    def close(self, *, failed: bool) -> None:
        """Sends what waits."""
        self._run.finish(exit_code=int(failed))
