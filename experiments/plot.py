"""Draws a run: `python -m experiments.plot --workdir=DIR`.

The figure is summary.png in its folder; of a run in a bucket, gs://… or s3://…, in a copy in the
user's cache.
"""

import pathlib
import sys

from absl import flags

from experiments import command, figures

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or address of the run.")


def main() -> None:
    """Draws the figure and prints its path."""
    from luspo_jax.hosts import fetched
    from luspo_jax.hosts.buckets import is_bucket

    folder = pathlib.Path(_WORKDIR.value)
    if is_bucket(_WORKDIR.value):
        copy = fetched.RunCopy(_WORKDIR.value)
        copy.fetch("run.json", "metrics.jsonl")
        folder = copy.folder
    print(figures.run_figure(folder))


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
