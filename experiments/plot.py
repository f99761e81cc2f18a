"""Draws a run: `python -m experiments.plot --workdir=DIR`."""

import pathlib
import sys

from absl import flags

from experiments import command, figures

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


def main() -> None:
    """Draws the figure and prints its path."""
    print(figures.run_figure(pathlib.Path(_WORKDIR.value)))


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
