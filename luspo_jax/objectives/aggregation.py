"""Aggregations: reduce token losses to one number per optimizer step.

Each function is `f(lengths_B, *, hyperparameters) -> (divisor_B, denominator)`. The loss of a step
is Σ_i (w_i / divisor_i) Σ_t l_it / denominator, where w is the length scale and t runs over
response tokens only. A row's divisor depends on its own length alone; the denominator depends on
all rows of the step. Any split into micro-batches, padding width or row order gives the same sum.

A row without response tokens is never a sequence: it adds nothing to the loss and is not counted in
N. Tokens and rows that a correction drops still count.
"""

import jax
import jax.numpy as jnp


def _sequences(lengths_B: jax.Array) -> jax.Array:
    return (lengths_B > 0).astype(lengths_B.dtype).sum()


def seq_mean_token_mean(lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(1/N) Σ_i (1/L_i) Σ_t l_it (GRPO, GSPO; the only one that allows a length scale)."""
    return jnp.maximum(lengths_B, 1), _sequences(lengths_B)


def token_mean(lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ_i Σ_t l_it / Σ_i L_i over the whole optimizer step (DAPO, arXiv 2503.14476)."""
    return jnp.ones_like(lengths_B), lengths_B.sum()


def seq_mean_token_sum(lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(1/N) Σ_i Σ_t l_it: equal to the sequence mean with LUSPO's length scale."""
    return jnp.ones_like(lengths_B), _sequences(lengths_B)


def seq_mean_token_sum_norm(
    lengths_B: jax.Array, *, max_response_length: int
) -> tuple[jax.Array, jax.Array]:
    """(1/N) Σ_i Σ_t l_it / C, C the response length limit (Dr.GRPO, arXiv 2503.20783)."""
    return jnp.ones_like(lengths_B), _sequences(lengths_B) * max_response_length


def token_sum(lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ_i Σ_t l_it (MiniRL, arXiv 2512.01374)."""
    return jnp.ones_like(lengths_B), jnp.ones_like(lengths_B.sum())


AGGREGATIONS = {
    "seq-mean-token-mean": seq_mean_token_mean,
    "token-mean": token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-sum-norm": seq_mean_token_sum_norm,
    "token-sum": token_sum,
}
