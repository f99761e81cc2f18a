"""Ranks of a low-rank adapter against full weights, on the quickstart task.

Command : python -m experiments.sweep --sweep=configs/sweeps/lora_rank.py --workdir=/tmp/ranks \
            --parallel=2
Hardware: two CPU cores
"""

from experiments.sweeps.spec import Outcome, Sweep

FULL_RATE = 2e-4  # the quickstart's
LORA_RATE = 10 * FULL_RATE  # of A and B, as is usual


def _lora(rank):
    # The scale, alpha / rank, is 2 at every rank.
    return {
        "lora.rank": rank,
        "lora.alpha": 2.0 * rank,
        "lora.base": "float32",
        "train.learning_rate": LORA_RATE,
    }


def get_sweep():
    return Sweep(
        base="configs/quickstart.py",
        fixed={"num_steps": 40, "output.tensorboard": False, "output.export": False},
        axes={
            "rank": {
                "full": {"train.learning_rate": FULL_RATE},
                **{str(rank): _lora(rank) for rank in (1, 8, 32)},
            }
        },
        seeds=(0, 1, 2),
        baseline={"rank": "full"},
        outcomes=(
            Outcome("accuracy", "val-core/*"),
            Outcome("length", "val-aux/*/response_length/mean"),
            Outcome("accuracy curve", "reward", "auc"),
            Outcome("clipped", "actor/pg_clipfrac", "mean"),
        ),
    )
