"""Writes a checkpoint as a Hugging Face folder that `transformers` loads.

`python -m experiments.export --workdir=DIR --out=FOLDER [--step=latest|best|N] [--dtype=bfloat16]`
"""

import pathlib
import sys

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.")
_STEP = flags.DEFINE_string("step", "latest", "Which checkpoint: latest, best, or a step.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Stored type.")


def main() -> None:
    """Exports what the flags say."""
    from luspo_jax import config as configuration
    from luspo_jax import run as runs
    from luspo_jax import train
    from luspo_jax import workdir as workdirs
    from luspo_jax.checkpoint import Checkpointer, CheckpointError
    from luspo_jax.update import abstract_state

    workdir = pathlib.Path(_WORKDIR.value)
    config = workdirs.stored_config(workdir)
    run = runs.build(config)
    checkpointer = Checkpointer(
        workdir / "checkpoints",
        keep_latest=config.output.keep_latest,
        keep_best=config.output.keep_best,
    )
    step = _step(checkpointer)
    if step is None:
        raise CheckpointError(f"{workdir} holds no {_STEP.value} checkpoint")
    state, _ = checkpointer.restore(step, abstract_state(run.rule, marked=run.length.every > 0))
    train.export_policy(run, state, pathlib.Path(_OUT.value), dtype=_DTYPE.value)
    print(f"step {step} of {configuration.fingerprint(config)} written to {_OUT.value}")


def _step(checkpointer) -> int | None:
    if _STEP.value == "latest":
        return checkpointer.latest_step()
    if _STEP.value == "best":
        return checkpointer.best_step()
    if not _STEP.value.isdigit():
        raise ValueError(f"--step={_STEP.value!r}: give latest, best or a number")
    return int(_STEP.value)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir", "out")))
