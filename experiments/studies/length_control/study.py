"""Runs the study: `python -m experiments.studies.length_control.study --workdir=DIR --parallel=2`.

Tunes learning rates on seeds of their own, runs every control on both tasks, the most important
first, and writes tables and a figure of the finished runs into the workdir. The same command
resumes; `--only` runs a part, `--analyse_only` nothing. `--publish` also copies tables and figure
beside the study's README.
"""

import pathlib
import shutil
import sys

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.")
_PARALLEL = flags.DEFINE_integer("parallel", 2, "Runs at a time.", 1)
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed, one rate, two steps: does everything run?")
# Repeated, not joined with commas, because names contain commas.
_ONLY = flags.DEFINE_multi_string(
    "only",
    [],
    "A member to run after tuning, such as `sums, kimi/seed_0`, or a variant with all its seeds; "
    "may be repeated.",
)
_PUBLISH = flags.DEFINE_bool("publish", False, "Copy tables and figure beside the README.")
_ANALYSE_ONLY = flags.DEFINE_bool("analyse_only", False, "Run nothing; tell of what is there.")

PUBLISHED = ("results.md", "accuracy_tokens.png", "accuracy_tokens.json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.length_control import design, tables
    from experiments.sweeps import runner

    workdir, failures = pathlib.Path(_WORKDIR.value).absolute(), {}
    short = {"steps": 2} if _SMOKE.value else {}

    def run(sweep, folder, only=()):
        if not _ANALYSE_ONLY.value:
            failures.update(runner.run(sweep, folder, parallel=_PARALLEL.value, only=only))
        return sweep, folder

    few = {"rates": design.RATES[:1], "seeds": design.TUNING_SEEDS[:1]} if _SMOKE.value else {}
    tuned = run(design.tuning(**short, **few), workdir / "tuning")
    if failures:  # rates of what is left would be others than those of a repaired study
        raise command.UsageError(_told(failures))
    rates = tables.chosen_rates(*tuned, workdir / "rates.json")
    few = {"seeds": design.SEEDS[:1]} if _SMOKE.value else {}
    sweep = design.sweep(rates, **short, **few)
    main_sweep = run(sweep, workdir / "main", _ONLY.value or design.order(sweep))
    print(tables.write(tables.Study(tuned, main_sweep, rates, failures), workdir))
    if _PUBLISH.value:
        for name in PUBLISHED:
            shutil.copy(workdir / name, pathlib.Path(__file__).parent / name)
    if failures:
        raise command.UsageError(_told(failures))


def _told(failures):
    lines = "\n".join(f"  - {name}: {reason}" for name, reason in failures.items())
    return f"{len(failures)} members failed:\n{lines}"


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
