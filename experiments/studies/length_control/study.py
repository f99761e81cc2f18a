"""Runs the study: `python -m experiments.studies.length_control.study --workdir=DIR --parallel=2`.

Tunes learning rates on seeds of their own, runs every control on both tasks, the most important
first, and writes tables and a figure of the finished runs into the workdir. The same command
resumes; `--only` runs a part, `--analyse_only` nothing. `--publish` also copies tables and figure
beside the study's README.
"""

import pathlib
import sys

from absl import flags

from experiments import command
from experiments.studies import session

session.define_flags("tables and figure")
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed, one rate, two steps: does everything run?")
# Repeated, not joined with commas, because names contain commas.
_ONLY = flags.DEFINE_multi_string(
    "only",
    [],
    "A member to run after tuning, such as `sums, kimi/seed_0`, or a variant with all its seeds; "
    "may be repeated.",
)

PUBLISHED = ("results.md", "accuracy_tokens.png", "accuracy_tokens.json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.length_control import design, tables

    study = session.begin()
    short = {"steps": 2} if _SMOKE.value else {}
    few = {"rates": design.RATES[:1], "seeds": design.TUNING_SEEDS[:1]} if _SMOKE.value else {}
    tuned = study.run(design.tuning(**short, **few), "tuning")
    study.check()  # rates of what is left would be others than those of a repaired study
    rates = tables.chosen_rates(*tuned, study.workdir / "rates.json")
    few = {"seeds": design.SEEDS[:1]} if _SMOKE.value else {}
    sweep = design.sweep(rates, **short, **few)
    ran = study.run(sweep, "main", only=_ONLY.value or design.order(sweep))
    text = tables.write(tables.Study(tuned, ran, rates, study.failures), study.workdir)
    study.finish(text, pathlib.Path(__file__).parent, PUBLISHED)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
