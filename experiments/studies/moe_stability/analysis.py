"""Turns the study's runs into its tables and figures."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.drawing import chart
from experiments.studies.moe_stability import design
from experiments.sweeps import report, spec
from experiments.sweeps.report import Estimate
from experiments.sweeps.spec import Sweep
from luspo_jax.hosts.files import write_text

Runs = Mapping[str, Mapping[int, list[dict]]]  # cell → seed → metrics of its steps
SPIKE = 3.0  # a step's gradient norm over the run's median, above which it is a spike


def _mean(metric: str) -> Callable[[list[dict]], float]:
    return lambda rows: _average(report.series(rows, metric)[1])


def _average(values) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _typical(metric, power=1.0):
    """Builds a geometric mean over steps: tails of squared log-ratios dominate other means."""

    def measure(rows):
        values = report.series(rows, metric)[1]
        return math.exp(_average(np.log(np.maximum(values, 1e-12)) * power))

    return measure


def _drift(metric):
    return lambda rows: 1 - _mean(metric)(rows)


def gradient_norms(rows: list[dict]) -> np.ndarray:
    """Returns gradient norms by step, each the mean over its updates, over the run's median."""
    norms = report.series(rows, "actor/grad_norm")[1]
    return norms / np.median(norms) if len(norms) else norms


def spike_share(rows: list[dict]) -> float:
    """Returns the share of steps with a gradient norm more than SPIKE times the run's median."""
    return _average(gradient_norms(rows) > SPIKE)


def largest_norm(rows: list[dict]) -> float:
    """Returns the largest gradient norm of a step over the run's median."""
    norms = gradient_norms(rows)
    return float(np.max(norms)) if len(norms) else math.nan


def _outcome(metric, reduce):
    return lambda rows: report.value_of(rows, spec.Outcome(metric, metric, reduce))


TOKEN, SEQUENCE = "token log-ratio, rms", "sequence log-ratio, rms"
AREA, LAST = "accuracy area", "last accuracy"
DRIFT, SAMPLER_DRIFT = "routing drift old→current", "routing drift sampler→old"
LARGEST, MISMATCH = "max ÷ median norm", "largest sampler mismatch, nats"
CLIPPED = "clipped share"

# Column → its function of a run's metrics: means over steps, geometric ones for FACTORS.
MEASURES: Mapping[str, Callable[[list[dict]], float]] = {
    AREA: _outcome("val-core/*", "auc"),
    LAST: _outcome("val-core/*", "last"),
    TOKEN: _typical("actor/log_ratio_squared/token", 0.5),
    SEQUENCE: _typical("actor/log_ratio_squared/sequence", 0.5),
    CLIPPED: _mean("actor/pg_clipfrac"),
    "spikes": spike_share,
    LARGEST: largest_norm,
    "gradient norm": _mean("actor/grad_norm"),
    DRIFT: _drift("router/agreement/old_current"),
    SAMPLER_DRIFT: _drift("router/agreement/sampler_old"),
    MISMATCH: _typical("rollout_corr/max_abs_diff"),
    "load violation": _mean("router/max_violation"),
    "last entropy": _outcome("actor/entropy", "last"),
}
FACTORS = (TOKEN, SEQUENCE, LARGEST, MISMATCH)  # compared by their ratio
COMPARED = (AREA, LAST, TOKEN, SEQUENCE, CLIPPED, LARGEST, DRIFT, MISMATCH)


def write(sweep: Sweep, folder: pathlib.Path, workdir: pathlib.Path) -> str:
    """Writes results.md and the figures; returns the text."""
    runs = finished(sweep, folder)
    sections = [
        "# Results\n\nMade by `study.py`; means over seeds with 95 % intervals, differences paired "
        "by seed,\n× the factor between two. A log-ratio is log π − log π_old of the trainer: rms "
        "over tokens, or of the mean of a\nresponse over responses, geometric mean over steps. "
        "Drift is the share of a token's experts that changed. Gradient\nnorms of a step are the "
        f"mean of its eight updates; a spike is beyond {SPIKE:g} times the run's median.\n",
        "\n## Every cell\n\n",
        report.markdown_table(["cell", "runs", *MEASURES], list(_rows(runs))),
    ]
    for title, pairs in comparisons().items():
        rows = [
            [label, *(compared(runs, this, that, name) for name in COMPARED)]
            for label, this, that in pairs
            if this in runs and that in runs
        ]
        if rows:
            sections += [f"\n## {title}\n\n"]
            sections += [report.markdown_table(["difference", *COMPARED], rows)]
    missing = [f"- {m.name}\n" for m in spec.members(sweep) if m.seed not in runs.get(_cell(m), {})]
    if missing:
        sections += ["\n## Not finished\n\n", *missing]
    text = "".join(sections)
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / "results.md", text)
    ratio_figure(runs, workdir / "ratios.png")
    curves_figure(runs, workdir / "curves.png")
    return text


def finished(sweep: Sweep, folder: pathlib.Path) -> Runs:
    """Returns the metrics of all finished runs."""
    runs: dict[str, dict[int, list[dict]]] = {}
    for member in spec.members(sweep):
        rows = report.finished_rows(sweep, member.variant, member.seed, folder)
        if rows:
            runs.setdefault(_cell(member), {})[member.seed] = rows
    return runs


def _cell(member):
    return member.variant.name


def _rows(runs):
    for cell, seeds in runs.items():
        yield [cell, len(seeds), *(level(seeds, name) for name in MEASURES)]


def level(seeds: Mapping[int, list[dict]], name: str) -> str:
    """Returns a measure's mean over seeds; the geometric one for FACTORS."""
    values = [MEASURES[name](rows) for rows in seeds.values()]
    if name not in FACTORS:
        return str(report.estimate(values))
    low, middle, high = _exponential(report.estimate(np.log(values)))
    return f"{middle:.3g} ({low:.2g} … {high:.2g})" if math.isfinite(middle) else "–"


def _exponential(found: Estimate) -> list[float]:
    """Returns lower end, mean and upper end of an estimate of logarithms, exponentiated."""
    width = found.half_width
    return [math.exp(found.mean + change) for change in (-width, 0.0, width)]


def compared(runs: Runs, this: str, that: str, name: str) -> str:
    """Formats the paired difference of a measure, or the factor between two positive ones."""
    if name not in FACTORS:
        return str(difference(runs, this, that, MEASURES[name]))
    found = difference(runs, this, that, lambda rows: math.log(MEASURES[name](rows)))
    if not found.count:
        return "–"
    low, middle, high = _exponential(found)
    return f"×{middle:.2f} ({low:.2f} … {high:.2f})"


def difference(runs: Runs, this: str, that: str, measure: Callable) -> Estimate:
    """Estimates the mean of this − that over the seeds in both."""
    ours, theirs = (
        {seed: measure(rows) for seed, rows in runs[cell].items()} for cell in (this, that)
    )
    return report.paired(ours, theirs)


def comparisons() -> dict[str, list[tuple[str, str, str]]]:
    """Returns the study's questions: title → (label, this cell, minus that cell)."""
    named = design.cell_name
    replayed = [
        (
            f"{base}, {objective}: {replay} − none{_at(rate)}",
            cell,
            named(base, objective, "none", rate),
        )
        for cell, (base, objective, replay, rate) in design.cells().items()
        if replay != "none"
    ]
    mixed = [
        (
            f"{objective}{_at(rate)}: {base} − dense",
            cell,
            named("dense", objective, "none", rate),
        )
        for cell, (base, objective, replay, rate) in design.cells().items()
        if replay == "none" and base != "dense"
    ]
    levels = [
        (
            f"{base}, {replay}: {token} − {other}{_at(rate)}",
            cell,
            named(base, other, replay, rate),
        )
        for cell, (base, token, replay, rate) in design.cells().items()
        if token in design.TOKEN_LEVEL
        for other in design.SEQUENCE_LEVEL
    ]
    harsher = [
        (f"{base}, {objective}, {replay}", cell, named(base, objective, replay))
        for cell, (base, objective, replay, rate) in design.cells().items()
        if rate != design.RATE
    ]
    titled = {
        "What replay changes": replayed,
        "What experts change, without replay": mixed,
        "Token-level minus sequence-level": levels,
        f"Learning rate {design.HARSH_RATE:g} minus {design.RATE:g}": harsher,
    }
    ran = design.cells()
    return {title: [p for p in pairs if p[2] in ran] for title, pairs in titled.items()}


def _at(rate):
    return "" if rate == design.RATE else f", rate {rate:g}"


REPLAY_STYLES = {"none": 1, "old": 0, "sampler": 2}


def ratio_figure(runs: Runs, target: pathlib.Path) -> None:
    """Draws the measures of every cell: a dot per seed, a bar for their mean."""
    shown = (TOKEN, SEQUENCE, DRIFT, MISMATCH, LARGEST, AREA)
    panels = [
        chart.Panel(
            name, "", "", [line for replay in REPLAY_STYLES for line in _marks(runs, name, replay)],
            log_x=name in FACTORS, names=list(runs),
        )
        for name in shown
    ]  # fmt: skip
    height = 1.1 + 0.27 * len(runs)
    chart.write(chart.Chart([panels], width=2.9, height=height, share_y=True), target)


def _marks(runs, name, replay):
    """Returns the points of all seeds of the cells with that replay, and those of their means."""
    cells = [
        (place, [MEASURES[name](rows) for rows in seeds.values()])
        for place, (cell, seeds) in enumerate(runs.items())
        if design.cells()[cell][2] == replay
    ]
    finite = [(place, values) for place, values in cells if np.isfinite(values).all()]
    if not finite:
        return []
    style = REPLAY_STYLES[replay]
    dots = np.array([(value, place) for place, values in finite for value in values])
    means = np.array([(_middle(values, name), place) for place, values in finite])
    return [
        chart.Line(f"replay: {replay}", *dots.T, style=style, thin=True, marks="o"),
        chart.Line(f"replay: {replay}", *means.T, style=style, marks="|"),
    ]


def _middle(values, name):
    return math.exp(_average(np.log(values))) if name in FACTORS else _average(values)


CURVES = (
    ("held-out accuracy", "val-core/*", "share right"),
    ("token log-ratio²", "actor/log_ratio_squared/token", "nats²"),
    ("gradient norm", "actor/grad_norm", "norm"),
)


def curves_figure(runs: Runs, target: pathlib.Path) -> None:
    """Draws the main mixture and the dense control over steps, one row per objective."""
    objectives = [o for o in design.OBJECTIVES if design.cell_name(design.MAIN, o, "none") in runs]
    lines = [(design.MAIN, replay, style) for replay, style in REPLAY_STYLES.items()]
    rows = [
        [
            chart.Panel(
                f"{objective}: {title}", report.STEP, unit,
                [
                    line
                    for base, replay, style in (*lines, ("dense", "none", 3))
                    for line in _lines(
                        runs.get(design.cell_name(base, objective, replay), {}), metric,
                        f"{base}, {replay}", style,
                    )
                ],
                log=not metric.startswith("val-core"),
            )
            for title, metric, unit in CURVES
        ]
        for objective in objectives
    ]  # fmt: skip
    if rows:
        chart.write(chart.Chart(rows), target)


def _lines(seeds: Mapping[int, Sequence[dict]], metric, label, style):
    curves = [report.series(rows, metric) for rows in seeds.values()]
    steps, mean, _ = report.band(curves)
    thin = [chart.Line(label, *curve, style=style, thin=True) for curve in curves]
    return [*thin, chart.Line(label, steps, mean, style=style)] if len(steps) else []
