"""Design of the study: objectives on drawn images, controls, and their sweeps."""

from collections.abc import Mapping

from experiments.studies.quickstart_runs import LENGTH, METRICS_ALONE, TUNING_SEEDS
from experiments.sweeps.spec import Outcome, Sweep

SEEDS = (0, 1, 2, 3, 4)
RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
STEPS = 40
REFERENCE_LENGTH = 14.5  # tokens; mean of the embedded base

_WIDE = {"objective.clip_low": 2e-3, "objective.clip_high": 2.5e-3}  # LUSPO's own range
_PUBLISHED = {name: {"objective.preset": name.lower()} for name in ("GRPO", "GSPO", "LUSPO")}

# Cells with tuned learning rates: as published, and steps that separate LUSPO from GSPO.
TUNED = {
    **_PUBLISHED,
    "GSPO wide": {"objective.preset": "gspo", **_WIDE},
    "LUSPO/L_ref": {
        "objective.preset": "luspo",
        "objective.length_scale": "power",
        "objective.reference_length": REFERENCE_LENGTH,
    },
}

# Name → (the cell that it changes and whose rate it uses, fields).
CONTROLS = {
    "GSPO, tower frozen": ("GSPO", {"train.freeze_vision": True}),
    "LUSPO, tower frozen": ("LUSPO", {"train.freeze_vision": True}),
    "LUSPO, blank images": ("LUSPO", {"data.blank_images": True}),
}

TINY_RUN = {
    "num_steps": STEPS,
    "train.warmup_steps": 2,
    "eval.every": 5,
    "eval.num_problems": 128,
    "eval.num_samples": 4,
    **METRICS_ALONE,
}
# Pressure of every update taken, by all responses of the next rollout.
MEASURED = {"length.every": 1, "length.share": 1.0}

OUTCOMES = (
    Outcome("accuracy area", "val-core/*", "auc"),
    Outcome("accuracy", "val-core/*"),
    Outcome("length area", LENGTH, "auc"),
    Outcome("length change", LENGTH, "change"),
    Outcome("length", LENGTH),
    Outcome("clipped A>0", "actor/clipfrac/pos", "mean"),
    Outcome("clipped A<0", "actor/clipfrac/neg", "mean"),
    Outcome("|s-1|", "actor/ratio_deviation", "mean"),
    Outcome("pressure taken", "length/pressure/taken", "mean"),
    Outcome("pressure own A>0", "length/pressure/own/pos", "mean"),
    Outcome("pressure own A<0", "length/pressure/own/neg", "mean"),
    Outcome("entropy", "actor/entropy"),
)


def cells(rates: Mapping[str, float]) -> dict[str, dict]:
    """Returns name → fields, at the learning rates of the tuned cells."""
    found = {name: fields | {"train.learning_rate": rates[name]} for name, fields in TUNED.items()}
    return found | {name: found[cell] | fields for name, (cell, fields) in CONTROLS.items()}


def tuning() -> Sweep:
    """Returns the sweep of every tuned cell at every rate, on its own seeds."""
    return Sweep(
        base="configs/quickstart_vl.py",
        fixed=TINY_RUN | {"eval.every": 0, "eval.num_problems": 32, "eval.num_samples": 1},
        axes={
            "objective": TUNED,
            "rate": {f"{rate:g}": {"train.learning_rate": rate} for rate in RATES},
        },
        seeds=TUNING_SEEDS,
        outcomes=(Outcome("reward area", "reward", "auc"),),
    )


def main(rates: Mapping[str, float]) -> Sweep:
    """Returns the sweep of every cell with every seed."""
    return Sweep(
        base="configs/quickstart_vl.py",
        fixed=TINY_RUN | MEASURED,
        axes={"objective": cells(rates)},
        seeds=SEEDS,
        baseline={"objective": "GSPO"},
        outcomes=OUTCOMES,
    )
