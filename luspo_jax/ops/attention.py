"""Causal attention within segments, and its one-query form for decoding."""

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite, so that a query that sees no key yields finite values


def attention(
    query_BTNH,
    key_BSKH,
    value_BSKH,
    *,
    segment_ids_BT,
    implementation="reference",
):
    """softmax(q·k / √H) v over the keys of the same segment that are not in the future.

    Positions are array indices: S = T. Query head n reads key head n // (N / K). Softmax in
    float32.

    Args:
      query_BTNH: queries, already rotated.
      key_BSKH: keys, already rotated.
      value_BSKH: values.
      segment_ids_BT: int32, 0 on padding (whose outputs are finite and mean nothing).
      implementation: a key of IMPLEMENTATIONS.

    Returns:
      Weighted values [B, T, N, H] in the type of the values.

    Raises:
      ValueError: on an unknown implementation, naming the known ones.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown; "
            f"use one of {sorted(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation](query_BTNH, key_BSKH, value_BSKH, segment_ids_BT)


def _reference(query_BTNH, key_BSKH, value_BSKH, segment_ids_BT):
    B, T, N, H = query_BTNH.shape
    K = key_BSKH.shape[2]
    query_BTKGH = query_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", query_BTKGH, key_BSKH, preferred_element_type=jnp.float32
    ) * jnp.float32(H**-0.5)
    index_T = jnp.arange(T)
    causal_TS = index_T[:, None] >= index_T[None, :]
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    mask_BTS = same_BTS & causal_TS[None]
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.float32(NEGATIVE))
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(value_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, value_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


def decode_attention(query_BNH, keys_BKSH, values_BKSH, *, lengths_B):
    """softmax(q·k / √H) v of one query a row over the first `lengths_B[b]` entries of its cache.

    Args:
      query_BNH: one rotated query a row.
      keys_BKSH: cached keys.
      values_BKSH: cached values.
      lengths_B: int32, how many entries the row's query sees.

    Returns:
      Weighted values [B, N, H] in the type of the values.
    """
    B, N, H = query_BNH.shape
    K, S = keys_BKSH.shape[1:3]
    query_BKGH = query_BNH.reshape(B, K, N // K, H)
    scores_BKGS = jnp.einsum(
        "BKGH,BKSH->BKGS", query_BKGH, keys_BKSH, preferred_element_type=jnp.float32
    ) * jnp.float32(H**-0.5)
    visible_BS = jnp.arange(S)[None, :] < lengths_B[:, None]
    scores_BKGS = jnp.where(visible_BS[:, None, None], scores_BKGS, jnp.float32(NEGATIVE))
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(values_BKSH.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", weights_BKGS, values_BKSH).reshape(B, N, H)


IMPLEMENTATIONS = {"reference": _reference}
