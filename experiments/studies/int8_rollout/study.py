"""Runs the study: `python -m experiments.studies.int8_rollout.study --workdir=DIR --parallel=2`.

Runs every cell of the design with every seed, and writes tables and a figure into the workdir. The
same command resumes; `--analyse_only` analyses the finished runs. `--publish` also copies tables
and figure beside the study's README.
"""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Mapping

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.")
_PARALLEL = flags.DEFINE_integer("parallel", 2, "Runs at a time.", 1)
_SMOKE = flags.DEFINE_bool("smoke", False, "One seed and three steps: does everything run?")
_PUBLISH = flags.DEFINE_bool("publish", False, "Copy tables and figure beside the README.")
_ANALYSE_ONLY = flags.DEFINE_bool("analyse_only", False, "Run nothing; tell of what is there.")

PUBLISHED = ("results.md", "curves.png")


def main() -> None:
    """Runs everything, in order."""
    from experiments.studies.int8_rollout import design
    from experiments.sweeps import runner

    workdir = pathlib.Path(_WORKDIR.value).absolute()
    sweep = design.sweep(**({"steps": 3, "seeds": (0,)} if _SMOKE.value else {}))
    failures = {}
    if not _ANALYSE_ONLY.value:
        failures = runner.run(sweep, workdir, parallel=_PARALLEL.value)
    print(write(sweep, workdir, failures))
    if _PUBLISH.value:
        for name in PUBLISHED:
            shutil.copy(workdir / name, pathlib.Path(__file__).parent / name)
    if failures:
        lines = "\n".join(f"  - {name}: {reason}" for name, reason in failures.items())
        raise command.UsageError(f"{len(failures)} members failed:\n{lines}")


def write(sweep, workdir: pathlib.Path, failures: Mapping[str, str]) -> str:
    """Writes results.md and the figure; returns the text."""
    from experiments.studies.int8_rollout import design
    from experiments.sweeps import report
    from luspo_jax.hosts.files import write_text

    results = report.collect(sweep, workdir, failures)
    sections = {
        "Δ: minus float32, the same correction": sweep,
        "Δ: minus no correction, the same weights": design.of_correction(sweep),
    }
    text = "# Results\n\nMade by `study.py`; means over seeds with 95 % intervals, differences "
    text += "paired by seed.\n"
    for title, one in sections.items():
        shown = dataclasses.replace(one, outcomes=design.OUTCOMES[:-1])
        text += f"\n## {title}\n\n" + report.markdown_table(*report.table(shown, results))
    text += "\n## Sampler against trainer, mean over steps and seeds\n\n"
    text += mismatch_table(sweep, results)
    missing = [f"- {r.member.name}: {r.missing}\n" for r in results if r.missing]
    text += "".join(["\n## Not finished\n\n", *missing] if missing else [])
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / "results.md", text)
    report.curves_figure(sweep, workdir)
    return text


def mismatch_table(sweep, results) -> str:
    """Returns the table of the last outcome, whose values are too small for the others' digits."""
    from experiments.sweeps import report

    name = sweep.outcomes[-1].name
    found = report.by_variant(results, name)
    rows = [
        [variant, f"{sum(seeds.values()) / len(seeds):.2g}" if seeds else "–"]
        for variant, seeds in found.items()
    ]
    return report.markdown_table(["cell", f"{name}, nats"], rows)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",)))
