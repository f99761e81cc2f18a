"""Paged attention for CPUs: a few rows and a run of pages at a time, which stay near the core.

Pages that several rows share are first read once for all of these rows: a matrix of their queries
in place of one vector each. Sort the rows by length: a block reads as far as its longest.
"""

import jax.numpy as jnp
from jax import lax

from luspo_jax.ops.paged_attention import NEGATIVE, most_groups, partial, scaled_groups
from luspo_jax.ops.pages import read

# Measured on two AVX-512 cores at B 128, K 3, G 3, H 64, L 30, 230 entries a row: 8 rows by a page
# of 64 entries; of several smaller pages at a time, a run takes half as long again. One row is read
# 512 entries at a time: up to 4,000 of them (K 4, G 2, H 32, L 4), a step takes 2.6 ms, not 4.4.
_ROWS = 8
_ENTRIES = 512  # of all rows of a block together


def attend(query_BNH, pages, layer, tables_BM, lengths_B, shared=None):
    """Attention over the first `lengths_B` entries; see `paged_attention.IMPLEMENTATIONS`."""
    S = pages.size
    query_BKGH = scaled_groups(query_BNH, pages.keys.shape[0])
    state = _nothing(query_BKGH)
    if shared is not None:
        state = _over_groups(query_BKGH, pages, layer, shared, state)
        tables_BM, lengths_B = shared.tables_BM, lengths_B - shared.skipped_B * S
    return partial(query_BNH, *_over_rows(query_BKGH, pages, layer, tables_BM, lengths_B, state))


def _over_rows(query_BKGH, pages, layer, tables_BM, lengths_B, state):
    """Adds each row's own pages, a block of rows after the other."""
    B = query_BKGH.shape[0]
    R = min(_ROWS, B)
    rest = -B % R
    arrays = (query_BKGH, tables_BM, lengths_B, *state)
    split = [
        jnp.pad(x, [(0, rest)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, R, *x.shape[1:])
        for x in arrays
    ]

    def block(parts):
        query_RKGH, tables_RM, lengths_R, *state = parts
        return _walked(query_RKGH, pages, layer, tables_RM, lengths_R, tuple(state))

    joined = lax.map(block, tuple(split))
    return tuple(x.reshape(-1, *x.shape[2:])[:B] for x in joined)


def _over_groups(query_BKGH, pages, layer, shared, state):
    """Adds the pages that rows share: to a group, its members' queries are one row's."""
    B, K, G, H = query_BKGH.shape
    W = shared.members_BW.shape[1]
    Q = most_groups(B, W)

    def added(state):
        query_QWKGH = jnp.take(query_BKGH, shared.members_BW[:Q], axis=0, mode="clip")
        query_QKGH = query_QWKGH.swapaxes(1, 2).reshape(Q, K, W * G, H)
        tables_QM, entries_Q = shared.group_tables_BM[:Q], shared.group_pages_B[:Q] * pages.size
        found = _over_rows(query_QKGH, pages, layer, tables_QM, entries_Q, _nothing(query_QKGH))
        here_B = shared.places_B >= 0

        def of_rows(x_QKG, own_BKG):
            tail = x_QKG.shape[3:]
            by_row = x_QKG.reshape(Q, K, W, G, *tail).swapaxes(1, 2).reshape(Q * W, K, G, *tail)
            taken = jnp.take(by_row, shared.places_B, axis=0, mode="clip")
            return jnp.where(here_B.reshape(B, *[1] * (taken.ndim - 1)), taken, own_BKG)

        return tuple(of_rows(x, own) for x, own in zip(found, state, strict=True))

    return lax.cond(jnp.any(shared.group_pages_B > 0), added, lambda state: state, state)


def _nothing(query_RKGH):
    """The sums before anything is added: largest score, Σ exp, Σ exp · value."""
    R, K, G, H = query_RKGH.shape
    return (
        jnp.full((R, K, G), NEGATIVE, jnp.float32),
        jnp.zeros((R, K, G), jnp.float32),
        jnp.zeros((R, K, G, H), jnp.float32),
    )


def _walked(query_RKGH, pages, layer, tables_RM, lengths_R, state):
    """Adds entries 0 … lengths of a few rows to their sums, a run of pages after the other."""
    S = pages.size
    run = max(1, min(_ENTRIES // (S * tables_RM.shape[0]), tables_RM.shape[1]))
    tables_RM = jnp.pad(tables_RM, ((0, 0), (0, -tables_RM.shape[1] % run)))
    query_KRGH = query_RKGH.swapaxes(0, 1)

    def step(i, state):
        top, total, weighted = state
        tables_Rr = lax.dynamic_slice_in_dim(tables_RM, i * run, run, axis=1)
        keys_KRSH, values_KRSH = (read(x, layer, tables_Rr, query_RKGH.dtype) for x in pages)
        scores = jnp.einsum(
            "KRGH,KRSH->RKGS", query_KRGH, keys_KRSH, preferred_element_type=jnp.float32
        )
        seen_RS = i * run * S + jnp.arange(run * S)[None] < lengths_R[:, None]
        scores = jnp.where(seen_RS[:, None, None], scores, NEGATIVE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # A row that has seen nothing yet has top −1e30 and weights 1: they are multiplied by 0 once
        # it sees something, and masked until then.
        weights = jnp.where(seen_RS[:, None, None], jnp.exp(scores - new_top[..., None]), 0.0)
        kept = jnp.exp(top - new_top)
        values = jnp.einsum(
            "RKGS,KRSH->RKGH",
            weights.astype(values_KRSH.dtype),
            values_KRSH,
            preferred_element_type=jnp.float32,
        )
        total = total * kept + jnp.sum(weights, axis=-1)
        return new_top, total, weighted * kept[..., None] + values

    steps = -(-jnp.max(lengths_R) // (run * S))
    return lax.fori_loop(0, steps, step, state)
