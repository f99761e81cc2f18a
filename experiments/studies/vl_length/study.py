"""Runs the study: `python -m experiments.studies.vl_length.study --workdir=DIR --parallel=2`.

Tunes a learning rate for each objective on separate seeds, runs every cell of the design with every
seed, and writes tables and figures into the workdir. The same command resumes; `--analyse_only`
analyses the finished runs. `--publish` also copies tables and figures beside the study's README.
"""

import pathlib
import sys

from experiments import command
from experiments.studies import session

session.define_flags("tables and figures")

PUBLISHED = ("results.md", "curves.png", "curves.json", "clipping.png", "clipping.json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.vl_length import analysis, design
    from experiments.sweeps import tuning
    from luspo_jax.hosts import files

    study = session.begin()

    def run(name, sweep):
        print(f"== {name}", flush=True)
        return study.run(sweep, name)

    rates = tuning.best_rates(*run("tuning", design.tuning()))
    files.write_json(study.workdir / "rates.json", rates)
    text = analysis.write(rates, *run("main", design.main(rates)), study.workdir)
    study.finish(text, pathlib.Path(__file__).parent, PUBLISHED)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
