"""Turns the study's runs into its tables and figures."""

import math
import pathlib
from collections.abc import Mapping

import numpy as np

from experiments.drawing import chart
from experiments.studies.vl_length import design
from experiments.sweeps import report
from experiments.sweeps.prediction import WINDOW, fit, windows
from experiments.sweeps.report import Result
from experiments.sweeps.spec import Sweep
from luspo_jax.hosts.files import write_text

# Questions as paired differences: name → (this, minus that).
CONTRASTS = {
    "the paper's claim: LUSPO − GSPO": ("LUSPO", "GSPO"),
    "LUSPO − GRPO": ("LUSPO", "GRPO"),
    "GSPO − GRPO": ("GSPO", "GRPO"),
    "clip range alone: GSPO wide − GSPO": ("GSPO wide", "GSPO"),
    "weighting alone: LUSPO/L_ref − GSPO wide": ("LUSPO/L_ref", "GSPO wide"),
    "size of the loss: LUSPO − LUSPO/L_ref": ("LUSPO", "LUSPO/L_ref"),
    "frozen tower, GSPO": ("GSPO, tower frozen", "GSPO"),
    "frozen tower, LUSPO": ("LUSPO, tower frozen", "LUSPO"),
    "blank images, LUSPO": ("LUSPO, blank images", "LUSPO"),
}
COMPARED = ("accuracy area", "accuracy", "length area", "length change", "clipped A>0",
            "clipped A<0", "pressure taken")  # fmt: skip
SHOWN = ("GRPO", "GSPO", "LUSPO")  # in figures, and "LUSPO, blank images" beside them
_STYLES = {"GRPO": 3, "GSPO": 1, "LUSPO": 0, "LUSPO, blank images": 2}


def write(
    rates: Mapping[str, float], sweep: Sweep, folder: pathlib.Path, workdir: pathlib.Path
) -> str:
    """Writes results.md and the figures; returns the text."""
    results = report.collect(sweep, folder)
    sections = [
        "# Results\n\nMade by `study.py`; means over seeds with 95 % intervals, differences "
        "paired by seed.\nPressure is in tokens of mean length: what was taken, of a step's "
        "updates; own, per unit of\nlearning rate of plain gradient descent.\n",
        "\n## Every cell\n\n",
        levels(rates, results),
        "\n## Differences\n\n",
        contrasts(results),
        "\n## Are negatives clipped more than positives?\n\n",
        clipping(results),
        "\n## Does the pressure of the updates taken account for the change of held-out length?"
        f"\n\nWindows of {WINDOW} steps; intervals by bootstrap over runs.\n\n",
        predictions(results, folder),
    ]
    missing = [f"- {r.member.name}: {r.missing}\n" for r in results if r.missing]
    if missing:
        sections += ["\n## Not finished\n\n", *missing]
    text = "".join(sections)
    write_text(workdir / "results.md", text)
    curves_figure(sweep, folder, workdir / "curves.png")
    clipping_figure(sweep, folder, workdir / "clipping.png")
    return text


def levels(rates: Mapping[str, float], results: list[Result]) -> str:
    """Formats every outcome of every cell."""
    names = [outcome.name for outcome in design.OUTCOMES]
    values = {name: report.by_variant(results, name) for name in names}
    rows = []
    for cell in values[names[0]]:
        rate = rates[design.CONTROLS[cell][0] if cell in design.CONTROLS else cell]
        found = [report.estimate(list(values[name][cell].values())) for name in names]
        rows.append([cell, f"{rate:g}", found[0].count, *found])
    return report.markdown_table(["objective", "learning rate", "runs", *names], rows)


def contrasts(results: list[Result]) -> str:
    """Formats the differences that the study asks about."""
    values = {name: report.by_variant(results, name) for name in COMPARED}
    rows = [
        [label, *(report.paired(values[name][this], values[name][that]) for name in COMPARED)]
        for label, (this, that) in CONTRASTS.items()
    ]
    return report.markdown_table(["difference", *COMPARED], rows)


def clipping(results: list[Result]) -> str:
    """Formats, within each run, the clip fraction where A < 0 minus that where A > 0."""
    positive, negative = (
        report.by_variant(results, name) for name in ("clipped A>0", "clipped A<0")
    )
    rows = [
        [
            cell,
            report.estimate(list(positive[cell].values())),
            report.estimate(list(negative[cell].values())),
            report.paired(negative[cell], positive[cell]),
        ]
        for cell in positive
    ]
    columns = ["objective", "clipped, A>0", "clipped, A<0", "A<0 minus A>0"]
    return report.markdown_table(columns, rows)


def predictions(results: list[Result], folder: pathlib.Path) -> str:
    """Formats fits of measured on predicted change of held-out length, one row per objective."""
    runs: dict[str, list] = {}
    for result in results:
        if not result.missing:
            found = windows(report.rows_of(result.member, folder))
            if found:
                runs.setdefault(result.member.variant.name, []).append(found)
    everything = [run for found in runs.values() for run in found]
    lines = [
        "| objective | correlation | slope | by ranks | windows |\n",
        "|---|---|---|---|---|\n",
    ]
    for name, found in ({"all": everything} | runs if everything else {}).items():
        pairs = [[(w[0], w[1]) for w in run if math.isfinite(w[1])] for run in found]
        lines.append(f"| {name} | {fit(pairs)} |\n")
    return "".join(lines)


def _lines(sweep, folder, cell, metric, label, style):
    curves = [report.series(rows, metric) for rows in report.finished(sweep, cell, folder)]
    if metric.startswith("length/pressure"):
        curves = [(steps, np.cumsum(values)) for steps, values in curves]
    return report.lines(curves, label, style)


def curves_figure(sweep: Sweep, folder: pathlib.Path, target: pathlib.Path) -> None:
    """Draws accuracy, length and the updates' pressure over steps, by objective."""
    panels = (
        ("Held-out accuracy", "val-core/*", "share right"),
        ("Held-out length", design.LENGTH, "tokens, mean"),
        ("Pressure of the updates, summed", "length/pressure/taken", "tokens"),
    )
    row = [
        chart.Panel(
            title, report.STEP, unit,
            [
                line
                for cell, style in _STYLES.items()
                for line in _lines(sweep, folder, cell, metric, cell, style)
            ],
            zero=metric.startswith("length/pressure"),
        )
        for title, metric, unit in panels
    ]  # fmt: skip
    chart.write(chart.Chart([row]), target)


def clipping_figure(sweep: Sweep, folder: pathlib.Path, target: pathlib.Path) -> None:
    """Draws clip fraction by sign of the advantage over steps, one panel per objective."""
    row = [
        chart.Panel(
            f"{cell}: clipped share", report.STEP, "share of responses",
            [
                line
                for style, (sign, word) in enumerate((("pos", "A > 0"), ("neg", "A < 0")))
                for line in _lines(sweep, folder, cell, f"actor/clipfrac/{sign}", word, style)
            ],
        )
        for cell in SHOWN
    ]  # fmt: skip
    chart.write(chart.Chart([row], share_y=True), target)
