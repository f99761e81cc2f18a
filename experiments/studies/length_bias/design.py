"""Design of the study: objectives, controls, tasks, bases, and their sweeps."""

import pathlib
from collections.abc import Mapping, Sequence

from experiments.studies import quickstart_runs
from experiments.studies.quickstart_runs import TUNING_SEEDS
from experiments.sweeps.spec import Outcome, Sweep

TASKS = ("sums", "lookup")  # longer reasoning helps in sums, not in lookup
BASES = ("base 0", "base 1")
SEEDS = (0, 1, 2, 3, 4)
RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
STEPS = 25
DATASET = {"sums": "label_sums", "lookup": "label_lookup"}

# Clip ranges: GSPO's own, LUSPO's own, none.
CLIPS = {
    "tight": {"objective.clip_low": 3e-4, "objective.clip_high": 4e-4},
    "wide": {"objective.clip_low": 2e-3, "objective.clip_high": 2.5e-3},
    "none": {"objective.surrogate": "unclipped"},
}
NEVER_LOW, NEVER_HIGH = 1.0, 1e6  # bounds that no sequence ratio reaches

TINY_RUN = {
    "num_steps": STEPS,
    "train.warmup_steps": 2,
    "eval.every": 5,
    "eval.num_problems": 128,
    **quickstart_runs.METRICS_ALONE,
}

OUTCOMES = (
    Outcome("accuracy area", "val-core/*", "auc"),
    Outcome("length area", "val-aux/*/response_length/mean", "auc"),
    Outcome("accuracy", "val-core/*"),
    Outcome("length", "val-aux/*/response_length/mean"),
    Outcome(
        "length at accuracy",
        "val-aux/*/response_length/mean",
        "at",
        where="val-core/*",
        level=0.65,
    ),
    Outcome("clipped", "actor/pg_clipfrac", "mean"),
    Outcome("clipped A>0", "actor/clipfrac/pos", "mean"),
    Outcome("clipped A<0", "actor/clipfrac/neg", "mean"),
    Outcome("|s-1|", "actor/ratio_deviation", "mean"),
    Outcome("grad clip", "actor/grad_clip_rate", "mean"),
    Outcome("flat groups", "frac_reward_zero_std", "mean"),
)


def factorial(task: str) -> dict[str, dict]:
    """Returns {GSPO, LUSPO, LUSPO/L_ref} × {tight, wide, none}, and GRPO."""
    weightings = {
        "GSPO": {"objective.preset": "gspo"},
        "LUSPO": {"objective.preset": "luspo"},
        "LUSPO/L_ref": {
            "objective.preset": "luspo",
            "objective.length_scale": "power",
            "objective.reference_length": quickstart_runs.REFERENCE_LENGTH[task],
        },
    }
    settings = {
        f"{name} {clip}": {**weighting, **fields}
        for name, weighting in weightings.items()
        for clip, fields in CLIPS.items()
    }
    return settings | {"GRPO": {"objective.preset": "grpo"}}


# Controls and extensions: name → (the factorial's cell that it changes and whose learning rate it
# uses, fields).
CONTROLS: Mapping[str, tuple[str, dict]] = {
    "GSPO wide, token mean": ("GSPO wide", {"objective.aggregation": "token-mean"}),
    "GSPO wide, no gradient clip": ("GSPO wide", {"train.max_grad_norm": 0.0}),
    "LUSPO wide, no gradient clip": ("LUSPO wide", {"train.max_grad_norm": 0.0}),
    "GSPO tight, A+ clipped": ("GSPO tight", {"objective.clip_low": NEVER_LOW}),
    "GSPO tight, A- clipped": ("GSPO tight", {"objective.clip_high": NEVER_HIGH}),
    "LUSPO wide, A+ clipped": ("LUSPO wide", {"objective.clip_low": NEVER_LOW}),
    "LUSPO wide, A- clipped": ("LUSPO wide", {"objective.clip_high": NEVER_HIGH}),
    "VL-Norm 0.75 wide": (
        "LUSPO wide",
        {"objective.length_scale": "vl-norm", "objective.length_alpha": 0.75},
    ),
    "VL-Norm 1 wide": (
        "LUSPO wide",
        {"objective.length_scale": "vl-norm", "objective.length_alpha": 1.0},
    ),
    "LUSPO wide, OPO baseline": ("LUSPO wide", {"objective.advantage": "opo"}),
    "adaptive, pressure to zero": (
        "LUSPO/L_ref wide",
        {
            "objective.length_scale": "adaptive",
            "length.every": 2,
            "length.share": 0.5,
            "length.steer": "pressure",
            "length.alpha_rate": 0.3,
            "length.alpha_low": -2.0,
        },
    ),
    "adaptive, band": (
        "LUSPO/L_ref wide",
        {
            "objective.length_scale": "adaptive",
            "length.steer": "band",
            "length.target_low": 14.0,
            "length.target_high": 16.0,
            "length.every": 2,
            "length.share": 0.5,
            "length.alpha_rate": 0.3,
            "length.alpha_low": -2.0,
        },
    ),
    "LUSPO wide, dynamic sampling": ("LUSPO wide", {"shaping.dynamic_sampling": True}),
    "LUSPO, SAPO gate": ("LUSPO none", {"objective.surrogate": "sapo"}),
    "LUSPO wide, overlong penalty": (
        "LUSPO wide",
        {
            "reward.parts": {"gsm8k": 1.0, "overlong": 1.0},
            "reward.options": {"overlong": {"buffer": 12, "factor": 0.3}},
            "eval.metric": "gsm8k",
        },
    ),
}

_FUNCTIONS = "experiments.studies.length_bias.rewards"
ENVIRONMENTS = ("sparse reward", "strict reward", "skewed lengths")
ENVIRONMENT_CELLS = ("GSPO tight", "GSPO wide", "LUSPO wide", "LUSPO/L_ref wide", "GRPO")
SMALL_RATE = 2e-4  # the quickstart's
PREDICTED = ("GSPO tight", "LUSPO wide", "GRPO")


def base_path(task: str, base: str, bases: pathlib.Path) -> str:
    """Returns the path of the embedded model, or of the one that the study has trained."""
    if base == "base 0":
        return f"embedded:{DATASET[task]}"
    suffix = "skewed" if base == "skewed" else "1"
    return str(bases / f"{DATASET[task]}_{suffix}")


def _where(tasks, bases_named, bases):
    return {
        f"{task}, {base}": {
            "data.name": DATASET[task],
            "model.path": base_path(task, base, bases),
        }
        for task in tasks
        for base in bases_named
    }


def tuning(task: str, bases: pathlib.Path) -> Sweep:
    """Returns the sweep of every cell at every rate, on its own seeds."""
    return Sweep(
        base=quickstart_runs.BASE,
        fixed=TINY_RUN | {"eval.every": 0, "eval.num_problems": 32},
        axes={
            "where": _where([task], ["base 0"], bases),
            "objective": factorial(task),
            "rate": {f"{rate:g}": {"train.learning_rate": rate} for rate in RATES},
        },
        seeds=TUNING_SEEDS,
        outcomes=(Outcome("reward area", "reward", "auc"),),
    )


def main(task: str, rates: Mapping[str, float], bases: pathlib.Path) -> Sweep:
    """Returns the sweep of the factorial and the controls on both bases."""
    return Sweep(
        base=quickstart_runs.BASE,
        fixed=TINY_RUN,
        axes={"where": _where([task], BASES, bases), "objective": _settings(task, rates)},
        seeds=SEEDS,
        baseline={"objective": "GSPO tight"},
        outcomes=OUTCOMES,
    )


def environments(rates: Mapping[str, float], bases: pathlib.Path) -> Sweep:
    """Returns the sweep of stricter rewards and another length spread, where length helps."""
    settings = _settings("sums", rates)
    rewards = {
        name: {
            "reward.parts": {"gsm8k": 0.0, name: 1.0},
            "reward.options": {name: {"function": f"{_FUNCTIONS}:{name}"}},
            "eval.metric": "gsm8k",
        }
        for name in ("sparse", "strict")
    }
    here = _where(["sums"], ["base 0"], bases)["sums, base 0"]
    skewed = _where(["sums"], ["skewed"], bases)["sums, skewed"]
    return Sweep(
        base=quickstart_runs.BASE,
        fixed=TINY_RUN,
        axes={
            "where": {
                "sparse reward": here | rewards["sparse"],
                "strict reward": here | rewards["strict"],
                "skewed lengths": skewed,
            },
            "objective": {name: settings[name] for name in ENVIRONMENT_CELLS},
        },
        seeds=SEEDS,
        baseline={"objective": "GSPO tight"},
        outcomes=OUTCOMES,
    )


def prediction(
    task: str,
    rates: Mapping[str, float],
    bases: pathlib.Path,
    *,
    rate: float | None = None,
    seeds: Sequence[int] = SEEDS,
) -> Sweep:
    """Returns the sweep of length pressure per update, on all groups, with finer evaluation.

    It uses the tuned rates, or one `rate` for all: pressure is a first-order quantity.
    """
    settings = _settings(task, rates if rate is None else dict.fromkeys(rates, rate))
    measured = {
        "length.every": 1,
        "length.share": 1.0,
        "eval.num_problems": 500,
        "eval.num_samples": 8,
    }
    return Sweep(
        base=quickstart_runs.BASE,
        fixed=TINY_RUN | measured,
        axes={
            "where": _where([task], BASES, bases),
            "objective": {name: settings[name] for name in PREDICTED},
        },
        seeds=seeds,
        outcomes=(Outcome("pressure", "length/pressure/taken", "mean"),),
    )


def _settings(task, rates):
    cells = factorial(task)
    found = {name: fields | {"train.learning_rate": rates[name]} for name, fields in cells.items()}
    for name, (parent, fields) in CONTROLS.items():
        extra = dict(fields)
        if task == "lookup" and "length.target_low" in extra:
            extra |= {"length.target_low": 11.0, "length.target_high": 13.0}
        found[name] = found[parent] | extra
    return found
