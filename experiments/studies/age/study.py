"""Runs the study: `python -m experiments.studies.age.study --workdir=DIR --parallel=2`.

Runs every cell of the design with every seed, and writes tables and a figure into the workdir. The
same command resumes; `--only` runs a part, `--analyse_only` tells of the finished runs. `--publish`
also copies tables and figure beside the study's README.
"""

import pathlib
import sys

from absl import flags

from experiments import command
from experiments.studies import session

session.define_flags("tables and figure")
_TASK = flags.DEFINE_enum(
    "task", "sums", ["sums", "lookup", "real"], "What is learned; a folder each."
)
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed, three steps, LUSPO: does everything run?")
# Repeated, not joined with commas, because names contain commas.
_ONLY = flags.DEFINE_multi_string(
    "only",
    [],
    "A member to run, such as waiting,LUSPO,tis/seed_0, or a variant with all its seeds; may be "
    "repeated.",
)

PUBLISHED = ("results.md", "curves.png", "curves.json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.age import design, running, tables

    study, only = session.begin(), _ONLY.value
    if _TASK.value == "real":
        sweep, only = design.real(), only or design.real_members()
    else:
        sweep = (design.smoke if _SMOKE.value else design.sweep)(_TASK.value)
    if not study.analyse_only:
        study.failures |= running.run(sweep, study.workdir, parallel=study.parallel, only=only)
    text = tables.write(sweep, study.workdir, study.failures)
    study.finish(text, pathlib.Path(__file__).parent, PUBLISHED, f"_{_TASK.value}")


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
