"""Runs the study: `python -m experiments.studies.length_bias.study --workdir=DIR --parallel=2`.

Trains the bases, tunes learning rates on separate seeds, runs the factorial, the controls, the
environments and the pressure runs, and writes tables, figures and verdict into the workdir. The
same command resumes. `--publish` also copies tables and figures beside the study's README.
"""

import pathlib
import shutil
import subprocess
import sys

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.")
_PARALLEL = flags.DEFINE_integer("parallel", 2, "Runs at a time.", 1)
_PUBLISH = flags.DEFINE_bool("publish", False, "Copy tables and figures beside the README.")
_ANALYSE_ONLY = flags.DEFINE_bool("analyse_only", False, "Run nothing; tell of what is there.")

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
    from experiments.sweeps import report, runner, tuning
    from luspo_jax.hosts import files

    workdir, parallel = pathlib.Path(_WORKDIR.value).absolute(), _PARALLEL.value
    if _ANALYSE_ONLY.value:
        parallel = 0
    else:
        make_bases(workdir / "bases")
    failures = {}

    def run(name, sweep):
        print(f"== {name}", flush=True)
        folder = workdir / name.replace(" ", "_")
        if parallel:
            failures.update(runner.run(sweep, folder, parallel=parallel))
            report.write(sweep, folder)
        return sweep, folder

    rates = {}
    for task in design.TASKS:
        tuned = run(f"tuning {task}", design.tuning(task, workdir / "bases"))
        rates[task] = tuning.best_rates(*tuned)
    files.write_json(workdir / "rates.json", rates)
    bases = workdir / "bases"
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
    print(analysis.write(found, workdir))
    if _PUBLISH.value:
        publish(workdir)
    if failures:
        lines = "\n".join(f"  - {name}: {reason}" for name, reason in failures.items())
        raise command.UsageError(f"{len(failures)} members failed:\n{lines}")


def make_bases(folder: pathlib.Path) -> None:
    """Trains the base policies that are not embedded, each once."""
    for name, options in _BASES.items():
        if not (folder / name / "README.md").is_file():
            print(f"== base {name}", flush=True)
            subprocess.run(
                [
                    sys.executable, "-m", "experiments.make_base", "--overwrite", *options,
                    f"--out={folder / name}",
                ],
                check=True,
                cwd=pathlib.Path(__file__).resolve().parents[3],
            )  # fmt: skip


def publish(workdir: pathlib.Path) -> None:
    """Copies the results for readers of the repository."""
    here = pathlib.Path(__file__).parent
    for name in ("results.md", "factorial.png", "factorial.json", "prediction.png"):
        shutil.copy(workdir / name, here / name)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
