"""Runs the study: `python -m experiments.studies.adapters.study --workdir=DIR --parallel=2`.

Tunes learning rates on seeds of their own, runs full weights and adapters of three ranks under both
objectives, and writes tables and a figure of the finished runs into the workdir. The same command
resumes; `--analyse_only` runs nothing. `--real`, in another folder, is the same on a real model,
without tuning. `--publish` also copies tables and figure beside the study's README.
"""

import pathlib
import shutil
import sys

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.")
_REAL = flags.DEFINE_bool("real", False, "SmolLM2-135M-Instruct in place of the quickstart.")
_PARALLEL = flags.DEFINE_integer("parallel", 2, "Runs at a time.", 1)
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed and two steps: does everything run?")
_PUBLISH = flags.DEFINE_bool("publish", False, "Copy tables and figure beside the README.")
_ANALYSE_ONLY = flags.DEFINE_bool("analyse_only", False, "Run nothing; tell of what is there.")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.adapters import design, tables
    from experiments.sweeps import runner

    workdir, failures = pathlib.Path(_WORKDIR.value).absolute(), {}
    few = {"steps": 2, "seeds": (0,)} if _SMOKE.value else {}

    def run(sweep, folder, only=()):
        if not _ANALYSE_ONLY.value:
            failures.update(runner.run(sweep, folder, parallel=_PARALLEL.value, only=only))

    text = ""
    if _REAL.value:
        sweeps = design.real(**few)
    else:
        tuning = design.tuning(**few)
        run(tuning, workdir / "tuning")
        if failures:  # rates of what is left would be others than those of a repaired study
            raise command.UsageError(_told(failures))
        rates, text = tables.tuned(tuning, workdir / "tuning")
        sweeps = design.sweeps(rates, **few)
    for seed in next(iter(sweeps.values())).seeds:  # whole comparisons first
        for objective, sweep in sweeps.items():
            members = [f"{weights}/seed_{seed}" for weights in design.WEIGHTS]
            run(sweep, workdir / objective, members)
    print(tables.write(sweeps, workdir, text, failures))
    if _PUBLISH.value:
        suffix = "_real" if _REAL.value else ""
        for name in ("results.md", "curves.png", "curves.json"):
            path = pathlib.Path(name)
            target = pathlib.Path(__file__).parent / f"{path.stem}{suffix}{path.suffix}"
            shutil.copy(workdir / name, target)
    if failures:
        raise command.UsageError(_told(failures))


def _told(failures):
    lines = "\n".join(f"  - {name}: {reason}" for name, reason in failures.items())
    return f"{len(failures)} members failed:\n{lines}"


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
