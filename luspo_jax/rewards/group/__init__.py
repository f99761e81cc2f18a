"""Rewards of a group: of each response beside the others to its prompt, mostly by their lengths.

They are added to the rewards of single responses, in training alone.
"""

from luspo_jax.rewards.group.record import (
    TARGET,
    Dual,
    GroupReward,
    GroupRewardError,
    Peers,
)
from luspo_jax.rewards.group.registry import GROUP_REWARDS, group_reward
from luspo_jax.rewards.group.scorer import GroupScorer

__all__ = [
    "GROUP_REWARDS",
    "TARGET",
    "Dual",
    "GroupReward",
    "GroupRewardError",
    "GroupScorer",
    "Peers",
    "group_reward",
]
