"""Tables and the figure of the study, of the runs that there are."""

import pathlib
from collections.abc import Mapping

import numpy as np

from experiments.drawing import chart
from experiments.studies.adapters import design
from experiments.studies.quickstart_runs import ACCURACY, LENGTH
from experiments.sweeps import report, spec
from experiments.sweeps.spec import Sweep
from luspo_jax.hosts import files

AREA = "accuracy area"
CURVES = (
    ("held-out accuracy", ACCURACY, "share right"),
    ("held-out length", LENGTH, "tokens, mean"),
    ("length trained on", "response_length/mean", "tokens, mean"),
)


def tuned(sweep: Sweep, folder: pathlib.Path) -> tuple[design.Rates, str]:
    """Returns each cell's rate with the largest accuracy area, and the table of all.

    A cell without a finished run has the second rate.
    """
    areas = report.by_variant(report.collect(sweep, folder), AREA)
    rates, rows = {}, []
    for objective in design.OBJECTIVES:
        rates[objective] = {}
        for weights, tried in design.RATES.items():
            names = {rate: design.tuning_member(objective, weights, rate) for rate in tried}
            found = {rate: report.estimate(list(areas[n].values())) for rate, n in names.items()}
            means = {rate: area.mean for rate, area in found.items() if area.count}
            best = max(means, key=means.get) if means else tried[1]
            rates[objective][weights] = best
            shown = [
                f"{'**' if rate == best else ''}{rate:g}: {means.get(rate, np.nan):.3f}"
                f"{'**' if rate == best else ''}"
                for rate in tried
            ]
            rows.append([objective, weights, *shown])
    tried = [f"rate: {AREA}", *[""] * (len(design.RATES[design.FULL]) - 1)]
    return rates, report.markdown_table(["objective", "weights", *tried], rows)


def write(
    sweeps: Mapping[str, Sweep], workdir: pathlib.Path, tuning: str, failures: Mapping[str, str]
) -> str:
    """Writes results.md and the figure; returns the text.

    Args:
      sweeps: objective → sweep.
      workdir: holds a folder for each objective.
      tuning: the table of learning rates; empty if nothing was tuned.
      failures: member → why it failed.
    """
    text = "# Results\n\nMade by `study.py`; means over seeds with 95 % intervals, Δ: minus full "
    text += "weights, paired by seed.\n"
    if tuning:
        text += f"\n## Learning rates\n\n{tuning}"
    missing = []
    for objective, sweep in sweeps.items():
        results = report.collect(sweep, workdir / objective, failures)
        text += f"\n## {objective}\n\n" + report.markdown_table(*report.table(sweep, results))
        text += f"\n### {objective}: shape of the curves\n\n{_alike(sweep, workdir / objective)}"
        missing += [f"- {objective}, {r.member.name}: {r.missing}\n" for r in results if r.missing]
    text += "".join(["\n## Not finished\n\n", *missing] if missing else [])
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_text(workdir / "results.md", text)
    _figure(sweeps, workdir)
    return text


def _alike(sweep, folder) -> str:
    """Returns how far each adapter's curve of training lengths is from full weights', and how far
    two seeds of full weights are from each other.
    """
    curves = {
        variant.name: {
            seed: report.series(rows, CURVES[2][1])[1]
            for seed in sweep.seeds
            if (rows := report.finished_rows(sweep, variant, seed, folder))
        }
        for variant in spec.variants(sweep)
    }
    full = curves[design.FULL]
    rows = []
    for name, runs in curves.items():
        if name == design.FULL:
            pairs = [(full[a], full[b]) for a in full for b in full if a < b]
            label = "full, two seeds"
        else:
            pairs, label = [(runs[seed], full[seed]) for seed in runs if seed in full], name
        gaps = [float(np.abs(ours - theirs).mean()) for ours, theirs in pairs]
        rows.append([label, report.estimate(gaps), len(gaps)])
    return report.markdown_table(["against full weights", "mean |Δ length| a step", "pairs"], rows)


def _figure(sweeps, workdir):
    rows = []
    for objective, sweep in sweeps.items():
        runs = {
            variant.name: report.finished(sweep, variant.name, workdir / objective)
            for variant in spec.variants(sweep)
        }
        rows.append(
            [
                chart.Panel(
                    f"{objective}: {title}", report.STEP, unit,
                    [
                        line
                        for style, (name, found) in enumerate(runs.items())
                        for line in report.lines(
                            [report.series(one, metric) for one in found], name, style
                        )
                    ],
                )
                for title, metric, unit in CURVES
            ]
        )  # fmt: skip
    chart.write(chart.Chart(rows), workdir / "curves.png")
