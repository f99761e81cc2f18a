"""Attention by the Pallas "splash" kernels that come with jax, for TPU.

They take segment ids and grouped key heads directly, skip blocks above the diagonal, and keep
softmax and sums in float32. Forward uses jax's public interface. Backward cannot: the public
derivative uses the log-sum-exp of its own forward pass, and a ring needs that over all devices. So
`backward_block` calls the function below it, `_splash_attention_bwd` (as of jax 0.10.2), which
takes queries, keys, values, outputs and log-sum-exps from any source.

Outputs and gradients of a block have the type of the inputs: over a ring, each bfloat16 part is
rounded once before the parts are summed in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from luspo_jax.ops.attention_blocks import Results
from luspo_jax.ops.precision import wide

_LANES = 128  # lengths are padded to a multiple of this
_BLOCKS = (512, 256, 128)  # tokens per tile; larger ones load less and waste more on padding
_WASTE = 8  # at most 1/8 extra tokens, if a smaller tile helps
_PADDING = -1  # a segment of its own
_INTERPRET = False  # tests run the kernels on CPU this way


def forward_block(inputs, *, causal):
    """Returns Results, `out` in the queries' type."""
    T, S, N = inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[2]
    kernel = _kernel(T, S, N, causal)
    out_BNTH, (lse_BNT,) = jax.vmap(kernel)(*_by_head(inputs))
    return Results(*(jnp.swapaxes(x, 1, 2)[:, :T] for x in (out_BNTH, lse_BNT)))


def backward_block(inputs, results, grad_BTNH, *, causal):
    """Returns gradients (dq, dk, dv), dq in float32 and the others in the inputs' type."""
    dtype = inputs.query.dtype
    T, S, (N, H) = inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[2:]
    kernel = _kernel(T, S, N, causal)
    arrays = _by_head(inputs)
    block = _block(T)
    # Padding has no cotangent and, with a log-sum-exp this high, no weight.
    lse_BNT = jnp.swapaxes(_padded(results.lse, block, 1e30), 1, 2)
    out_BNTH, grad_BNTH = (
        jnp.swapaxes(_padded(x.astype(dtype), block), 1, 2) for x in (results.out, grad_BTNH)
    )

    def row(query, key, value, segment_ids, out, lse, grad):
        settings = dict(kernel.kwargs, save_residuals=False)
        tiles = kernel.dq_mask_info, kernel.dkv_mask_info
        residuals = (query, key, value, segment_ids, None, out, lse, *tiles)
        return splash._splash_attention_bwd(res=residuals, do=grad, **settings)[3:6]

    grads = jax.vmap(row)(*arrays, out_BNTH, lse_BNT, grad_BNTH)
    dq_BTNH, dk_BSKH, dv_BSKH = (jnp.swapaxes(grad, 1, 2) for grad in grads)
    return wide(dq_BTNH)[:, :T] * H**-0.5, dk_BSKH[:, :S], dv_BSKH[:, :S]


def _by_head(inputs):
    """Returns scaled queries, keys and values by head, and segment ids, padded to whole tiles."""
    query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS = inputs
    query_BTNH = (wide(query_BTNH) * query_BTNH.shape[-1] ** -0.5).astype(query_BTNH.dtype)
    block_T, block_S = _block(query_BTNH.shape[1]), _block(key_BSKH.shape[1])
    segment_ids = splash.SegmentIds(
        _padded(segments_BT, block_T, _PADDING), _padded(segments_BS, block_S, _PADDING)
    )
    pairs = ((query_BTNH, block_T), (key_BSKH, block_S), (value_BSKH, block_S))
    return *(jnp.swapaxes(_padded(x, block), 1, 2) for x, block in pairs), segment_ids


def _block(length):
    """Returns the number of tokens per tile."""
    for block in _BLOCKS:
        if -length % block <= length // _WASTE:
            return block
    return _LANES


def _padded(x_BT, block, value=0):
    widths = [(0, 0)] * x_BT.ndim
    widths[1] = (0, -x_BT.shape[1] % block)
    return jnp.pad(x_BT, widths, constant_values=value)


class _Causal(masks.CausalMask):
    """The causal mask, with closed-form answers on whether a tile has any entries and has all.

    The kernel computes its own entries; comparing all T² indices for these answers takes the host
    minutes at T = 131072. A test checks the schedule against that of jax's mask.
    """

    def __getitem__(self, index):
        rows, columns = index
        return np.array([columns.start < rows.stop, columns.stop - 1 <= rows.start])


def _kernel(T, S, N, causal):
    """Returns the kernel for padded lengths; the host computes which tiles to skip."""
    block_T, block_S = _block(T), _block(S)
    shape = T + -T % block_T, S + -S % block_S
    return _made(shape, block_T, block_S, N, causal, _INTERPRET)


@functools.lru_cache(maxsize=32)
def _made(shape, block_T, block_S, N, causal, interpret):
    mask = _Causal(shape) if causal else masks.FullMask(shape)
    sizes = splash.BlockSizes(
        block_q=block_T,
        block_kv=block_S,
        block_kv_compute=block_S,
        block_q_dkv=block_T,
        block_kv_dkv=block_S,
        block_kv_dkv_compute=block_S,
        block_q_dq=block_T,
        block_kv_dq=block_S,
    )
    with jax.ensure_compile_time_eval():  # constants, so that the next trace can use them too
        return splash.make_splash_mha(
            masks.MultiHeadMask([mask] * N),
            block_sizes=sizes,
            save_residuals=True,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
