"""Runs the study: `python -m experiments.studies.age.study --workdir=DIR --parallel=2`.

Runs every cell of the design with every seed, and writes tables and a figure into the workdir. The
same command resumes; `--only` runs a part, `--analyse_only` tells of the finished runs. `--publish`
also copies tables and figure beside the study's README.
"""

import pathlib
import shutil
import sys

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.")
_TASK = flags.DEFINE_enum(
    "task", "sums", ["sums", "lookup", "real"], "What is learned; a folder each."
)
_PARALLEL = flags.DEFINE_integer("parallel", 2, "Runs at a time.", 1)
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed, three steps, LUSPO: does everything run?")
# Repeated, not joined with commas, because names contain commas.
_ONLY = flags.DEFINE_multi_string(
    "only",
    [],
    "A member to run, such as waiting,LUSPO,tis/seed_0, or a variant with all its seeds; may be "
    "repeated.",
)
_PUBLISH = flags.DEFINE_bool("publish", False, "Copy tables and figure beside the README.")
_ANALYSE_ONLY = flags.DEFINE_bool("analyse_only", False, "Run nothing; tell of what is there.")

PUBLISHED = ("results", ".md"), ("curves", ".png"), ("curves", ".json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.age import design, running, tables

    workdir = pathlib.Path(_WORKDIR.value).absolute()
    only, failures = _ONLY.value, {}
    if _TASK.value == "real":
        sweep, only = design.real(), only or design.real_members()
    else:
        sweep = (design.smoke if _SMOKE.value else design.sweep)(_TASK.value)
    if not _ANALYSE_ONLY.value:
        failures = running.run(sweep, workdir, parallel=_PARALLEL.value, only=only)
    print(tables.write(sweep, workdir, failures))
    if _PUBLISH.value:
        here = pathlib.Path(__file__).parent
        for name, suffix in PUBLISHED:
            shutil.copy(workdir / f"{name}{suffix}", here / f"{name}_{_TASK.value}{suffix}")
    if failures:
        lines = "\n".join(f"  - {name}: {reason}" for name, reason in failures.items())
        raise command.UsageError(f"{len(failures)} members failed:\n{lines}")


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
