"""The sampling engine: tokens in, tokens out; prefill, then decode in slots that are refilled."""

from luspo_jax.rollout.engine import Engine
from luspo_jax.rollout.records import Request, Response, RolloutStats
from luspo_jax.rollout.sampling import Sampling

__all__ = ["Engine", "Request", "Response", "RolloutStats", "Sampling"]
