"""Tables of the study, of the runs that there are."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.studies.length_control import design, figure
from experiments.studies.quickstart_runs import TASKS
from experiments.sweeps import report
from experiments.sweeps.report import Estimate, Result
from experiments.sweeps.spec import Sweep
from luspo_jax.hosts import files

COMPARED = ("accuracy area", "last accuracy", "length area", "last length", "tokens per right")
BASE = ("base accuracy", "base length")  # before training, the same for every control

BySeed = dict[int, float]
Rates = Mapping[str, Mapping[str, float]]  # task → rate group → learning rate
Ran = tuple[Sweep, pathlib.Path]  # a sweep and its folder


@dataclasses.dataclass(frozen=True)
class Study:
    """What is told of: both sweeps, the rates between them, and member → why it failed."""

    tuning: Ran
    main: Ran
    rates: Rates
    failures: Mapping[str, str]


class Values:
    """Outcomes of the finished runs, by task, cell and seed."""

    def __init__(self, sweep: Sweep, results: Sequence[Result]):
        self._values = {o.name: report.by_variant(results, o.name) for o in sweep.outcomes}
        self.outcomes = [o.name for o in sweep.outcomes]

    def of(self, outcome: str, task: str, cell: str) -> BySeed:
        """Returns seed → value."""
        return self._values[outcome].get(design.member(task, cell), {})

    def change(self, outcome: str, task: str, cell: str, other: str) -> Estimate:
        """Estimates the difference of two cells, paired by seed."""
        return report.paired(self.of(outcome, task, cell), self.of(outcome, task, other))

    def count(self, task: str, cell: str) -> int:
        """Returns the number of finished runs."""
        return len(self.of("accuracy area", task, cell))


def chosen_rates(sweep: Sweep, folder: pathlib.Path, target: pathlib.Path) -> Rates:
    """Returns the rate of each group with the largest accuracy area, and stores it.

    A group whose runs have not finished has the middle rate, which is not stored. What is stored,
    stays.

    Args:
      sweep: of `design.tuning`.
      folder: its workdir.
      target: JSON of the rates.
    """
    if target.is_file():
        return files.read_json(target)
    areas = _tuned_areas(sweep, folder)
    rates = {}
    for task in TASKS:
        rates[task] = {}
        for group, cells in design.RATE_GROUPS.items():
            means = {
                rate: np.mean([areas[task, cell, rate].mean for cell in cells])
                for rate in _rates(areas)
            }
            finite = {r: mean for r, mean in means.items() if math.isfinite(mean)}
            middle = design.RATES[len(design.RATES) // 2]
            rates[task][group] = max(finite, key=finite.get) if finite else middle
    if all(area.count == len(sweep.seeds) for area in areas.values()):
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(target, rates)
    return rates


def _tuned_areas(sweep, folder) -> dict[tuple[str, str, float], Estimate]:
    found = report.by_variant(report.collect(sweep, folder), "accuracy area")
    return {
        (task, cell, rate): report.estimate(list(found[name].values()))
        for task in TASKS
        for cells in design.RATE_GROUPS.values()
        for cell in cells
        for rate in design.RATES
        if (name := design.tuning_member(task, cell, rate)) in found
    }


def _rates(areas):
    return sorted({rate for _, _, rate in areas})


def write(study: Study, workdir: pathlib.Path) -> str:
    """Writes results.md and the figure; returns the text."""
    sweep, folder = study.main
    results = report.collect(sweep, folder, study.failures)
    values = Values(sweep, results)
    sections = {
        "Learning rates": tuning(study),
        "The grid: does β move accuracy or length?": grid(values),
        "How much of LUSPO is its clip range?": published_pair(values),
        f"Every control against {design.REFERENCE}": controls(values),
    }
    sections |= {f"Every number: {task}": levels(values, task, study.rates) for task in TASKS}
    text = (
        "# Results\n\nMade by `study.py`; means over seeds with 95 % intervals, differences (Δ) "
        "paired by seed.\n"
    )
    text += "".join(f"\n## {title}\n\n{section}" for title, section in sections.items())
    missing = [f"- {r.member.name}: {r.missing}\n" for r in results if r.missing]
    text += "".join(["\n## Not finished\n\n", *missing] if missing else [])
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_text(workdir / "results.md", text)
    figure.write(values, workdir / "accuracy_tokens.png")
    return text


def tuning(study: Study) -> str:
    """Formats the accuracy area at each rate, and which was chosen."""
    areas, rows = _tuned_areas(*study.tuning), []
    for task in TASKS:
        for group, cells in design.RATE_GROUPS.items():
            for cell in cells:
                shown = [_mean(areas[task, cell, rate]) for rate in _rates(areas)]
                rows.append([task, group, cell, *shown, f"{study.rates[task][group]:g}"])
    columns = ["task", "rate group", "tuned on", *(f"{rate:g}" for rate in _rates(areas)), "chosen"]
    sweep, _ = study.tuning
    return (
        f"Accuracy area of {sweep.fixed['num_steps']} steps, mean over seeds "
        f"{' and '.join(map(str, sweep.seeds))}.\n\n{report.markdown_table(columns, rows)}"
    )


def _mean(estimate):
    return f"{estimate.mean:.4f}" if estimate.count else "–"


def grid(values: Values) -> str:
    """Formats what β changes in each family, and what the weighting changes at each β."""
    first, *others = design.BETAS
    pairs = [
        (design.grid_cell(family, beta), design.grid_cell(family, first))
        for family in design.FAMILIES
        for beta in others
    ]
    pairs += [
        tuple(design.grid_cell(family, beta) for family in reversed(design.FAMILIES))
        for beta in design.BETAS
    ]
    return _differences(values, [("", *pair) for pair in pairs])


def published_pair(values: Values) -> str:
    """Formats the published pair's difference, and the three steps that it consists of."""
    gspo, weighted = (design.grid_cell(family, "0") for family in design.FAMILIES)
    return (
        "The first row is the sum of the other three, at the learning rates above.\n\n"
    ) + _differences(
        values,
        [
            ("as published", "LUSPO", "GSPO"),
            ("clip range", gspo, "GSPO"),
            ("weighting", weighted, gspo),
            ("size of the loss", "LUSPO", weighted),
        ],
    )


def controls(values: Values) -> str:
    """Formats every control's differences to the reference."""
    names = [name for name in design.cells("sums") if name != design.REFERENCE]
    return _differences(values, [("", name, design.REFERENCE) for name in names])


def _differences(values, pairs) -> str:
    """Formats (what, cell, other) of both tasks, and counts the intervals that exclude 0."""
    labels = any(what for what, _, _ in pairs)
    rows, changes = [], []
    for task in TASKS:
        for what, cell, other in pairs:
            found = [values.change(name, task, cell, other) for name in COMPARED]
            changes += [change for change in found if math.isfinite(change.half_width)]
            head = [what] if labels else []
            rows.append([task, *head, f"{cell} − {other}", *found])
    beyond = sum(abs(change.mean) > change.half_width for change in changes)
    heads = ["task", *(["step"] if labels else []), "of", *(f"Δ {name}" for name in COMPARED)]
    return report.markdown_table(heads, rows) + (
        f"\n{beyond} of {len(changes)} intervals exclude 0; {0.05 * len(changes):.1f} would by "
        "chance.\n"
    )


def levels(values: Values, task: str, rates: Rates) -> str:
    """Formats every outcome of every cell; outcomes that no run has are left out."""
    found = {
        name: {cell: report.estimate(list(values.of(name, task, cell).values())) for cell in cells}
        for cells in (design.cells(task),)
        for name in values.outcomes
    }
    names = [
        name
        for name, of in found.items()
        if name not in BASE and any(each.count for each in of.values())
    ]
    rows = [
        [
            cell,
            made.kind,
            f"{rates[task][made.rates]:g}",
            values.count(task, cell),
            *(found[name][cell] for name in names),
        ]
        for cell, made in design.cells(task).items()
    ]
    table = report.markdown_table(["control", "kind", "learning rate", "runs", *names], rows)
    accuracy, length = (found[name][design.REFERENCE] for name in BASE)
    return f"Before training: accuracy {accuracy}, {length} tokens an answer.\n\n{table}"
