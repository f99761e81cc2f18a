"""Design of the study: types of the sampler's weights, with and without correction."""

import dataclasses

from experiments.studies import quickstart_runs
from experiments.sweeps.spec import Outcome, Sweep

SEEDS = (0, 1, 2)
STEPS = 40
TYPES = ("float32", "bfloat16", "int8")
CORRECTIONS = ("none", "tis")  # truncated importance sampling, a weight a token

# The trainer computes in float32 throughout: what differs from it is the sampler's.
FIXED = {
    "rollout.mismatch_limit": 10.0,  # reported here, and not refused
    "eval.every": 10,
    **quickstart_runs.METRICS_ALONE,
}

OUTCOMES = (
    Outcome("accuracy area", "val-core/*", "auc"),
    Outcome("last accuracy", "val-core/*"),
    Outcome("reward", "reward", "mean"),
    Outcome("last length", "response_length/mean"),
    Outcome("last entropy", "actor/entropy"),
    Outcome("largest gap, first step", "rollout_corr/max_abs_diff", "first"),
    Outcome("largest gap of the run", "rollout_corr/max_abs_diff", "max"),
    Outcome("k3 KL(sampler, trainer)", "rollout_corr/k3_kl", "mean"),
)


def sweep(*, steps: int = STEPS, seeds: tuple[int, ...] = SEEDS) -> Sweep:
    """Returns the sweep of every type with and without correction, against float32."""
    return Sweep(
        base=quickstart_runs.BASE,
        fixed=FIXED | {"num_steps": steps},
        axes={
            "weights": {kind: {"model.rollout_dtype": kind} for kind in TYPES},
            "correction": {name: {"objective.correction": name} for name in CORRECTIONS},
        },
        seeds=seeds,
        baseline={"weights": "float32"},
        outcomes=OUTCOMES,
    )


def of_correction(sweep: Sweep) -> Sweep:
    """Returns the same sweep, each run compared with the one without correction."""
    return dataclasses.replace(sweep, baseline={"correction": "none"})
