"""The sampling engine: prefill, decode, slots, refill; tokens in, tokens out."""

from luspo_jax.rollout.engine import Engine
from luspo_jax.rollout.records import Request, Response, RolloutStats
from luspo_jax.rollout.sampling import Sampling

__all__ = ["Engine", "Request", "Response", "RolloutStats", "Sampling"]
