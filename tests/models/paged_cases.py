"""Prompts read into pages and continued token by token, for tests of the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.models import decoder
from luspo_jax.ops.paged_attention import Places
from luspo_jax.ops.paged_prefill import Runs

SIZE = 4  # tokens of a page


def on_pages(how):
    """The Forward with paged attention that every platform has."""
    return dataclasses.replace(how, paged_attention="reference")


def opened(how, rows, length, seed=0):
    """(empty pages, tables_BM) for rows of up to `length` tokens; pages lie in no order."""
    width = -(-length // SIZE)
    order = np.random.default_rng(seed).permutation(rows * width) + 1
    pages = decoder.empty_pages(how, rows * width + 1, SIZE)
    return pages, jnp.asarray(order.reshape(rows, width), jnp.int32)


def read(params, tokens_BT, lengths_B, pages, tables_BM, *, how, positions_BT=None, **images):
    """Pages with all but the last token of left-aligned rows."""
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    runs = Runs(tables_BM, jnp.zeros(B, jnp.int32), jnp.asarray(lengths_B) - 1)
    return decoder.prefill(params, tokens_BT, positions_BT, pages, runs, how=how, **images)[0]


def step(params, tokens_B, positions_B, pages, tables_BM, *, how, rotary_B=None):
    """(hidden states [B, D], pages) after one token a row."""
    places = Places(tables_BM, positions_B, jnp.ones(len(positions_B), bool))
    hidden_BD, pages, _ = decoder.decode_step(
        params, tokens_B, pages, places, how=how, positions_B=rotary_B
    )
    return hidden_BD, pages


def greedy(params, tokens_BT, lengths_B, *, how, count, after_B=None, **images):
    """Greedy continuations [B, count] of rows of different length.

    `after_B` is the rotary position of the first new token, if it is not its index.
    """
    how, (B, T) = on_pages(how), tokens_BT.shape
    kernel_VD, lengths_B = decoder.head_kernel(params), jnp.asarray(lengths_B)
    pages, tables_BM = opened(how, B, T + count)
    pages = read(params, tokens_BT, lengths_B, pages, tables_BM, how=how, **images)
    lag_B = 0 if after_B is None else after_B - lengths_B
    last_B = jnp.take_along_axis(jnp.asarray(tokens_BT), lengths_B[:, None] - 1, axis=1)[:, 0]

    def one(state, turn):
        token_B, pages = state
        at_B = lengths_B - 1 + turn
        hidden_BD, pages = step(
            params, token_B, at_B, pages, tables_BM, how=how, rotary_B=at_B + lag_B
        )
        token_B = jnp.argmax(hidden_BD @ kernel_VD.T, axis=-1).astype(jnp.int32)
        return (token_B, pages), token_B

    turns = jnp.arange(count, dtype=jnp.int32)
    return jax.lax.scan(one, (last_B, pages), turns)[1].T
