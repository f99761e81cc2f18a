"""Orbax checkpoints that hold everything a bit-exact resume needs."""

import contextlib
import errno
import logging
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from luspo_jax.types import TrainState

# Free space asked for before a save, as a multiple of the state's bytes: Orbax writes beside the
# finished checkpoint and renames, so a save that fits leaves nothing half-written.
_HEADROOM = 1.1


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


class Checkpointer:
    """Keeps the latest few checkpoints and the best few by a metric under one folder.

    A checkpoint is named by the number of rollout steps taken when it was written. It holds the
    train state and a JSON record of the host's state (prompt stream, surplus prompts, counters).
    """

    def __init__(self, folder: str | pathlib.Path, *, keep_latest: int, keep_best: int):
        self.folder = pathlib.Path(folder).absolute()
        # Orbax reports each save on the root logger's INFO level; the run has its own console line.
        logging.getLogger("absl").addFilter(_not_orbax)
        keep = [policies.LatestN(keep_latest)]
        if keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=_best,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        with _named_os_errors(self.folder):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    best_fn=_best,
                    preservation_policy=policies.AnyPreservationPolicy(keep),
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=False,
                ),
            )

    def latest_step(self) -> int | None:
        """Steps taken by the newest complete checkpoint; None where there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the best checkpoint kept; None before anything was measured."""
        return self._manager.best_step()

    def save(
        self, step: int, state: TrainState, host: Mapping[str, Any], *, metric: float | None = None
    ) -> None:
        """Writes a checkpoint; it is complete when this returns, or absent when it raises."""
        needed = int(_HEADROOM * sum(x.nbytes for x in jax.tree.leaves(state)))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder} has {free / 1e6:.0f} MB free and a checkpoint needs "
                f"{needed / 1e6:.0f} MB: free some space or lower output.keep_latest, then run "
                "the same command again to continue from the last checkpoint"
            )
        if jax.process_count() > 1:
            # Orbax refuses arrays that every process has for itself; process 0 writes NumPy ones.
            state = jax.tree.map(
                lambda x: (
                    x if isinstance(x, jax.Array) and not x.is_fully_addressable else np.asarray(x)
                ),
                state,
            )
        with _named_os_errors(self.folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(dict(host))
                ),
                metrics=None if metric is None else {"best": float(metric)},
                force=True,
            )
            self._manager.wait_until_finished()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads checkpoint `step` into the shapes, dtypes and shardings of `like`."""
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(_abstract(like)), host=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # Orbax raises many types; all mean the same to the user.
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} cannot be read "
                f"({type(error).__name__}: {str(error).splitlines()[0][:200]}): if it is damaged, "
                "delete that folder to continue from the one before; if the model or optimizer "
                "changed, start in a new --workdir"
            ) from error
        return restored["state"], restored["host"]

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()


def _best(metrics: Mapping[str, float]) -> float:
    return metrics["best"]


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        state,
    )


def _not_orbax(record: logging.LogRecord) -> bool:
    """False for Orbax's progress reports and for its warning that a save carries no metric."""
    text = record.getMessage()
    return "orbax" not in record.pathname or not (
        record.levelno < logging.WARNING or "did not provide metrics" in text
    )


@contextlib.contextmanager
def _named_os_errors(folder: pathlib.Path):
    """Turns a full disk or a forbidden folder, however Orbax wraps it, into one clear message."""
    try:
        yield
    except Exception as error:
        text = str(error)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
        if full or isinstance(error, OSError):
            raise CheckpointError(
                f"could not write under {folder} ({text.splitlines()[0][:200]}): "
                + ("free some space" if full else "check that the folder is writable")
                + " and run the same command again to continue from the last checkpoint"
            ) from error
        raise
