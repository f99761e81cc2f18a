"""Turns the runs of a sweep into a table with intervals, paired differences and figures."""

import csv
import dataclasses
import io
import math
import pathlib
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from experiments.drawing import chart
from experiments.drawing.reading import series
from experiments.sweeps import runner, spec
from experiments.sweeps.spec import Member, Outcome, Sweep
from luspo_jax.hosts import figure_style, files
from luspo_jax.hosts.values import nearest

CURVES = (
    ("Reward", "reward", "mean reward of a step"),
    ("Response length", "response_length/mean", "tokens, mean"),
    ("Held-out accuracy", "val-core/*", "share right"),
)
STEP = "rollout step"
MOST_LINES = 12  # most curves in a figure


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half-width of its 95 % interval (NaN below two values)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        if not self.count:
            return "–"
        digits = 4 if abs(self.mean) < 1 else 3 if abs(self.mean) < 10 else 1
        width = "" if math.isnan(self.half_width) else f" ± {self.half_width:.{digits}f}"
        return f"{self.mean:.{digits}f}{width}"


@dataclasses.dataclass(frozen=True)
class Result:
    """One member's outcomes; `missing` says why there are none."""

    member: Member
    outcomes: dict[str, float]
    missing: str = ""


def estimate(values: Sequence[float]) -> Estimate:
    """Returns mean ± t · s/√n of the finite values."""
    finite = np.array([v for v in values if math.isfinite(v)], np.float64)
    if len(finite) < 2:
        return Estimate(float(finite.mean()) if len(finite) else math.nan, math.nan, len(finite))
    reach = scipy.stats.t.ppf(0.975, len(finite) - 1)
    half_width = reach * finite.std(ddof=1) / math.sqrt(len(finite))
    return Estimate(float(finite.mean()), float(half_width), len(finite))


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Estimate:
    """Returns the mean difference over the seeds in both."""
    return estimate([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def value_of(rows: Sequence[dict], outcome: Outcome) -> float:
    """Computes the outcome of a run's metrics; NaN if it does not exist."""
    steps, values = series(rows, outcome.metric)
    if outcome.until is not None:
        kept = steps <= outcome.until
        steps, values = steps[kept], values[kept]
    if not len(values):
        return math.nan
    match outcome.reduce:
        case "first":
            return float(values[0])
        case "last":
            return float(values[-1])
        case "change":
            return float(values[-1] - values[0])
        case "mean":
            return float(values.mean())
        case "max":
            return float(values.max())
        case "auc":
            if len(values) == 1:
                return float(values[0])
            return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))
        case "at":
            reached = first_reaching(*series(rows, outcome.where), outcome.level)
            if not steps[0] <= reached <= steps[-1]:
                return math.nan
            return float(np.interp(reached, steps, values))
    near = nearest(outcome.reduce, spec.REDUCERS)
    raise ValueError(f"reduce={outcome.reduce!r} does not exist: {near}")


def first_reaching(steps: np.ndarray, values: np.ndarray, level: float) -> float:
    """Returns the (fractional) step at which values first reach a level; NaN if never."""
    above = np.flatnonzero(values >= level)
    if not len(above):
        return math.nan
    last = above[0]
    if last == 0:
        return float(steps[0])
    share = (level - values[last - 1]) / (values[last] - values[last - 1])
    return float(steps[last - 1] + share * (steps[last] - steps[last - 1]))


def rows_of(member: Member, workdir: pathlib.Path) -> list[dict]:
    """Reads a member's metrics."""
    return runner.rows_of(member.folder(workdir))


def collect(
    sweep: Sweep, workdir: pathlib.Path, failures: Mapping[str, str] | None = None
) -> list[Result]:
    """Collects outcomes of every member; unfinished members are marked as missing.

    `failures` maps members that failed to their reasons, as from `runner.run`.
    """
    results = []
    for member in spec.members(sweep):
        state, reason = runner.standing(member.folder(workdir), spec.config_of(sweep, member))
        if state == "finished":
            rows = rows_of(member, workdir)
            results.append(Result(member, {o.name: value_of(rows, o) for o in sweep.outcomes}))
        else:
            reason = reason or (failures or {}).get(member.name, "not finished")
            results.append(Result(member, {}, reason))
    return results


def by_variant(results: Sequence[Result], outcome: str) -> dict[str, dict[int, float]]:
    """Returns variant → seed → value, for the members that have one."""
    values: dict[str, dict[int, float]] = {}
    for result in results:
        seeds = values.setdefault(result.member.variant.name, {})
        if math.isfinite(result.outcomes.get(outcome, math.nan)):
            seeds[result.member.seed] = result.outcomes[outcome]
    return values


def table(sweep: Sweep, results: Sequence[Result]) -> tuple[list[str], list[list]]:
    """Returns column names, and a row per variant: seeds, outcomes, differences to the baseline."""
    columns = [*dict(spec.variants(sweep)[0].levels), "seeds"]
    if sweep.axes and sweep.members:
        columns = ["variant", "seeds"]
    compared = bool(sweep.baseline)
    for outcome in sweep.outcomes:
        columns += [outcome.name, *([f"Δ {outcome.name}"] if compared else [])]
    values = {outcome.name: by_variant(results, outcome.name) for outcome in sweep.outcomes}
    finished = {v.name: 0 for v in spec.variants(sweep)}
    for result in results:
        finished[result.member.variant.name] += not result.missing
    rows = []
    for variant in spec.variants(sweep):
        against = spec.baseline_of(sweep, variant)
        levels = [level for _, level in variant.levels]
        if columns[0] == "variant":
            levels = [variant.name]
        row = [*levels, f"{finished[variant.name]}/{len(sweep.seeds)}"]
        for outcome in sweep.outcomes:
            ours = values[outcome.name][variant.name]
            row.append(estimate(list(ours.values())))
            if compared:
                other = values[outcome.name].get(against, {}) if against != variant.name else {}
                row.append(paired(ours, other))
        rows.append(row)
    return columns, rows


def write(sweep: Sweep, workdir: pathlib.Path, failures: Mapping[str, str] | None = None) -> str:
    """Writes table.csv, table.md, results.csv and the figures; returns the Markdown table."""
    with runner.locked(workdir):
        return _write(sweep, workdir, collect(sweep, workdir, failures))


def _write(sweep, workdir, results):
    columns, rows = table(sweep, results)
    markdown = markdown_table(columns, rows)
    missing = [f"{r.member.name}: {r.missing}" for r in results if r.missing]
    if missing:
        markdown += "\nMissing:\n" + "".join(f"- {line}\n" for line in missing)
    files.write_text(workdir / "table.md", markdown)
    files.write_text(workdir / "table.csv", _csv(*_spread_out(columns, rows)))
    names = [outcome.name for outcome in sweep.outcomes]
    files.write_text(
        workdir / "results.csv",
        _csv(
            ["variant", "seed", *names, "missing"],
            [
                [
                    r.member.variant.name,
                    r.member.seed,
                    *(_number(r.outcomes.get(n)) for n in names),
                    r.missing,
                ]
                for r in results
            ],
        ),
    )
    figures = [curves_figure(sweep, workdir), outcomes_figure(sweep, results, workdir)]
    note = "intervals: 95 % over seeds (t); Δ: paired by seed with the baseline\n"
    return markdown + note + "figures: " + ", ".join(str(f) for f in figures if f)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Formats a table that reads well as text."""
    # A bar in a name, such as |s-1|, would begin another cell.
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def curves_figure(sweep: Sweep, workdir: pathlib.Path) -> pathlib.Path | None:
    """Draws reward, length and held-out accuracy over steps: mean over seeds, 95 % interval."""
    every = [variant.name for variant in spec.variants(sweep)]
    chosen = every[:MOST_LINES]
    rows = {name: finished(sweep, name, workdir) for name in chosen}
    panels = [
        chart.Panel(
            title, STEP, unit,
            [
                line
                for style, name in enumerate(chosen)
                for line in lines([series(run, metric) for run in rows[name]], name, style)
            ],
        )
        for title, metric, unit in CURVES
    ]  # fmt: skip
    left_out = len(every) - len(chosen)
    note = f"the first {len(chosen)} variants; {left_out} more in the table" if left_out else ""
    found = chart.Chart([panels], note=note)
    return None if found.is_empty else chart.write(found, workdir / "curves.png")


def outcomes_figure(
    sweep: Sweep, results: Sequence[Result], workdir: pathlib.Path
) -> pathlib.Path | None:
    """Draws each outcome with its interval: differences to the baseline if there is one."""
    plt = figure_style.pyplot()
    columns, rows = table(sweep, results)
    # By index, because an axis may have the name of an outcome.
    places = [place for place, cell in enumerate(rows[0]) if isinstance(cell, Estimate)]
    places = places[1::2] if sweep.baseline else places
    names = [variant.name for variant in spec.variants(sweep)]
    height = max(2.5, 0.28 * len(rows) + 1.2)
    figure, axes = plt.subplots(
        1, len(places), figsize=(2 + 3 * len(places), height), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis, place in zip(axes[0], places, strict=True):
        for index, row in enumerate(rows):
            if row[place].count:
                width = 0 if math.isnan(row[place].half_width) else row[place].half_width
                sure = abs(row[place].mean) > width > 0 and sweep.baseline
                axis.errorbar(
                    row[place].mean, index, xerr=width, fmt="o", ms=5, lw=1.6,
                    color=figure_style.LINES[0], mfc=None if sure else figure_style.CARD,
                )  # fmt: skip
        if sweep.baseline:
            axis.axvline(0, color=figure_style.EDGE, lw=0.8)
        axis.set(title=columns[place])
        axis.grid(False, axis="y")
    axes[0][0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0][0].set_ylim(len(rows) - 0.5, -0.5)
    if sweep.baseline:
        figure.supxlabel(
            "difference to the baseline, paired by seed, with its 95 % interval; filled: without 0",
            fontsize=8.5, color=figure_style.SOFT_INK,
        )  # fmt: skip
    return figure_style.save(figure, workdir / "outcomes.png")


def finished(sweep: Sweep, variant: str, workdir: pathlib.Path) -> list[list[dict]]:
    """Returns the metrics of a variant's finished runs."""
    one = next(v for v in spec.variants(sweep) if v.name == variant)
    runs = (finished_rows(sweep, one, seed, workdir) for seed in sweep.seeds)
    return [rows for rows in runs if rows]


def lines(
    runs: Sequence[tuple[np.ndarray, np.ndarray]], label: str, style: int
) -> list[chart.Line]:
    """Returns the line of the mean of (steps, values) over runs with its interval; none of none."""
    steps, mean, half = band(runs)
    return [chart.Line(label, steps, mean, half, style)] if len(steps) else []


def finished_rows(sweep, variant, seed, workdir):
    """Returns the metrics of a member, or None if its run has not finished."""
    member = Member(variant, seed)
    state, _ = runner.standing(member.folder(workdir), spec.config_of(sweep, member))
    return rows_of(member, workdir) if state == "finished" else None


def band(runs):
    """Returns the steps common to all runs, their mean, and half-width of its interval."""
    runs = [(steps, values) for steps, values in runs if len(steps)]
    if not runs:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    steps = runs[0][0]
    for other, _ in runs[1:]:
        steps = np.intersect1d(steps, other)
    stacked = np.stack([values[np.isin(own, steps)] for own, values in runs])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimates = [estimate(column) for column in stacked.T]
    half = np.nan_to_num([e.half_width for e in estimates])
    return steps, np.array([e.mean for e in estimates]), half


def _spread_out(columns, rows):
    """Splits a column into one for the mean and one for its half-width."""
    wide = []
    for row in rows:
        cells = []
        for cell in row:
            if isinstance(cell, Estimate):
                cells += [_number(cell.mean), _number(cell.half_width)]
            else:
                cells.append(cell)
        wide.append(cells)
    names = []
    for name, cell in zip(columns, rows[0], strict=True):
        names += [name, f"{name} ±95%"] if isinstance(cell, Estimate) else [name]
    return names, wide


def _csv(columns, rows):
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([columns, *rows])
    return stream.getvalue()


def _number(value):
    return "" if value is None or math.isnan(value) else f"{value:.6g}"
