"""Runs the study: `python -m experiments.studies.adapters.study --workdir=DIR --parallel=2`.

Tunes learning rates on seeds of their own, runs full weights and adapters of three ranks under both
objectives, and writes tables and a figure of the finished runs into the workdir. The same command
resumes; `--analyse_only` runs nothing. `--real`, in another folder, is the same on a real model,
without tuning. `--publish` also copies tables and figure beside the study's README.
"""

import pathlib
import sys

from absl import flags

from experiments import command
from experiments.studies import session

session.define_flags("tables and figure")
_REAL = flags.DEFINE_bool("real", False, "SmolLM2-135M-Instruct in place of the quickstart.")
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed and two steps: does everything run?")

PUBLISHED = ("results.md", "curves.png", "curves.json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.adapters import design, tables

    study, text = session.begin(), ""
    few = {"steps": 2, "seeds": (0,)} if _SMOKE.value else {}
    if _REAL.value:
        sweeps = design.real(**few)
    else:
        tuned = study.run(design.tuning(**few), "tuning")
        study.check()  # rates of what is left would be others than those of a repaired study
        rates, text = tables.tuned(*tuned)
        sweeps = design.sweeps(rates, **few)
    for seed in next(iter(sweeps.values())).seeds:  # whole comparisons first
        for objective, sweep in sweeps.items():
            members = [f"{weights}/seed_{seed}" for weights in design.WEIGHTS]
            study.run(sweep, objective, only=members)
    text = tables.write(sweeps, study.workdir, text, study.failures)
    suffix = "_real" if _REAL.value else ""
    study.finish(text, pathlib.Path(__file__).parent, PUBLISHED, suffix)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
