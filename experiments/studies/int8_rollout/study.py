"""Runs the study: `python -m experiments.studies.int8_rollout.study --workdir=DIR --parallel=2`.

Runs every cell of the design with every seed, and writes tables and a figure into the workdir. The
same command resumes; `--analyse_only` analyses the finished runs. `--publish` also copies tables
and figure beside the study's README.
"""

import pathlib
import shutil
import sys

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.")
_PARALLEL = flags.DEFINE_integer("parallel", 2, "Runs at a time.", 1)
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed and three steps: does everything run?")
_PUBLISH = flags.DEFINE_bool("publish", False, "Copy tables and figure beside the README.")
_ANALYSE_ONLY = flags.DEFINE_bool("analyse_only", False, "Run nothing; tell of what is there.")

PUBLISHED = ("results.md", "curves.png", "curves.json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.int8_rollout import design, tables
    from experiments.sweeps import runner

    workdir = pathlib.Path(_WORKDIR.value).absolute()
    sweep = design.sweep(**({"steps": 3, "seeds": (0,)} if _SMOKE.value else {}))
    failures = {}
    if not _ANALYSE_ONLY.value:
        failures = runner.run(sweep, workdir, parallel=_PARALLEL.value)
    print(tables.write(sweep, workdir, failures))
    if _PUBLISH.value:
        for name in PUBLISHED:
            shutil.copy(workdir / name, pathlib.Path(__file__).parent / name)
    if failures:
        lines = "\n".join(f"  - {name}: {reason}" for name, reason in failures.items())
        raise command.UsageError(f"{len(failures)} members failed:\n{lines}")


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
