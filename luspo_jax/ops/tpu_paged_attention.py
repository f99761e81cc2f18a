"""Paged attention by the Pallas kernel that comes with jax, for TPU.

Of jax's two kernels for TPU this is the one whose layout [K, pages, S, H] a layer of our pool has
as it lies. `ragged_paged_attention` wants keys and values interleaved along the heads,
[pages, S, 2K, H]: another pool, whose heads no other implementation could read in place.

The body of the kernel is jax's (as of jax 0.10.2); the call around it is ours, because jax's own
drops the log-sum-exp and rounds the sums to the type of the queries after each block. The body
multiplies in bfloat16 whatever the type of the keys, so float32 pages are refused.

Blocks are loaded whole: a row reads up to its table's next multiple of a block, and what lies
there must be finite, as the pool is: its zeros, and keys and values of other rows. The weight of
an entry past the row is exactly zero.

Written without access to a TPU: compiled for one and run on CPU by Pallas' interpreter.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention_kernel as kernels

from luspo_jax.ops.paged_attention import NEGATIVE, Partial, scaled_groups
from luspo_jax.ops.pages import one_layer

_ENTRIES = 512  # per block: 128 KiB of bfloat16 keys at H 128; half a block a row is wasted
_NUMBERS = 2**17  # page numbers of a call: half of the scalar memory of a core, 1 MiB
_INTERPRET = False  # tests run the kernel on CPU this way


def attend(query_BNH, pages, layer, tables_BM, lengths_B, shared=None):
    """Attention over the first `lengths_B` entries; see `paged_attention.IMPLEMENTATIONS`."""
    del shared  # the tables name these pages too
    (B, N, H), K = query_BNH.shape, pages.keys.shape[0]
    keys, tables_BM = one_layer(pages.keys, layer, tables_BM)
    values, _ = one_layer(pages.values, layer, tables_BM)
    block = max(1, min(_ENTRIES // pages.size, tables_BM.shape[1]))
    # Past a table its last page again: any page will do.
    tables_BM = jnp.pad(tables_BM, ((0, 0), (0, -tables_BM.shape[1] % block)), mode="edge")
    query_BKGH = scaled_groups(query_BNH, K).astype(jnp.float32)
    rows = max(1, _NUMBERS // tables_BM.shape[1])
    with jax.numpy_dtype_promotion("standard"):
        found = [
            _call(
                *(x[i : i + rows] for x in (query_BKGH, tables_BM, lengths_B)), keys, values, block
            )
            for i in range(0, B, rows)
        ]
    out, top, total = (jnp.concatenate(x).reshape(B, N, H) for x in zip(*found, strict=True))
    top, total = top[..., 0], total[..., 0]
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), NEGATIVE)
    return Partial(out, lse)


def _call(query_BKGH, tables_BM, lengths_B, keys, values, block):
    """Returns (out, top score, Σ exp(score − top)) of each query, [B, K, G, H] float32 each; the
    last two are the same along H."""
    (B, K, G, H), S = query_BKGH.shape, keys.shape[2]
    a_head = pl.BlockSpec((None, None, G, H), lambda _, b, k, *__: (b, k, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    buffer = pltpu.VMEM((2, block, S, H), keys.dtype)  # one is read while the other fills
    return pl.pallas_call(
        functools.partial(
            kernels.paged_flash_attention_kernel_inline_seq_dim,
            batch_size=B,
            pages_per_compute_block=block,
            pages_per_sequence=tables_BM.shape[1],
            mask_value=kernels.DEFAULT_MASK_VALUE,  # it is added: below any finite score
            attn_logits_soft_cap=None,
            megacore_mode=None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1, B, K),
            in_specs=[a_head, anywhere, None, anywhere, None],  # no scales
            out_specs=[a_head] * 3,
            scratch_shapes=[buffer, None, buffer, None, *[pltpu.SemaphoreType.DMA((2,))] * 2],
        ),
        out_shape=[jax.ShapeDtypeStruct(query_BKGH.shape, jnp.float32)] * 3,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=_INTERPRET,
        name="paged_attention",
    )(
        lengths_B,
        tables_BM.reshape(-1),
        jnp.zeros((1,), jnp.int32),  # which buffer is read
        jnp.ones((1,), jnp.int32),  # nothing was loaded yet
        query_BKGH,
        keys,
        None,
        values,
        None,
    )
