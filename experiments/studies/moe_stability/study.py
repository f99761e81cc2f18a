"""Runs the study: `python -m experiments.studies.moe_stability.study --workdir=DIR --parallel=2`.

Trains the base policies, runs every cell of the design with every seed, and writes tables and
figures into the workdir. The same command resumes; `--analyse_only` analyses the finished runs.
`--publish` also copies tables and figures beside the study's README.
"""

import pathlib
import sys

from absl import flags

from experiments import command
from experiments.studies import session

session.define_flags("tables and figures")
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed and three steps: does everything run?")

PUBLISHED = ("results.md", "ratios.png", "ratios.json", "curves.png", "curves.json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.moe_stability import analysis, design

    study = session.begin()
    bases = study.workdir / "bases"
    few = {"steps": 3, "seeds": (0,)} if _SMOKE.value else {}
    short = ("--chain_steps=3", "--mixture_steps=3", "--eval_problems=16") if _SMOKE.value else ()
    if not study.analyse_only:
        for base in design.BASES.values():
            if not base.embedded:
                session.make_base(pathlib.Path(base.path(bases)), (*base.options, *short))
    text = analysis.write(*study.run(design.sweep(bases, **few), "runs"), study.workdir)
    study.finish(text, pathlib.Path(__file__).parent, PUBLISHED)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
