"""Verifiers, one file each, and the records, the registry and the scorer they share.

Nothing here imports jax: the worker processes import this package.
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
