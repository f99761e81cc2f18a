"""Design of the study: controls of length, how their learning rates are tuned, and the sweeps."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.studies import quickstart_runs
from experiments.studies.length_control import rewards
from experiments.studies.quickstart_runs import REFERENCE_LENGTH, TASKS, TUNING_SEEDS
from experiments.sweeps import spec
from experiments.sweeps.spec import Member, Outcome, Sweep

SEEDS = (0, 1, 2, 3, 4)
STEPS, TUNING_STEPS = 24, 16
RATES = (1e-4, 2e-4, 4e-4)
REFERENCE = "GRPO"  # what every control is compared with
FAMILIES = ("GSPO", "LUSPO/L")
BETAS = {"0": 0.0, "¼": 0.25, "½": 0.5, "1": 1.0}

FIXED = {
    **quickstart_runs.METRICS_ALONE,
    "eval.every": 8,
    "eval.num_problems": 250,
    "eval.num_samples": 2,
}

OUTCOMES = (
    *quickstart_runs.HELD_OUT,
    Outcome("base accuracy", quickstart_runs.ACCURACY, "first"),
    Outcome("base length", quickstart_runs.LENGTH, "first"),
    Outcome("tokens per right", "val-aux/*/tokens_per_right"),
    quickstart_runs.CLIPPED,
    Outcome("corr(A, L)", "length/advantage_corr", "mean"),
    Outcome("growth flag", "length/degeneration/flag", "mean"),
    Outcome("collapse flag", "length/degeneration/collapse", "mean"),
    Outcome("sign reversal", "length/sign_reversal", "mean"),
)

# Cells whose gradients have one scale and one kind of clip range share a learning rate: the one
# with the largest mean of these cells' accuracy areas.
RATE_GROUPS: Mapping[str, tuple[str, ...]] = {
    "wide": ("GSPO β=0", "LUSPO/L β=0"),
    "tight": ("GSPO",),
    "unscaled": ("LUSPO",),
    "token": (REFERENCE,),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A control of length.

    Attributes:
      kind: its block of the design.
      rates: of RATE_GROUPS.
      fields: that it sets.
    """

    kind: str
    rates: str
    fields: Mapping[str, Any]


def grid_cell(family: str, beta: str) -> str:
    """Returns the name of a cell of the grid."""
    return f"{family} β={beta}"


def cells(task: str) -> dict[str, Cell]:
    """Returns name → cell, the most important first.

    Args:
      task: of TASKS; the mean length of its base policy scales what is counted in tokens.
    """
    mean_length = REFERENCE_LENGTH[task]
    found = {name: Cell("grid", "wide", fields) for name, fields in _grid(mean_length).items()} | {
        REFERENCE: _preset("reference", "token", "grpo"),
        "DAPO": _preset("reference", "token", "dapo"),
        "GSPO": _preset("reference", "tight", "gspo"),
        "LUSPO": _preset("reference", "unscaled", "luspo"),
    }
    of_group = _rewards(round(mean_length))
    blocks = {"reward": of_group, "samples": _SAMPLES}
    for kind, settings in blocks.items():
        for name, fields in settings.items():
            found[name] = _preset(kind, "token", "grpo", fields)
    for name in ("soft_sequence", "dhpo", "otb", "lambda_grpo", "qglas", "intern_s2", "lite_ppo"):
        found[name] = _preset("objective", "token", name)
    found["hispo"] = _preset("objective", "wide", "hispo")
    # Parts normalised by themselves are a control only where length is one of them.
    found["gdpo + laser"] = _preset("objective", "token", "gdpo", of_group["laser"])
    return found


def _preset(kind, rates, name, fields=None):
    return Cell(kind, rates, {"objective.preset": name, **(fields or {})})


def _grid(mean_length):
    """Returns both weightings with one clip range, which every β leaves as it is at the mean."""
    return {
        grid_cell(family, name): {
            "objective.preset": "luspo_normalized",
            "objective.length_alpha": float(family == "LUSPO/L"),  # 0 is GSPO's weighting
            "objective.reference_length": mean_length,
            "objective.clip_length_exponent": beta,
        }
        for name, beta in BETAS.items()
        for family in FAMILIES
    }


def _rewards(target):
    """Returns rewards on top of GRPO. What counts tokens is set to these tasks' lengths, `target`
    being the base's mean; all other options, and weights of 1, are the methods' own.
    """
    function = f"{rewards.__name__}:{rewards.longer_if_wrong.__name__}"
    return {
        "kimi": _group("kimi", weight=0.5),
        # It says right from wrong itself.
        "cosine": _group("cosine") | {"reward.parts": {"gsm8k": 0.0}},
        "alp": _group("alp"),
        "linear": _group("linear"),
        "gr3": _group("gr3"),
        "grlc": _group("grlc"),
        "laser": _group("laser", target=target),
        "leash": _group("leash", target=target),
        "lie": _group("lie_here", function=function),
    }


def _group(name, weight=1.0, **options):
    return {"reward.group": {name: weight}, "reward.group_options": {name: options}}


_SAMPLES = {
    "gfpo": {"shaping.gfpo_keep": 4},  # of 8, the method's half
    "overlong": {
        "reward.parts": {"gsm8k": 1.0, "overlong": 1.0},
        "reward.options": {"overlong": {"buffer": 12, "factor": 0.3}},
        "eval.metric": "gsm8k",
    },
}


def member(task: str, name: str) -> str:
    """Returns the name of a task's cell among the variants."""
    return f"{task}, {name}"


def tuning(
    *,
    steps: int = TUNING_STEPS,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = TUNING_SEEDS,
) -> Sweep:
    """Returns the sweep of each rate group's cells at every rate, on both tasks."""
    return Sweep(
        base=quickstart_runs.BASE,
        fixed=FIXED | {"num_steps": steps},
        members={
            tuning_member(task, name, rate): TASKS[task]
            | cells(task)[name].fields
            | {"train.learning_rate": rate}
            for task in TASKS
            for group in RATE_GROUPS.values()
            for name in group
            for rate in rates
        },
        seeds=seeds,
        outcomes=quickstart_runs.HELD_OUT,
    )


def tuning_member(task: str, name: str, rate: float) -> str:
    """Returns the name of a cell at a rate among the variants of `tuning`."""
    return f"{member(task, name)}, {rate:g}"


def sweep(
    rates: Mapping[str, Mapping[str, float]],
    *,
    steps: int = STEPS,
    seeds: Sequence[int] = SEEDS,
) -> Sweep:
    """Returns the sweep of every control on both tasks, the most important first.

    Args:
      rates: task → rate group → learning rate.
      steps: of a run.
      seeds: of each cell.
    """
    found = {task: cells(task) for task in TASKS}
    order = dict.fromkeys(cell.kind for cell in found["sums"].values())
    return Sweep(
        base=quickstart_runs.BASE,
        fixed=FIXED | {"num_steps": steps},
        members={
            member(task, name): TASKS[task]
            | cell.fields
            | {"train.learning_rate": rates[task][cell.rates]}
            for kind in order
            for task in TASKS
            for name, cell in found[task].items()
            if cell.kind == kind
        },
        seeds=seeds,
        outcomes=OUTCOMES,
    )


def order(sweep: Sweep) -> list[str]:
    """Returns all members, block by block, in each the first seed of every cell and then the rest.

    Neighbours that share a program would compile it at the same time.
    """
    kinds: dict[str, list[Member]] = {}
    for each in spec.members(sweep):
        task, name = each.variant.name.split(", ", 1)
        kinds.setdefault(cells(task)[name].kind, []).append(each)
    return [
        each.name
        for block in kinds.values()
        for each in sorted(block, key=lambda each: each.seed != sweep.seeds[0])
    ]
