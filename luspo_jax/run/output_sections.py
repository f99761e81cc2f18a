"""The section of what a run writes, and to which trackers: of RL and of supervised fine-tuning."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from luspo_jax.hosts.values import Number, Rule, check_fields
from luspo_jax.run.trackers import registry

_MOST = 2**31 - 1
_SIZE, _COUNT = Number(1, _MOST), Number(0, _MOST)
_ROWS = Number(0, 4096)  # of a table in a browser


@dataclasses.dataclass(frozen=True)
class OutputSettings:
    """What a run writes, and when."""

    checkpoint_every: int = 10  # Rollout steps; 0 = only at the end.
    keep_latest: int = 2  # Checkpoints.
    keep_best: int = 1  # By held-out accuracy.
    dump_every: int = 1  # Rollout steps between dumps of all responses; 0 = never.
    tensorboard: bool = True  # Write TensorBoard files.
    trackers: str = ""  # Where else metrics go: mlflow, trackio, wandb, joined by commas.
    project: str = ""  # Of the trackers; empty = luspo_jax.
    group: str = ""  # Of runs that trackers show together; a sweep sets it.
    run_name: str = ""  # In the trackers; empty = the name of the workdir.
    completions_every: int = 10  # Rollout steps between tables of responses there; 0 = none.
    num_completions: int = 8  # Responses of such a table, whole groups first.
    export: bool = True  # Write a Hugging Face folder at the end.

    RULES: ClassVar[dict[str, Rule]] = {
        "checkpoint_every": _COUNT,
        "keep_latest": _SIZE,
        "keep_best": _COUNT,
        "dump_every": _COUNT,
        "completions_every": _COUNT,
        "num_completions": _ROWS,
    }

    def __post_init__(self):
        check_fields(self, "output.", _wrong_trackers(self))


@dataclasses.dataclass(frozen=True)
class SftOutputSettings:
    """What a run writes, and when."""

    checkpoint_every: int = 50  # Optimizer steps; 0 = only at the end.
    keep_latest: int = 1  # Checkpoints.
    keep_best: int = 1  # By held-out loss.
    tensorboard: bool = True  # Write TensorBoard files.
    trackers: str = ""  # Where else metrics go: mlflow, trackio, wandb, joined by commas.
    project: str = ""  # Of the trackers; empty = luspo_jax.
    group: str = ""  # Of runs that trackers show together.
    run_name: str = ""  # In the trackers; empty = the name of the workdir.
    num_completions: int = 8  # Answers to held-out prompts that they show, whenever there are any.
    export: bool = True  # Write a Hugging Face folder at the end.

    RULES: ClassVar[dict[str, Rule]] = {
        "checkpoint_every": _COUNT,
        "keep_latest": _SIZE,
        "keep_best": _COUNT,
        "num_completions": _ROWS,
    }

    def __post_init__(self):
        check_fields(self, "output.", _wrong_trackers(self))


def _wrong_trackers(output: OutputSettings | SftOutputSettings) -> Iterator[str]:
    yield from registry.wrong_names(output.trackers)
    if not output.trackers:
        for field in ("project", "group", "run_name"):
            if getattr(output, field):
                yield (
                    f"output.{field}={getattr(output, field)!r} is of a tracker, and "
                    "output.trackers names none: set output.trackers=wandb, or another"
                )
