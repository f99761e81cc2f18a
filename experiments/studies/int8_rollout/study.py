"""Runs the study: `python -m experiments.studies.int8_rollout.study --workdir=DIR --parallel=2`.

Runs every cell of the design with every seed, and writes tables and a figure into the workdir. The
same command resumes; `--analyse_only` analyses the finished runs. `--publish` also copies tables
and figure beside the study's README.
"""

import pathlib
import sys

from absl import flags

from experiments import command
from experiments.studies import session

session.define_flags("tables and figure")
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed and three steps: does everything run?")

PUBLISHED = ("results.md", "curves.png", "curves.json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.int8_rollout import design, tables

    study = session.begin()
    few = {"steps": 3, "seeds": (0,)} if _SMOKE.value else {}
    sweep, workdir = study.run(design.sweep(**few))
    text = tables.write(sweep, workdir, study.failures)
    study.finish(text, pathlib.Path(__file__).parent, PUBLISHED)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
