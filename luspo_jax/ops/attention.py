"""Attention within segments, causal or not: one interface, one implementation per platform.

| name | platform | what it is |
|---|---|---|
| reference | all | loops in plain XLA (`reference_attention`); alone has second derivatives |
| splash | TPU | the Pallas kernels that come with jax (`splash_attention`) |
| splash_branches | TPU | the same, twice, for rows with branches (`splash_branches`) |
| flash_gpu | GPU | Pallas kernels that read segment ids (`gpu_attention`) |
| cudnn | GPU | cuDNN's, which takes lengths and not segment ids: one segment a row only |

Any mesh works: rows, heads and the positions of a row may be sharded. Sharded positions make the
attention a ring (`ring_attention`).
"""

import functools
import importlib
from typing import Any

import jax

from luspo_jax.ops import gathered_attention, reference_attention
from luspo_jax.ops.attention_blocks import Inputs, Results
from luspo_jax.ops.ring_attention import (
    backward_ring,
    check_length,
    forward_ring,
    inverse_ring_order,
    ring_order,
)
from luspo_jax.sharding import Layout, shard_map
from luspo_jax.types import Sequences

__all__ = ["IMPLEMENTATIONS", "attention", "inverse_ring_order", "resolve", "ring_order"]

# Modules as `attention_blocks` says; imported when used, as Pallas imports slowly.
IMPLEMENTATIONS = {
    "reference": "reference_attention",
    "splash": "splash_attention",
    "splash_branches": "splash_branches",
    "flash_gpu": "gpu_attention",
    "cudnn": "cudnn_attention",
}
_GPUS = ("gpu", "cuda", "rocm")
_PLATFORMS = {
    "splash": ("tpu",),
    "splash_branches": ("tpu",),
    "flash_gpu": _GPUS,
    "cudnn": ("gpu", "cuda"),
}

_CHOICES = ("splash", "splash_branches", "cudnn", "flash_gpu")  # of "auto", the best first

_QUERY = ("batch", "length", "heads", None)
_KEY = ("batch", "length", "kv_heads", None)
_SEGMENTS = ("batch", "length")
_WHOLE_KEY, _WHOLE_SEGMENTS = ("batch", None, "kv_heads", None), ("batch", None)
_RESULTS = Results(_QUERY, ("batch", "length", "heads"))


def attention(
    query_BTNH,
    key_BSKH,
    value_BSKH,
    *,
    segment_ids_BT,
    causal=True,
    implementation="reference",
    layout: Layout | None = None,
    sequences: Sequences | None = None,
):
    """Returns softmax(q·k / √H) v over the keys that a segment sees and that are not in the future.

    What a segment sees is told in `ops.segments`: itself, and a branch its trunk.

    Order is that of the arrays (S = T). If the layout shards the length, the arrays are in
    `ring_order` and the order before that permutation counts. Query head n reads key head n // (N /
    K). Scores, softmax and sums are float32.

    Args:
      query_BTNH: queries, already rotated.
      key_BSKH: keys, already rotated.
      value_BSKH: values.
      segment_ids_BT: int32, 0 on padding (whose outputs are finite but meaningless).
      causal: false lets a query see the future too, as for image patches; order then has no
        meaning, and if the layout shards the length, each device has all keys of its rows.
      implementation: a key of IMPLEMENTATIONS, from `resolve`.
      layout: how arrays are sharded over a mesh; each device computes its own rows, heads and
        positions.
      sequences: where those of causal attention lie, to gather them on one device; else None.

    Returns:
      Weighted values [B, T, N, H] in the type of the queries.

    Raises:
      ValueError: an unknown implementation (the message lists the known ones), a size that the mesh
        does not divide, or a mesh that shards lengths with an implementation that cannot.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown; "
            f"use one of {sorted(IMPLEMENTATIONS)}"
            + (", as ops.attention.resolve chooses" if implementation == "auto" else "")
        )
    if sequences is not None and layout is None and implementation == "reference":
        return gathered_attention.attention(query_BTNH, key_BSKH, value_BSKH, sequences)
    arrays = (query_BTNH, key_BSKH, value_BSKH, segment_ids_BT)
    if causal and layout is None and implementation == "reference":
        return reference_attention.attention(*arrays)
    if layout is not None:
        _check_sizes(query_BTNH, key_BSKH, layout)
        if causal:
            _check_ring(implementation, query_BTNH.shape[1], layout.size("length"))
    return _by_parts(implementation, layout, causal, *arrays)


def resolve(
    implementation: str,
    *,
    platform: str,
    packed: bool,
    head_dim: int,
    dtype="bfloat16",
    context: int = 1,
    second_derivatives: bool = False,
    branches: bool = False,
) -> str:
    """Resolves "auto" to an implementation, and refuses one that does not fit.

    "auto" is splash on TPU, or splash_branches; on GPU cudnn if it fits, else flash_gpu; elsewhere,
    or if these do not fit, the reference.

    Args:
      implementation: "auto" or a key of IMPLEMENTATIONS.
      platform: platform of the devices ("cpu", "tpu", "gpu", "cuda", "rocm").
      packed: whether a row may hold more than one segment.
      head_dim: H.
      dtype: type of queries, keys and values.
      context: number of devices over which a row's length is sharded.
      second_derivatives: whether the backward pass is differentiated, as for length pressure.
      branches: whether rows may hold branches.

    Returns:
      A key of IMPLEMENTATIONS.

    Raises:
      ValueError: what the implementation cannot do, and what to set instead.
    """
    needs = {
        "platform": platform,
        "packed": packed,
        "head_dim": head_dim,
        "dtype": jax.numpy.dtype(dtype).name,
        "context": context,
        "second_derivatives": second_derivatives,
        "branches": branches,
    }
    if implementation == "auto":
        fit = (name for name in _CHOICES if not _unfit(name, **needs))
        return next(fit, "reference")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown; "
            f"use 'auto' or one of {sorted(IMPLEMENTATIONS)}"
        )
    reason = _unfit(implementation, **needs)
    if reason:
        raise ValueError(
            f"attention implementation {implementation!r} {reason}; "
            f"here {resolve('auto', **needs)!r} does (or 'auto')"
        )
    return implementation


def _unfit(name, *, platform, packed, head_dim, dtype, context, second_derivatives, branches):
    """Returns why an implementation does not fit; None if it does."""
    if name == "reference":
        return None
    if platform not in _PLATFORMS[name]:
        return f"runs on {' or '.join(_PLATFORMS[name])}, not on {platform}"
    if second_derivatives:
        return "has no second derivatives, which length pressure takes"
    if name == "splash" and branches:
        return "sees only tokens of one segment, and responses that share a prompt see two"
    if name == "cudnn" and packed:
        return "takes lengths and not segment ids, so packed rows would see each other's tokens"
    if name == "cudnn" and context > 1:
        return f"cannot cut a row over {context} context devices"
    if name == "cudnn" and dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 or float16, not {dtype}"
    if name == "cudnn" and (head_dim % 8 or head_dim > 128):
        return f"takes head sizes up to 128 that are multiples of 8, not {head_dim}"
    if dtype == "float64":
        return "does not take float64"
    least, most = (8, 256) if name.startswith("splash") else (16, 128)
    if name != "cudnn" and not least <= head_dim <= most:
        return f"takes head sizes of {least} to {most}, not {head_dim}"
    return None


def _check_sizes(query_BTNH, key_BSKH, layout):
    B, _, N, _ = query_BTNH.shape
    counts = {"batch": (B, "rows"), "heads": (N, "query heads"), "kv_heads": (key_BSKH.shape[2],
              "key heads")}  # fmt: skip
    for axis, (size, name) in counts.items():
        if size % layout.size(axis):
            raise ValueError(
                f"attention over {size} {name}: the mesh cuts them in {layout.size(axis)} parts "
                f"({', '.join(layout.axis_names(axis))}), which must divide their number"
            )


def _check_ring(implementation, length, count):
    if count > 1:
        check_length(length, count)
    if count > 1 and implementation == "cudnn":
        raise ValueError(
            f"attention implementation 'cudnn' cannot cut a row over {count} context devices; "
            f"use 'flash_gpu'"
        )


# ---------------------------------------------------------------- each device its own part
# The derivative is declared outside shard_map, so that each pass is a plain shard_map of its own
# and no differentiation rule has to go through one.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _by_parts(implementation, layout, causal, query_BTNH, key_BSKH, value_BSKH, segment_ids_BT):
    arrays = (query_BTNH, key_BSKH, value_BSKH, segment_ids_BT)
    return _parts_forward(implementation, layout, causal, *arrays)[0]


def _axes(causal):
    """Returns the axes of the inputs; without order each device has all keys of its rows."""
    key, segments = (_KEY, _SEGMENTS) if causal else (_WHOLE_KEY, _WHOLE_SEGMENTS)
    return Inputs(_QUERY, key, key, _SEGMENTS, segments)


def _parts_forward(implementation, layout, causal, *arrays):
    function = functools.partial(_own_forward, implementation, layout, causal)
    query_BTNH, *rest, segments_BT = arrays
    segments_BT = reference_attention.tied(segments_BT, query_BTNH)
    inputs = Inputs(query_BTNH, *rest, segments_BT, segments_BT)
    results = shard_map(function, layout, (_axes(causal),), _RESULTS)(inputs)
    results = reference_attention.named(results)
    return results.out, (arrays, results)


def _parts_backward(implementation, layout, causal, residuals, grad_BTNH):
    function = functools.partial(_own_backward, implementation, layout, causal)
    (*arrays, segments_BT), results = reference_attention.tied(residuals, grad_BTNH)
    inputs, axes = Inputs(*arrays, segments_BT, segments_BT), _axes(causal)
    grads = shard_map(function, layout, (axes, _RESULTS, _QUERY), axes[:3])(
        inputs, results, grad_BTNH
    )
    return *grads, None


_by_parts.defvjp(_parts_forward, _parts_backward)


def _own_forward(implementation, layout, causal, inputs):
    block, (axis, count) = blocks(implementation).forward_block, _ring(layout)
    if causal and count > 1:
        results = forward_ring(block, axis, count, inputs)
    else:
        results = block(inputs, causal=causal)
    return results._replace(out=results.out.astype(inputs.query.dtype))


def _own_backward(implementation, layout, causal, inputs, results, grad):
    block, (axis, count) = blocks(implementation).backward_block, _ring(layout)
    if causal and count > 1:
        grads = backward_ring(block, axis, count, inputs, results, grad)
    else:
        grads = block(inputs, results, grad, causal=causal)
    if not causal and count > 1:  # so far from this device's queries only
        grads = grads[0], *(jax.lax.psum(grad, axis) for grad in grads[1:])
    return tuple(grad.astype(x.dtype) for grad, x in zip(grads, inputs[:3], strict=True))


def blocks(implementation: str) -> Any:
    """Returns the module of an implementation; its functions are those of `attention_blocks`."""
    return importlib.import_module(f"luspo_jax.ops.{IMPLEMENTATIONS[implementation]}")


def _ring(layout):
    """Returns name and size of the mesh axis over which lengths are sharded."""
    names = () if layout is None else layout.axis_names("length")
    return (names[0], layout.size("length")) if names else (None, 1)
