"""Design of the study: how steps end, objectives, corrections, and the devices of each run."""

from collections.abc import Sequence

from experiments.studies.quickstart_runs import BASE, CLIPPED, HELD_OUT, METRICS_ALONE, TASKS
from experiments.sweeps.spec import Outcome, Sweep

SEEDS = (0, 1, 2, 3, 4)
STEPS = 24
PROMPTS = 32  # of a step

SYNCHRONOUS, AHEAD = "synchronous", "one step off"
MODES = {
    SYNCHRONOUS: {},
    "waiting": {"rollout.overlap": PROMPTS, "rollout.max_age": 2},
    "dropping": {"rollout.overlap": PROMPTS, "rollout.late": "drop"},
    AHEAD: {"rollout_mesh.apart": 1, "rollout.max_age": 1},
}
OBJECTIVES = {name: {"objective.preset": name.lower()} for name in ("GSPO", "LUSPO", "GRPO")}
# With a correction: else the old log-prob of a stale token is the sampler's, and none is needed.
CORRECTED = {"objective.old_policy": "decoupled"}
NONE = "none"
CORRECTIONS = {
    NONE: {},
    "tis": {"objective.correction": "tis", **CORRECTED},
    "mask": {"objective.correction": "geometric-mask", **CORRECTED},
}

FIXED = {
    # The quickstart's 128 responses in groups of four: a group is complete when its longest
    # response is, and among eight one is nearly always as long as any.
    "rollout.prompts_per_step": PROMPTS,
    "rollout.group_size": 4,
    # All that are in flight are decoded: none is old only because it waited for a slot.
    "rollout.num_slots": 256,
    "rollout.chunk_length": 4,
    "eval.every": 6,
    "eval.num_problems": 250,
    "eval.num_samples": 2,
    **METRICS_ALONE,
}

OUTCOMES = (
    *HELD_OUT,
    Outcome("length trained on", "response_length/mean", "mean"),
    Outcome("consumed", "length/account/window/consumed_mean", "mean"),
    Outcome("sampled", "length/account/window/sampled_mean", "mean"),
    Outcome("consumed / sampled - 1", "length/account/window/relative_difference", "mean"),
    Outcome("mean age", "rollout/age/mean", "mean"),
    Outcome("fresh tokens", "staleness/share/age_0", "mean"),
    Outcome("ess, age 1", "staleness/ess/age_1", "mean"),
    CLIPPED,
    Outcome("k3 KL(sampler, trainer)", "rollout_corr/k3_kl", "mean"),
)


def sweep(
    task: str = "sums",
    *,
    steps: int = STEPS,
    seeds: Sequence[int] = SEEDS,
    objectives: Sequence[str] = tuple(OBJECTIVES),
    corrections: Sequence[str] = tuple(CORRECTIONS),
) -> Sweep:
    """Returns the sweep of every mode, objective and correction against synchronous steps.

    Args:
      task: of TASKS.
      steps: of a run.
      seeds: of each cell.
      objectives: of OBJECTIVES.
      corrections: of CORRECTIONS.
    """
    return Sweep(
        base=BASE,
        fixed=FIXED | TASKS[task] | {"num_steps": steps},
        axes={
            "mode": MODES,
            "objective": {name: OBJECTIVES[name] for name in objectives},
            "correction": {name: CORRECTIONS[name] for name in corrections},
        },
        seeds=seeds,
        baseline={"mode": SYNCHRONOUS},
        outcomes=OUTCOMES,
    )


REAL_PROMPTS = 4  # of a step


def real() -> Sweep:
    """Returns the same modes on a real model in a few small steps, for LUSPO alone.

    One corrected cell of each mode in which there is something to correct: `real_members`.
    """
    modes = {name: dict(fields) for name, fields in MODES.items()}
    for fields in modes.values():
        if "rollout.overlap" in fields:
            fields["rollout.overlap"] = REAL_PROMPTS
    small = {
        "num_steps": 12,
        "rollout.prompts_per_step": REAL_PROMPTS,
        "rollout.group_size": 4,
        "rollout.num_slots": 32,
        "rollout.chunk_length": 4,
        "train.warmup_steps": 0,
        "eval.every": 12,
        "eval.num_problems": 100,
        "output.dump_every": 0,
    }
    return Sweep(
        base="configs/smollm2_135m_chain_sum.py",
        fixed=FIXED | small,
        axes={
            "mode": modes,
            "objective": {"LUSPO": OBJECTIVES["LUSPO"]},
            "correction": {name: CORRECTIONS[name] for name in (NONE, "tis")},
        },
        seeds=(0, 1),
        baseline={"mode": SYNCHRONOUS},
        outcomes=OUTCOMES,
    )


def real_members() -> list[str]:
    """Returns the variants of `real` that are run."""
    plain = [cell(mode, "LUSPO", NONE) for mode in MODES]
    return plain + [cell(mode, "LUSPO", "tis") for mode in ("waiting", AHEAD)]


def smoke(task: str = "sums") -> Sweep:
    """Returns a sweep of every mode in a few steps."""
    return sweep(task, steps=3, seeds=(0,), objectives=("LUSPO",), corrections=(NONE, "tis"))


def cell(mode: str, objective: str, correction: str) -> str:
    """Returns the name of a variant."""
    return f"{mode},{objective},{correction}"


def devices(variant: str) -> int:
    """Returns the devices that a variant's runs have: one samples apart, if any does.

    The others have one device and not two, so that no number depends on it.
    """
    return 2 if variant.split(",")[0] == AHEAD else 1
