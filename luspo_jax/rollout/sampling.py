"""Draws tokens by inverse CDF from uniforms fixed by (seed, step, prompt, sample, position).

Two uniforms per token replace V Gumbels: the first chooses a block of the vocabulary, the second a
token within it. Both sums are short, so float32 stays accurate at V = 151,936, and a sample's noise
does not depend on slot, batch, chunk, mesh or restart.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are drawn and where they end; hashable, static under jit.

    Attributes:
      max_response_length: tokens after which a response is cut.
      stop_token_ids: every token that ends a response; it is part of the response.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: keep the smallest set of likeliest tokens whose probabilities reach it; 1 keeps all.
      top_k: keep the k likeliest tokens, before top_p; 0 keeps all.
    """

    max_response_length: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        object.__setattr__(self, "stop_token_ids", tuple(int(t) for t in self.stop_token_ids))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and >= 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 turns it off), not {self.top_k}")
        if self.max_response_length < 1:
            raise ValueError(f"max_response_length must be >= 1, not {self.max_response_length}")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must be >= 0, not {self.stop_token_ids}")


def seed_key(seed):
    """Returns the key of a run's noise."""
    return jax.random.key(seed, impl="threefry2x32")


def row_keys(key, steps_B, prompt_ids_B, sample_ids_B):
    """Returns fold_in(fold_in(fold_in(key, step), prompt), sample) of each row."""
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, steps_B)
    for ids_B in (prompt_ids_B, sample_ids_B):
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, ids_B)
    return keys_B


def uniforms(keys_B, positions_B):
    """Returns two uniforms in [0, 1) for the token of each row at `positions_B`: [B, 2].

    They are the two words of fold_in(key, position): Threefry of the position is random bits, and
    drawing from the folded key would run the cipher twice.
    """
    words_B2 = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys_B, positions_B))
    return (words_B2 >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def sample(logits_BV, uniforms_B2, *, sampling):
    """Draws one token per row, and returns its log-probability.

    log p(token) = (logits / temperature)[token] − logsumexp(logits / temperature), over the full
    vocabulary whatever top_p and top_k keep, and at temperature 1 for greedy sampling.

    Args:
      logits_BV: float32.
      uniforms_B2: float32 in [0, 1), without effect on greedy sampling.
      sampling: the Sampling.

    Returns:
      tokens_B int32, logprobs_B float32 ≤ 0.
    """
    if sampling.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        log_total_B = jax.nn.logsumexp(logits_BV, axis=-1)
        return tokens_B, _logprobs(logits_BV, tokens_B, log_total_B)
    scaled_BV = logits_BV * jnp.float32(1 / sampling.temperature)
    blocks_BXY = _blocks(scaled_BV)
    maximum_B = jnp.max(blocks_BXY, axis=(1, 2))
    masses_BX = _masses(blocks_BXY, maximum_B)
    log_total_B = maximum_B + jnp.log(jnp.sum(masses_BX, axis=-1))
    if sampling.top_k or sampling.top_p < 1:
        kept_BV = keep(scaled_BV, top_k=sampling.top_k, top_p=sampling.top_p)
        blocks_BXY = _blocks(jnp.where(kept_BV, scaled_BV, -jnp.inf))
        masses_BX = _masses(blocks_BXY, maximum_B)
    block_B = _inverse_cdf(masses_BX, uniforms_B2[:, 0])
    block_BY = jnp.take_along_axis(blocks_BXY, block_B[:, None, None], axis=1)[:, 0]
    weights_BY = jnp.exp(block_BY - jnp.max(block_BY, axis=-1, keepdims=True))
    tokens_B = block_B * blocks_BXY.shape[2] + _inverse_cdf(weights_BY, uniforms_B2[:, 1])
    return tokens_B, _logprobs(scaled_BV, tokens_B, log_total_B)


def block_size(vocab_size):
    """Returns the tokens per block: a power of two near √V, so that both levels are short sums."""
    return 1 << math.ceil(math.log2(vocab_size) / 2)


def keep(logits_BV, *, top_k=0, top_p=1.0):
    """Returns the mask [B, V] of the tokens that top-k and then top-p keep, never empty.

    Top-k keeps tokens at least as likely as the k-th, ties included. Among those, top-p keeps
    tokens from the likeliest down until their mass reaches top_p; of equally likely tokens at the
    edge, those of lower id. Both edges are found by bisection over the floats, which reads the
    logits 31 times and sorts nothing.
    """
    order_BV = _ordered(logits_BV)
    kept_BV = jnp.ones(logits_BV.shape, bool)
    if top_k:
        edge_B = _edge(order_BV, lambda mask_BV: jnp.sum(mask_BV, axis=-1) >= top_k)
        kept_BV = order_BV >= edge_B[:, None]
    if top_p < 1:
        maximum_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        weights_BV = jnp.where(kept_BV, jnp.exp(logits_BV - maximum_B1), 0.0)
        kept_BV &= _nucleus(order_BV, weights_BV, top_p)
    return kept_BV


def _nucleus(order_BV, weights_BV, top_p):
    def mass_B(mask_BV):
        return jnp.sum(jnp.where(mask_BV, weights_BV, 0.0), axis=-1)

    wanted_B = jnp.float32(top_p) * jnp.sum(weights_BV, axis=-1)
    edge_B = _edge(order_BV, lambda mask_BV: mass_B(mask_BV) >= wanted_B)
    above_BV, at_BV = order_BV > edge_B[:, None], order_BV == edge_B[:, None]
    weight_B = jnp.max(jnp.where(at_BV, weights_BV, 0.0), axis=-1)
    ties_B = jnp.ceil((wanted_B - mass_B(above_BV)) / weight_B)
    rank_BV = jnp.cumsum(at_BV.astype(jnp.float32), axis=-1)
    return above_BV | (at_BV & (rank_BV <= jnp.maximum(ties_B, 1.0)[:, None]))


def _edge(order_BV, enough):
    """Returns each row's largest int32 e with `enough(order_BV >= e)`, built bit by bit."""

    def reached(edge_B):
        return enough(order_BV >= edge_B[:, None])

    def body(i, edge_B):
        raised_B = edge_B + (jnp.int32(1) << (30 - i))
        return jnp.where(reached(raised_B), raised_B, edge_B)

    zeros_B = jnp.zeros(order_BV.shape[:1], jnp.int32)
    lowest = jnp.int32(np.iinfo(np.int32).min)
    return jax.lax.fori_loop(0, 31, body, jnp.where(reached(zeros_B), zeros_B, lowest))


def _ordered(array):
    """Returns int32 values in the order of the float32 `array`."""
    bits = jax.lax.bitcast_convert_type(array, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _blocks(logits_BV):
    """Returns [B, X, Y]: the vocabulary in X consecutive blocks of Y tokens, padded with −∞."""
    B, V = logits_BV.shape
    Y = block_size(V)
    padded = jnp.pad(logits_BV, ((0, 0), (0, -V % Y)), constant_values=-jnp.inf)
    return padded.reshape(B, -1, Y)


def _masses(blocks_BXY, maximum_B):
    return jnp.sum(jnp.exp(blocks_BXY - maximum_B[:, None, None]), axis=-1)


def _inverse_cdf(weights_BX, uniforms_B):
    """Returns each row's first index at which the running sum passes u times the total.

    Despite rounding, no index of zero weight is chosen, nor one past the end for u close to 1.
    """
    X = weights_BX.shape[1]
    running_sum = jnp.triu(jnp.ones((X, X), jnp.float32))  # one small matmul, not log X passes
    cdf_BX = jnp.dot(weights_BX, running_sum, precision=jax.lax.Precision.HIGHEST)
    possible_BX = weights_BX > 0
    total_B = jnp.max(jnp.where(possible_BX, cdf_BX, 0.0), axis=-1)
    below_B = jnp.nextafter(total_B, jnp.zeros_like(total_B))
    threshold_B = jnp.minimum(uniforms_B * total_B, below_B)
    return jnp.argmax(possible_BX & (cdf_BX > threshold_B[:, None]), axis=-1).astype(jnp.int32)


def _logprobs(logits_BV, tokens_B, log_total_B):
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return jnp.minimum(chosen_B - log_total_B, 0.0)
