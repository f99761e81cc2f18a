"""Trackers by name, and the check of what a configuration asks for."""

import importlib.util
from collections.abc import Iterator

from luspo_jax.hosts.values import nearest
from luspo_jax.run.trackers.mlflow import Mlflow
from luspo_jax.run.trackers.tensorboard import TensorBoard
from luspo_jax.run.trackers.tracker import Tracker
from luspo_jax.run.trackers.trackio import Trackio
from luspo_jax.run.trackers.wandb import Wandb

# What output.trackers may name.
TRACKERS: dict[str, type[Tracker]] = {"mlflow": Mlflow, "trackio": Trackio, "wandb": Wandb}
TENSORBOARD: type[Tracker] = TensorBoard  # has a field of its own, output.tensorboard


def names(text: str) -> tuple[str, ...]:
    """Returns the names of `output.trackers`, which commas join."""
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def wrong_names(text: str) -> Iterator[str]:
    """Yields a line for each name of `output.trackers` that is unknown or given twice."""
    found = names(text)
    for name in dict.fromkeys(found):
        if name == "tensorboard":
            yield "output.trackers: TensorBoard has a field of its own, output.tensorboard"
        elif name not in TRACKERS:
            yield f"output.trackers: no tracker {name!r}: {nearest(name, TRACKERS)}"
        elif found.count(name) > 1:
            yield f"output.trackers={text!r} names {name} twice"


def not_installed(text: str) -> Iterator[str]:
    """Yields a line for each tracker of `output.trackers` whose package is not installed."""
    for name in names(text):
        tracker = TRACKERS[name]
        if not _installed(tracker.PACKAGE):
            yield (
                f"output.trackers={text!r}: {tracker.PACKAGE} is not installed: pip install "
                f"'luspo_jax[{tracker.EXTRA}]', or leave {name} out"
            )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is in sys.modules as None
        return False
