"""Tables and the figure of the study, of the runs that there are."""

import dataclasses
import pathlib
from collections.abc import Mapping

from experiments.studies.int8_rollout import design
from experiments.sweeps import report


def write(sweep, workdir: pathlib.Path, failures: Mapping[str, str]) -> str:
    """Writes results.md and the figure; returns the text."""
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
    name = sweep.outcomes[-1].name
    found = report.by_variant(results, name)
    rows = [
        [variant, f"{sum(seeds.values()) / len(seeds):.2g}" if seeds else "–"]
        for variant, seeds in found.items()
    ]
    return report.markdown_table(["cell", f"{name}, nats"], rows)
