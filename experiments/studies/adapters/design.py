"""Design of the study: what is trained, objectives, how learning rates are tuned, the sweeps."""

from collections.abc import Mapping, Sequence

from experiments.studies import quickstart_runs
from experiments.studies.quickstart_runs import TUNING_SEEDS
from experiments.sweeps.spec import Outcome, Sweep

SEEDS = (0, 1, 2, 3, 4)
STEPS, TUNING_STEPS = 40, 24
FULL = "full"
# The same scale of A · B at every rank, as alpha / rank divides the sum of rank terms; the base in
# the trainer's own type, so that what differs is what is trained.
WEIGHTS = {FULL: {"lora.rank": 0}} | {
    f"rank {rank}": {"lora.rank": rank, "lora.alpha": 32.0, "lora.base": "float32"}
    for rank in (32, 8, 1)
}
OBJECTIVES = {name: {"objective.preset": name.lower()} for name in ("LUSPO", "GSPO")}
RATES = {FULL: (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)} | {
    name: (5e-4, 1e-3, 2e-3, 4e-3, 8e-3) for name in WEIGHTS if name != FULL
}

FIXED = {
    **quickstart_runs.METRICS_ALONE,
    "eval.every": 8,
    "eval.num_problems": 250,
    "eval.num_samples": 2,
}

OUTCOMES = (
    *quickstart_runs.HELD_OUT,
    Outcome("reward", "reward", "mean"),
    Outcome("length trained on", "response_length/mean", "mean"),
    Outcome("corr(A, L)", "length/advantage_corr", "mean"),
    Outcome("last entropy", "actor/entropy"),
    quickstart_runs.CLIPPED,
)

Rates = Mapping[str, Mapping[str, float]]  # objective → what is trained → learning rate


def tuning_member(objective: str, weights: str, rate: float) -> str:
    """Returns the name of a cell at a rate among the variants of `tuning`."""
    return f"{objective}, {weights}, {rate:g}"


def tuning(*, steps: int = TUNING_STEPS, seeds: Sequence[int] = TUNING_SEEDS) -> Sweep:
    """Returns the sweep of each cell at every rate, on seeds that the study has not."""
    return Sweep(
        base=quickstart_runs.BASE,
        fixed=FIXED | {"num_steps": steps},
        members={
            tuning_member(objective, weights, rate): fields
            | WEIGHTS[weights]
            | {"train.learning_rate": rate}
            for objective, fields in OBJECTIVES.items()
            for weights, rates in RATES.items()
            for rate in rates
        },
        seeds=seeds,
        outcomes=quickstart_runs.HELD_OUT,
    )


def sweeps(rates: Rates, *, steps: int = STEPS, seeds: Sequence[int] = SEEDS) -> dict[str, Sweep]:
    """Returns objective → sweep of what is trained, each at its rate, against full weights."""
    return _sweeps(rates, quickstart_runs.BASE, FIXED | {"num_steps": steps}, seeds)


# Of the real model nothing is tuned: full weights have the configuration's rate, adapters ten times
# it, which "LoRA Without Regret" (Thinking Machines Lab, 2025) found best over many models.
REAL_RATES = {
    objective: {weights: 2e-5 if weights == FULL else 2e-4 for weights in WEIGHTS}
    for objective in OBJECTIVES
}


def real(*, steps: int = 16, seeds: Sequence[int] = (0,)) -> dict[str, Sweep]:
    """Returns the same sweeps on a real model, in a few steps."""
    few = {"eval.every": steps, "eval.num_problems": 200, "eval.num_samples": 1}
    base = "configs/smollm2_135m_chain_sum.py"
    return _sweeps(REAL_RATES, base, FIXED | few | {"num_steps": steps}, seeds)


def _sweeps(rates, base, fixed, seeds):
    return {
        objective: Sweep(
            base=base,
            fixed=fixed | fields,
            axes={
                "weights": {
                    weights: leaves | {"train.learning_rate": rates[objective][weights]}
                    for weights, leaves in WEIGHTS.items()
                }
            },
            seeds=seeds,
            baseline={"weights": FULL},
            outcomes=OUTCOMES,
        )
        for objective, fields in OBJECTIVES.items()
    }
