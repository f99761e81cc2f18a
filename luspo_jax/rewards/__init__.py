"""Verifiers, one file each, with their shared records, registry and scorer.

Nothing here imports jax, because worker processes import this package.
"""

from luspo_jax.rewards.record import STATUSES, Reward, Sample, Verdict, Verifier
from luspo_jax.rewards.registry import REWARDS, score, verifier
from luspo_jax.rewards.scorer import Scorer, TooManyFailures

__all__ = [
    "REWARDS",
    "STATUSES",
    "Reward",
    "Sample",
    "Scorer",
    "TooManyFailures",
    "Verdict",
    "Verifier",
    "score",
    "verifier",
]
