"""Runs the study: `python -m experiments.studies.length_bias.study --workdir=DIR --parallel=2`.

Trains the bases, tunes learning rates on separate seeds, runs the factorial, the controls, the
environments and the pressure runs, and writes tables, figures and verdict into the workdir. The
same command resumes. `--publish` also copies tables and figures beside the study's README.
"""

import pathlib
import sys

from experiments import command
from experiments.studies import session

session.define_flags("tables and figures")

PUBLISHED = ("results.md", "factorial.png", "factorial.json", "prediction.png", "prediction.json")
_BASES = {
    "label_sums_1": ("--task=label_sums", "--seed=1"),
    "label_lookup_1": ("--task=label_lookup", "--seed=1"),
    "label_sums_skewed": (
        # Most answers short, few long: the skew of real lengths.
        "--task=label_sums", "--seed=0", "--direct=0.7",
    ),
}  # fmt: skip


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.length_bias import analysis, design
    from experiments.sweeps import report, tuning
    from luspo_jax.hosts import files

    study = session.begin()
    bases = study.workdir / "bases"
    if not study.analyse_only:
        for name, options in _BASES.items():
            session.make_base(bases / name, options)

    def run(name, sweep):
        print(f"== {name}", flush=True)
        ran = study.run(sweep, name.replace(" ", "_"))
        if not study.analyse_only:
            report.write(*ran)
        return ran

    rates = {}
    for task in design.TASKS:
        rates[task] = tuning.best_rates(*run(f"tuning {task}", design.tuning(task, bases)))
    files.write_json(study.workdir / "rates.json", rates)
    found = analysis.Study(
        rates=rates,
        main={t: run(f"main {t}", design.main(t, rates[t], bases)) for t in design.TASKS},
        prediction={
            (t, label): run(
                f"prediction {t}{suffix}", design.prediction(t, rates[t], bases, rate=rate)
            )
            for t in design.TASKS
            for label, suffix, rate in (
                ("tuned rates", "", None),
                (f"rate {design.SMALL_RATE:g}", " small rate", design.SMALL_RATE),
            )
        },
        environments=run("environments", design.environments(rates["sums"], bases)),
    )
    text = analysis.write(found, study.workdir)
    study.finish(text, pathlib.Path(__file__).parent, PUBLISHED)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
