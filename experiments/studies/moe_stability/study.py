"""Runs the study: `python -m experiments.studies.moe_stability.study --workdir=DIR --parallel=2`.

Trains the base policies, runs every cell of the design with every seed, and writes tables and
figures into the workdir. The same command resumes; `--analyse_only` analyses the finished runs.
`--publish` also copies tables and figures beside the study's README.
"""

import pathlib
import shutil
import subprocess
import sys

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.")
_PARALLEL = flags.DEFINE_integer("parallel", 2, "Runs at a time.", 1)
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed and three steps: does everything run?")
_PUBLISH = flags.DEFINE_bool("publish", False, "Copy tables and figures beside the README.")
_ANALYSE_ONLY = flags.DEFINE_bool("analyse_only", False, "Run nothing; tell of what is there.")

PUBLISHED = ("results.md", "ratios.png", "curves.png", "curves.json")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.moe_stability import analysis, design
    from experiments.sweeps import runner

    workdir = pathlib.Path(_WORKDIR.value).absolute()
    reduced = {"steps": 3, "seeds": (0,)} if _SMOKE.value else {}
    sweep, folder = design.sweep(workdir / "bases", **reduced), workdir / "runs"
    failures = {}
    if not _ANALYSE_ONLY.value:
        make_bases(workdir / "bases", design.BASES.values(), smoke=_SMOKE.value)
        failures = runner.run(sweep, folder, parallel=_PARALLEL.value)
    print(analysis.write(sweep, folder, workdir))
    if _PUBLISH.value:
        for name in PUBLISHED:
            shutil.copy(workdir / name, pathlib.Path(__file__).parent / name)
    if failures:
        lines = "\n".join(f"  - {name}: {reason}" for name, reason in failures.items())
        raise command.UsageError(f"{len(failures)} members failed:\n{lines}")


def make_bases(folder: pathlib.Path, bases, *, smoke: bool = False) -> None:
    """Trains the base policies that are not embedded, each once."""
    short = ("--chain_steps=3", "--mixture_steps=3", "--eval_problems=16") if smoke else ()
    for base in bases:
        path = pathlib.Path(base.path(folder))
        if base.embedded or (path / "README.md").is_file():
            continue
        print(f"== base {base.name}", flush=True)
        subprocess.run(
            [
                sys.executable, "-m", "experiments.make_base", "--overwrite", *base.options, *short,
                f"--out={path}",
            ],
            check=True,
            cwd=pathlib.Path(__file__).resolve().parents[3],
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
