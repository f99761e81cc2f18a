"""Writes a checkpoint as a Hugging Face folder that `transformers` loads.

`python -m experiments.export --workdir=DIR --out=FOLDER [--step=latest|best|N] [--dtype=bfloat16]`

The run may be in progress: its folder is not changed. No data files or rewards are needed.
"""

import pathlib
import sys

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or address of the run.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist, or be empty.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier export in --out.")
_STEP = flags.DEFINE_string("step", "latest", "Which checkpoint: latest, best, or a step.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Stored type; float32, but to be said where an adapter has frozen weights of few bits.",
)


def main() -> None:
    """Exports what the flags say."""
    from luspo_jax.hosts import files

    files.check_folder(_OUT.value, flag="--out", overwrite=_OVERWRITE.value)  # before anything slow
    import jax

    from experiments.evaluation import policy
    from luspo_jax.run import fields
    from luspo_jax.run.export import export_policy

    out = pathlib.Path(_OUT.value)
    stored = policy.stored_policy(_WORKDIR.value, _STEP.value, spread=jax.device_count() > 1)
    export_policy(
        stored.config,
        stored.model,
        stored.params,
        out,
        dtype=_DTYPE.value,
        overwrite=_OVERWRITE.value,
    )
    print(f"step {stored.step} of {fields.fingerprint(stored.config)} written to {out}")


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir", "out")))
