"""Paged attention in three lines: every page that a table can name is gathered and masked."""

import jax.numpy as jnp

from luspo_jax.ops.paged_attention import NEGATIVE, partial, scaled_groups
from luspo_jax.ops.pages import read


def attend(query_BNH, pages, layer, tables_BM, lengths_B, shared=None):
    """Attention over the first `lengths_B` entries; see `paged_attention.IMPLEMENTATIONS`."""
    del shared  # the tables name these pages too
    query_BKGH = scaled_groups(query_BNH, pages.keys.shape[0])
    keys_KBSH, values_KBSH = (read(x, layer, tables_BM, query_BNH.dtype) for x in pages)
    scores_BKGS = jnp.einsum(
        "BKGH,KBSH->BKGS", query_BKGH, keys_KBSH, preferred_element_type=jnp.float32
    )
    seen_BS = jnp.arange(scores_BKGS.shape[-1])[None] < lengths_B[:, None]
    scores_BKGS = jnp.where(seen_BS[:, None, None], scores_BKGS, NEGATIVE)
    top_BKG = jnp.max(scores_BKGS, axis=-1)
    weights_BKGS = jnp.where(seen_BS[:, None, None], jnp.exp(scores_BKGS - top_BKG[..., None]), 0.0)
    weighted_BKGH = jnp.einsum(
        "BKGS,KBSH->BKGH",
        weights_BKGS.astype(values_KBSH.dtype),
        values_KBSH,
        preferred_element_type=jnp.float32,
    )
    return partial(query_BNH, top_BKG, jnp.sum(weights_BKGS, axis=-1), weighted_BKGH)
