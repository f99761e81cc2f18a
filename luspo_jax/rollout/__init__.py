"""The sampling engine: prefill, decode, slots, refill; tokens in, tokens out."""

from luspo_jax.rollout.sampling import Sampling

__all__ = ["Sampling"]
