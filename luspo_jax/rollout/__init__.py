"""The sampling engine: prefill, decode, slots, refill; tokens in, tokens out."""

from luspo_jax.rollout.cache import Cache
from luspo_jax.rollout.engine import Engine
from luspo_jax.rollout.records import Request, Response, RolloutStats
from luspo_jax.rollout.sampling import Sampling

__all__ = ["Cache", "Engine", "Request", "Response", "RolloutStats", "Sampling"]
