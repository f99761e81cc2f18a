"""Draws a run: `python -m experiments.plot --workdir=DIR [--kind=lengths]`.

The figure is KIND.png in its folder, summary.png if no kind is named; of a run in a bucket, gs://…
or s3://…, in a copy in the user's cache. `--kind=tokens` also takes the folder of a sweep, and
compares its variants. `--kind=all` draws what the run has data for.
"""

import pathlib
import sys

from absl import flags

from experiments import command, figures

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or address of the run.")
_KIND = flags.DEFINE_enum(
    "kind", "summary", ["summary", "lengths", "tokens", "pressure", "all"],
    "summary: reward, length, accuracy. lengths: their distribution. tokens: accuracy against "
    "tokens. pressure: length pressure against the change that followed.",
)  # fmt: skip


def main() -> None:
    """Draws the figure and prints its path."""
    from luspo_jax.hosts import fetched
    from luspo_jax.hosts.buckets import is_bucket

    kinds = figures.KINDS if _KIND.value == "all" else (_KIND.value,)
    folder = pathlib.Path(_WORKDIR.value)
    if is_bucket(_WORKDIR.value):
        copy = fetched.RunCopy(_WORKDIR.value)
        copy.fetch("run.json", "metrics.jsonl")
        if "lengths" in kinds:
            copy.fetch(*(name for name in copy.names if name.startswith("rollouts/")))
        folder = copy.folder
    for kind in kinds:
        try:
            print(figures.run_figure(folder, kind))
        except FileNotFoundError as missing:
            if _KIND.value != "all" or kind == "summary":
                raise
            print(f"{kind}: not drawn: {missing}")


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
