"""Design of the study: bases, objectives, replay, and their sweep."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping

from experiments.studies import quickstart_runs
from experiments.sweeps.spec import Outcome, Sweep

SEEDS = (0, 1, 2)
STEPS = 12
RATE, HARSH_RATE = 4e-4, 1.6e-3  # twice and eight times the quickstart's

TOKEN_LEVEL, SEQUENCE_LEVEL = ("grpo",), ("gspo", "luspo")  # unit of the ratio
OBJECTIVES = (*TOKEN_LEVEL, *SEQUENCE_LEVEL)
REPLAYS = ("none", "old", "sampler")  # none, R2, R3


@dataclasses.dataclass(frozen=True)
class Base:
    """A base policy: its name in tables, and its make_base flags; none if embedded."""

    name: str
    num_experts: int
    options: tuple[str, ...] = ()
    embedded: str = ""

    def path(self, bases: pathlib.Path) -> str:
        """Returns the model's folder, or its name inside the package."""
        folder = bases / self.name.replace(" ", "_")
        return f"embedded:{self.embedded}" if self.embedded else str(folder)


def _mixture(num_experts, count, width):
    """Returns a mixture; a token's experts are 96 wide together, like the embedded one's."""
    return Base(
        f"E{num_experts} top-{count}",
        num_experts,
        (
            f"--num_experts={num_experts}",
            f"--experts_per_token={count}",
            f"--expert_dim={width}",
            "--learning_rate=0.003",
        ),
    )


BASES = {
    base.name: base
    for base in (
        Base("dense", 0, embedded="label_sums"),
        Base("E8 top-2", 8, embedded="label_sums_moe"),
        _mixture(16, 2, 48),
        _mixture(16, 4, 24),
    )
}
MAIN = "E8 top-2"

# Far off-policy for a rollout step of 128 responses: eight updates. The sampler computes in
# bfloat16 and the trainer in float32, so that they route differently.
OFF_POLICY = {
    "num_steps": STEPS,
    "train.num_minibatches": 4,
    "train.num_epochs": 2,
    "train.warmup_steps": 2,
    "model.rollout_dtype": "bfloat16",
    "rollout.mismatch_limit": 2.0,
    "eval.every": 4,
    "eval.num_problems": 128,
    "eval.num_samples": 2,
    **quickstart_runs.METRICS_ALONE,
}

OUTCOMES = (
    Outcome("accuracy area", "val-core/*", "auc"),
    Outcome("accuracy", "val-core/*"),
    Outcome("token log-ratio²", "actor/log_ratio_squared/token", "mean"),
    Outcome("sequence log-ratio²", "actor/log_ratio_squared/sequence", "mean"),
    Outcome("clipped", "actor/pg_clipfrac", "mean"),
    Outcome("drift old→current", "router/agreement/old_current", "mean"),
    Outcome("drift sampler→old", "router/agreement/sampler_old", "mean"),
    Outcome("violation", "router/max_violation", "mean"),
    Outcome("entropy", "actor/entropy"),
    Outcome("largest mismatch", "rollout_corr/max_abs_diff", "max"),
)


def cells() -> dict[str, tuple[str, str, str, float]]:
    """Returns name → (base, objective, replay, learning rate), most important first."""
    plain, pair = ("none",), ("grpo", "luspo")
    others = [base for base in BASES if base not in ("dense", MAIN)]
    blocks = (
        ((MAIN,), pair, REPLAYS, (RATE,)),
        (("dense",), pair, plain, (RATE,)),
        (others, pair, plain, (RATE,)),
        ((MAIN,), pair, ("none", "old"), (HARSH_RATE,)),
        (("dense",), pair, plain, (HARSH_RATE,)),
        ((MAIN,), ("gspo",), ("none", "old"), (RATE,)),
    )
    chosen = [cell for block in blocks for cell in itertools.product(*block)]
    return {cell_name(*cell): cell for cell in chosen}


def cell_name(base: str, objective: str, replay: str, rate: float = RATE) -> str:
    """Returns the cell's name in tables."""
    return f"{base}, {objective}, {replay}" + ("" if rate == RATE else f", rate {rate:g}")


def sweep(bases: pathlib.Path, *, steps: int = STEPS, seeds: tuple[int, ...] = SEEDS) -> Sweep:
    """Returns the sweep of every cell with every seed."""
    return Sweep(
        base=quickstart_runs.BASE,
        fixed=OFF_POLICY | {"num_steps": steps},
        members={name: fields(*cell, bases) for name, cell in cells().items()},
        seeds=seeds,
        outcomes=OUTCOMES,
    )


def fields(base, objective, replay, rate, bases: pathlib.Path) -> Mapping[str, object]:
    """Returns the configuration fields that a cell sets."""
    return {
        "model.path": BASES[base].path(bases),
        "objective.preset": objective,
        "train.router_replay": replay,
        "train.learning_rate": rate,
    }
