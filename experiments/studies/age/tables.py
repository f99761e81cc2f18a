"""Tables and the figure of the study, of the runs that there are."""

import math
import pathlib
from collections.abc import Mapping, Sequence

from experiments.drawing import chart
from experiments.studies.age.design import NONE, SYNCHRONOUS, cell
from experiments.studies.quickstart_runs import ACCURACY, LENGTH
from experiments.sweeps import report, spec
from experiments.sweeps.report import Estimate, Result
from experiments.sweeps.spec import Sweep
from luspo_jax.hosts.files import write_text

# Compared with synchronous steps, and what of a mode itself is told beside it.
COMPARED = ("length trained on", "length area", "last length", "accuracy area", "last accuracy")
TOLD = ("consumed / sampled - 1", "mean age", "fresh tokens")
SMALL = "k3 KL(sampler, trainer)"  # values too small for the other digits

BySeed = dict[int, float]


class Values:
    """Outcomes of the finished runs, by cell and seed."""

    def __init__(self, sweep: Sweep, results: Sequence[Result]):
        self._values = {o.name: report.by_variant(results, o.name) for o in sweep.outcomes}
        levels = [dict(variant.levels) for variant in spec.variants(sweep)]
        self.modes, self.objectives, self.corrections = (
            list(dict.fromkeys(level[axis] for level in levels)) for axis in sweep.axes
        )

    def of(self, outcome: str, mode: str, objective: str, correction: str) -> BySeed:
        """Returns seed → value."""
        return self._values[outcome].get(cell(mode, objective, correction), {})

    def change(self, outcome: str, mode: str, objective: str, correction: str) -> BySeed:
        """Returns seed → value minus that of synchronous steps, all else equal."""
        return _minus(
            self.of(outcome, mode, objective, correction),
            self.of(outcome, SYNCHRONOUS, objective, correction),
        )

    @property
    def others(self) -> list[str]:
        """The modes but the synchronous one."""
        return [mode for mode in self.modes if mode != SYNCHRONOUS]


def _minus(ours: BySeed, theirs: BySeed) -> BySeed:
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def _estimate(values: BySeed) -> Estimate:
    return report.estimate(list(values.values()))


def write(sweep: Sweep, workdir: pathlib.Path, failures: Mapping[str, str]) -> str:
    """Writes results.md and the figure; returns the text."""
    results = report.collect(sweep, workdir, failures)
    values = Values(sweep, results)
    sections = {
        "Does age bias length?": bias(values),
        "Which correction takes it back?": taken_back(values),
        "Does LUSPO's weighting make it better or worse?": weighting(values),
        "Every cell": levels(sweep, values),
    }
    text = (
        "# Results\n\nMade by `study.py`; means over seeds with 95 % intervals, differences paired "
        "by seed. Δ: minus\nsynchronous steps, with the same objective and correction.\n"
    )
    text += "".join(f"\n## {title}\n\n{section}" for title, section in sections.items())
    missing = [f"- {r.member.name}: {r.missing}\n" for r in results if r.missing]
    text += "".join(["\n## Not finished\n\n", *missing] if missing else [])
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / "results.md", text)
    curves_figure(sweep, workdir, workdir / "curves.png")
    return text


def bias(values: Values) -> str:
    """Formats what each mode changes without a correction."""
    rows = [
        [
            mode,
            objective,
            *(_estimate(values.of(name, mode, objective, NONE)) for name in TOLD),
            *(_estimate(values.change(name, mode, objective, NONE)) for name in COMPARED),
        ]
        for mode in values.others
        for objective in values.objectives
    ]
    return _table(["mode", "objective", *TOLD, *(f"Δ {name}" for name in COMPARED)], rows, 2)


def taken_back(values: Values) -> str:
    """Formats changes with each correction, and how they differ from those without one."""
    columns, rows = ["mode", "objective", "correction"], []
    for name in ("length area", "accuracy area"):
        columns += [f"Δ {name}", f"Δ {name}: minus without"]
    for mode in values.others:
        for objective in values.objectives:
            for correction in values.corrections:
                row = [mode, objective, correction]
                for name in ("length area", "accuracy area"):
                    plain = values.change(name, mode, objective, NONE)
                    change = values.change(name, mode, objective, correction)
                    more = {} if correction == NONE else _minus(change, plain)
                    row += [_estimate(change), _estimate(more)]
                rows.append(row)
    return _table(columns, rows, 3)


def weighting(values: Values) -> str:
    """Formats LUSPO's changes minus those of the other objectives."""
    names, rows = ("length trained on", "length area", "accuracy area"), []
    for mode in values.others:
        for correction in values.corrections:
            for other in (name for name in values.objectives if name != "LUSPO"):
                pairs = (
                    [values.change(name, mode, own, correction) for own in ("LUSPO", other)]
                    for name in names
                )
                row = [mode, correction, f"LUSPO − {other}"]
                rows.append([*row, *(_estimate(_minus(*pair)) for pair in pairs)])
    return _table(["mode", "correction", "of", *(f"Δ {name}" for name in names)], rows, 3)


def levels(sweep: Sweep, values: Values) -> str:
    """Formats every outcome of every cell."""
    names = [outcome.name for outcome in sweep.outcomes]
    rows = []
    for variant in spec.variants(sweep):
        place = [level for _, level in variant.levels]
        found = {name: _estimate(values.of(name, *place)) for name in names}
        small = found[SMALL]
        shown = found | {SMALL: f"{small.mean:.2g}" if small.count else "–"}
        rows.append([*place, found[names[0]].count, *shown.values()])
    return report.markdown_table([*sweep.axes, "runs", *names], rows)


def _table(columns, rows, heads):
    """Formats a table, and counts the changes in it that their intervals tell from none."""
    changes = [
        cell_
        for row in rows
        for column, cell_ in zip(columns[heads:], row[heads:], strict=True)
        if column.startswith("Δ") and math.isfinite(cell_.half_width)
    ]
    beyond = sum(abs(change.mean) > change.half_width for change in changes)
    return report.markdown_table(columns, rows) + (
        f"\n{beyond} of {len(changes)} intervals exclude 0; {0.05 * len(changes):.1f} would by "
        "chance.\n"
    )


def curves_figure(sweep: Sweep, workdir: pathlib.Path, target: pathlib.Path) -> None:
    """Draws held-out length and accuracy over steps: a column an objective, a line a mode."""
    panels = (
        ("held-out length", LENGTH, "tokens, mean"),
        ("held-out accuracy", ACCURACY, "share right"),
    )
    modes = list(sweep.axes["mode"])
    rows = [
        [
            chart.Panel(
                f"{objective}: {title}", report.STEP, unit,
                [
                    line
                    for style, mode in enumerate(modes)
                    for line in _line(sweep, workdir, cell(mode, objective, NONE), metric, style)
                ],
            )
            for objective in sweep.axes["objective"]
        ]
        for title, metric, unit in panels
    ]  # fmt: skip
    chart.write(chart.Chart(rows, share_y=True), target)


def _line(sweep, workdir, name, metric, style):
    runs = report.finished(sweep, name, workdir)
    return report.lines([report.series(rows, metric) for rows in runs], name.split(",")[0], style)
