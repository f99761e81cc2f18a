"""Rewards of a group by name."""

from collections.abc import Callable, Mapping
from typing import Any

from luspo_jax.rewards.group.limits import cosine, l1_exact, l1_max, laser, laser_d, leash, lie
from luspo_jax.rewards.group.record import GroupReward
from luspo_jax.rewards.group.relative import alp, gr3, grlc, kimi, linear
from luspo_jax.rewards.group.user import user_group_reward
from luspo_jax.rewards.registry import named

# Name → function that returns the reward for its options.
GROUP_REWARDS: dict[str, Callable[..., GroupReward]] = {
    "alp": alp,
    "cosine": cosine,
    "gr3": gr3,
    "grlc": grlc,
    "kimi": kimi,
    "l1_exact": l1_exact,
    "l1_max": l1_max,
    "laser": laser,
    "laser_d": laser_d,
    "leash": leash,
    "lie": lie,
    "linear": linear,
}


def group_reward(name: str, options: Mapping[str, Any] | None = None) -> GroupReward:
    """Returns the group reward of a registered name or of a user's `module:function`.

    Raises:
      ValueError: unknown name or option; the message lists the valid ones.
    """
    return named(name, options, GROUP_REWARDS, user_group_reward, "group reward")
