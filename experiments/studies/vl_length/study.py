"""Runs the study: `python -m experiments.studies.vl_length.study --workdir=DIR --parallel=2`.

Tunes a learning rate for each objective on separate seeds, runs every cell of the design with every
seed, and writes tables and figures into the workdir. The same command resumes; `--analyse_only`
analyses the finished runs. `--publish` also copies tables and figures beside the study's README.
"""

import pathlib
import shutil
import sys

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.")
_PARALLEL = flags.DEFINE_integer("parallel", 2, "Runs at a time.", 1)
_PUBLISH = flags.DEFINE_bool("publish", False, "Copy tables and figures beside the README.")
_ANALYSE_ONLY = flags.DEFINE_bool("analyse_only", False, "Run nothing; tell of what is there.")

PUBLISHED = ("results.md", "curves.png", "curves.json", "clipping.png", "clipping.json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.vl_length import analysis, design
    from experiments.sweeps import runner, tuning
    from luspo_jax.hosts import files

    workdir = pathlib.Path(_WORKDIR.value).absolute()
    failures = {}

    def run(name, sweep):
        print(f"== {name}", flush=True)
        folder = workdir / name
        if not _ANALYSE_ONLY.value:
            failures.update(runner.run(sweep, folder, parallel=_PARALLEL.value))
        return sweep, folder

    rates = tuning.best_rates(*run("tuning", design.tuning()))
    files.write_json(workdir / "rates.json", rates)
    print(analysis.write(rates, *run("main", design.main(rates)), workdir))
    if _PUBLISH.value:
        for name in PUBLISHED:
            shutil.copy(workdir / name, pathlib.Path(__file__).parent / name)
    if failures:
        lines = "\n".join(f"  - {name}: {reason}" for name, reason in failures.items())
        raise command.UsageError(f"{len(failures)} members failed:\n{lines}")


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
