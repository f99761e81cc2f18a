"""Turns the study's runs into its tables, figures and tests."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from experiments.drawing import chart
from experiments.studies.length_bias import design
from experiments.sweeps import report, spec
from experiments.sweeps.prediction import LENGTH, WINDOW, fit, windows
from experiments.sweeps.report import Estimate, Result
from experiments.sweeps.spec import Sweep
from luspo_jax.hosts import figure_style
from luspo_jax.hosts.files import write_text

Ran = tuple[Sweep, pathlib.Path]  # a sweep and the folder of its runs

# Questions as paired differences: name → (this, minus that).
CONTRASTS = {
    "paper's claim: LUSPO wide − GSPO tight": ("LUSPO wide", "GSPO tight"),
    "clip range alone: GSPO wide − GSPO tight": ("GSPO wide", "GSPO tight"),
    "clip range alone: LUSPO/L_ref wide − tight": ("LUSPO/L_ref wide", "LUSPO/L_ref tight"),
    "weighting alone: LUSPO/L_ref − GSPO, both tight": ("LUSPO/L_ref tight", "GSPO tight"),
    "weighting alone: LUSPO/L_ref − GSPO, both wide": ("LUSPO/L_ref wide", "GSPO wide"),
    "weighting alone: LUSPO/L_ref − GSPO, both unclipped": ("LUSPO/L_ref none", "GSPO none"),
    "size of the loss: LUSPO − LUSPO/L_ref, wide": ("LUSPO wide", "LUSPO/L_ref wide"),
    "token mean − sequence mean, GSPO wide": ("GSPO wide, token mean", "GSPO wide"),
    "gradient clipping off, GSPO wide": ("GSPO wide, no gradient clip", "GSPO wide"),
    "gradient clipping off, LUSPO wide": ("LUSPO wide, no gradient clip", "LUSPO wide"),
    "only positives clipped − both, GSPO tight": ("GSPO tight, A+ clipped", "GSPO tight"),
    "only negatives clipped − both, GSPO tight": ("GSPO tight, A- clipped", "GSPO tight"),
    "only positives clipped − both, LUSPO wide": ("LUSPO wide, A+ clipped", "LUSPO wide"),
    "only negatives clipped − both, LUSPO wide": ("LUSPO wide, A- clipped", "LUSPO wide"),
    "OPO baseline, LUSPO wide": ("LUSPO wide, OPO baseline", "LUSPO wide"),
    "dynamic sampling, LUSPO wide": ("LUSPO wide, dynamic sampling", "LUSPO wide"),
    "SAPO gate − no clip, LUSPO": ("LUSPO, SAPO gate", "LUSPO none"),
    "overlong penalty, LUSPO wide": ("LUSPO wide, overlong penalty", "LUSPO wide"),
    "adaptive (pressure) − LUSPO/L_ref wide": ("adaptive, pressure to zero", "LUSPO/L_ref wide"),
    "adaptive (band) − LUSPO/L_ref wide": ("adaptive, band", "LUSPO/L_ref wide"),
}  # fmt: skip


# Lines of the factorial, and the numbers of their looks; GRPO has one clip range, 0.2.
_STYLES = {"GSPO {clip}": 1, "LUSPO {clip}": 0, "LUSPO/L_ref {clip}": 2, "GRPO": 3}


@dataclasses.dataclass(frozen=True)
class Study:
    """All runs of the study."""

    rates: Mapping[str, Mapping[str, float]]
    main: Mapping[str, Ran]
    prediction: Mapping[tuple[str, str], Ran]  # by task and learning rates
    environments: Ran


def write(study: Study, workdir: pathlib.Path) -> str:
    """Writes results.md and the figures; returns the text."""
    results = {task: report.collect(*ran) for task, ran in study.main.items()}
    sections = ["# Results\n", "Made by `study.py`; intervals are 95 %.\n"]
    for task in design.TASKS:
        sections.append(f"\n## Task {task}: mean over seeds and both bases\n")
        sections.append(_main_table(study, task, results[task]))
        sections.append(f"\n## Task {task}: paired differences (same base and seed)\n")
        sections.append(_contrasts(results[task]))
    sections.append("\n## Other rewards and lengths, task sums, base 0\n")
    sections.append(_environments(study.environments))
    sections.append("\n## Are negatives clipped more than positives?\n")
    sections.append(_clipping(results))
    sections.append("\n## Does pressure predict the change of length?\n")
    text, points = _predictions(study)
    sections.append(text)
    missing = [
        f"- {r.member.name}: {r.missing}\n"
        for found in results.values()
        for r in found
        if r.missing
    ]
    if missing:
        sections += ["\n## Missing\n", *missing]
    write_text(workdir / "results.md", "".join(sections))
    factorial_figure(study, workdir)
    prediction_figure(points, workdir)
    return "".join(sections)


def _pooled(results: list[Result], outcome: str) -> dict[str, dict[tuple[str, int], float]]:
    """Returns objective → (where, seed) → value."""
    values: dict[str, dict[tuple[str, int], float]] = {}
    for result in results:
        levels = dict(result.member.variant.levels)
        value = result.outcomes.get(outcome, math.nan)
        if math.isfinite(value):
            key = (levels["where"], result.member.seed)
            values.setdefault(levels["objective"], {})[key] = value
    return values


def _main_table(study, task, results):
    names = [outcome.name for outcome in design.OUTCOMES]
    pooled = {name: _pooled(results, name) for name in names}
    objectives = list(dict.fromkeys(dict(r.member.variant.levels)["objective"] for r in results))
    rows = []
    for objective in objectives:
        parent = design.CONTROLS[objective][0] if objective in design.CONTROLS else objective
        cells = [report.estimate(list(pooled[n].get(objective, {}).values())) for n in names]
        rows.append([objective, f"{study.rates[task][parent]:g}", cells[0].count, *cells])
    return report.markdown_table(["objective", "learning rate", "runs", *names], rows)


def _difference(values, this, that) -> Estimate:
    ours, theirs = values.get(this, {}), values.get(that, {})
    return report.estimate([ours[key] - theirs[key] for key in ours if key in theirs])


def _contrasts(results):
    names = ("accuracy area", "length area", "length", "length at accuracy", "clipped", "|s-1|")
    pooled = {name: _pooled(results, name) for name in names}
    rows = [
        [label, *(_difference(pooled[name], this, that) for name in names)]
        for label, (this, that) in CONTRASTS.items()
    ]
    return report.markdown_table(["difference", *names], rows)


def _environments(ran):
    results = report.collect(*ran)
    names = ("accuracy area", "length area", "accuracy", "length", "clipped", "flat groups")
    rows = []
    values = {name: report.by_variant(results, name) for name in names}
    for variant in spec.variants(ran[0]):
        against = spec.baseline_of(ran[0], variant)
        cells = [report.estimate(list(values[name][variant.name].values())) for name in names]
        difference = [
            report.paired(values[name][variant.name], values[name].get(against, {}))
            if against != variant.name
            else Estimate(math.nan, math.nan, 0)
            for name in names[:2]
        ]
        rows.append([*(level for _, level in variant.levels), *cells, *difference])
    columns = ["where", "objective", *names, "Δ accuracy area", "Δ length area"]
    return report.markdown_table(columns, rows)


def _clipping(results):
    """Returns clip fraction where A < 0 minus where A > 0, paired within a run."""
    rows = []
    for task, found in results.items():
        positive, negative = _pooled(found, "clipped A>0"), _pooled(found, "clipped A<0")
        for name in ("GSPO tight", "GSPO wide", "LUSPO tight", "LUSPO wide", "GRPO"):
            both = sorted(set(positive.get(name, {})) & set(negative.get(name, {})))
            gaps = [negative[name][key] - positive[name][key] for key in both]
            rows.append(
                [
                    task,
                    name,
                    report.estimate([positive[name][key] for key in both]),
                    report.estimate([negative[name][key] for key in both]),
                    report.estimate(gaps),
                ]
            )
    columns = ["task", "objective", "clipped, A>0", "clipped, A<0", "A<0 minus A>0"]
    return report.markdown_table(columns, rows)


def _predictions(study):
    """Returns the table, and the windows by (task, rates) and objective."""
    lines = [
        "| task | rates | window | objective | correlation | slope | by ranks | windows |\n",
        "|---|---|---|---|---|---|---|---|\n",
    ]
    points = {}
    for (task, rates), (sweep, folder) in study.prediction.items():
        runs: dict[str, list] = {}
        for result in report.collect(sweep, folder):
            if not result.missing:
                name = dict(result.member.variant.levels)["objective"]
                runs.setdefault(name, []).append(windows(report.rows_of(result.member, folder)))
        everything = [run for found in runs.values() for run in found]
        if not everything:
            continue
        points[task, rates] = runs
        start = f"| {task} | {rates} |"
        for name, found in {"all": everything, **runs}.items():
            same = fit([[(w[0], w[1]) for w in run] for run in found])
            lines.append(f"{start} same | {name} | {same} |\n")
        for label, column in (("pressure", 0), ("change before", 3)):
            pairs = [
                [
                    (w[1] if column == 3 else w[0], w[2])
                    for w in run
                    if math.isfinite(w[2])
                ]
                for run in everything
            ]  # fmt: skip
            lines.append(f"{start} next, from {label} | all | {fit(pairs)} |\n")
    return "".join(lines), points


def factorial_figure(study: Study, workdir: pathlib.Path) -> None:
    """Draws the factorial's length and accuracy over steps: by clip range, bases, all seeds."""
    rows = []
    for task in design.TASKS:
        sweep, folder = study.main[task]
        for metric, unit in (("val-core/*", "held-out share right"), (LENGTH, "tokens, mean")):
            rows.append(
                [
                    chart.Panel(
                        f"{task}, clip {clip}", report.STEP, unit,
                        [
                            line
                            for name, style in _STYLES.items()
                            for line in report.lines(
                                _curves(sweep, folder, name.format(clip=clip), metric),
                                name.format(clip="").strip(), style,
                            )
                        ],
                    )
                    for clip in design.CLIPS
                ]
            )  # fmt: skip
    chart.write(chart.Chart(rows, share_y=True), workdir / "factorial.png")


def _curves(sweep, folder, objective, metric):
    found = []
    for variant in spec.variants(sweep):
        if dict(variant.levels)["objective"] == objective:
            for seed in sweep.seeds:
                rows = report.finished_rows(sweep, variant, seed, folder)
                if rows:
                    found.append(report.series(rows, metric))
    return found


def _style(objective):
    """Returns the number of an objective's look, whatever its clip range."""
    return next(style for name, style in _STYLES.items() if name.split()[0] == objective.split()[0])


def prediction_figure(points, workdir: pathlib.Path) -> None:
    """Draws measured against predicted change of length, one point per window."""
    panels = [
        chart.Panel(
            f"{task}, {rates}: windows of {WINDOW} steps",
            "predicted change of mean length, tokens", "measured change, tokens",
            [
                chart.Line(
                    name, *np.array([w[:2] for run in found for w in run]).T,
                    style=_style(name), marks=figure_style.MARKERS[_style(name)],
                )
                for name, found in runs.items()
                if any(found)
            ],
            diagonal="as predicted",
        )
        for (task, rates), runs in points.items()
    ]  # fmt: skip
    if panels:  # two a row, unless not all have finished
        width = 2 if len(panels) % 2 == 0 else 1
        rows = [panels[k : k + width] for k in range(0, len(panels), width)]
        chart.write(chart.Chart(rows), workdir / "prediction.png")
