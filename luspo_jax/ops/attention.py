"""Causal attention within segments: one front, an implementation by platform, any mesh.

| name | platform | what it is |
|---|---|---|
| reference | all | loops in plain XLA (`reference_attention`); alone has second derivatives |
| splash | TPU | the Pallas kernels that come with jax (`splash_attention`) |
| flash_gpu | GPU | Pallas kernels that read segment ids (`gpu_attention`) |
| cudnn | GPU | cuDNN's, which takes lengths and not segment ids: one segment a row only |

Rows may be spread over devices, heads over others, and a row's positions over others again, which
makes the attention a ring (`ring_attention`).
"""

import functools
import importlib

import jax

from luspo_jax.ops import reference_attention
from luspo_jax.ops.ring_attention import (
    backward_ring,
    check_length,
    forward_ring,
    inverse_ring_order,
    ring_order,
)
from luspo_jax.sharding import Layout, shard_map

__all__ = ["IMPLEMENTATIONS", "attention", "inverse_ring_order", "resolve", "ring_order"]

# Where each has its `forward_block` and `backward_block`; imported when used, as Pallas takes long.
IMPLEMENTATIONS = {
    "reference": "reference_attention",
    "splash": "splash_attention",
    "flash_gpu": "gpu_attention",
    "cudnn": "cudnn_attention",
}
_GPUS = ("gpu", "cuda", "rocm")
_PLATFORMS = {"splash": ("tpu",), "flash_gpu": _GPUS, "cudnn": ("gpu", "cuda")}

_QUERY = ("batch", "length", "heads", None)
_KEY = ("batch", "length", "kv_heads", None)
_SEGMENTS = ("batch", "length")
_INPUTS = (_QUERY, _KEY, _KEY, _SEGMENTS)
_LSE = ("batch", "length", "heads")


def attention(
    query_BTNH,
    key_BSKH,
    value_BSKH,
    *,
    segment_ids_BT,
    implementation="reference",
    layout: Layout | None = None,
):
    """softmax(q·k / √H) v over the keys of the same segment that are not in the future.

    Order is that of the arrays (S = T); where the layout cuts the length, the arrays are in
    `ring_order`, and what counts is the order before that. Query head n reads key head
    n // (N / K). Scores, softmax and sums are float32.

    Args:
      query_BTNH: queries, already rotated.
      key_BSKH: keys, already rotated.
      value_BSKH: values.
      segment_ids_BT: int32, 0 on padding (whose outputs are finite and mean nothing).
      implementation: a key of IMPLEMENTATIONS, as `resolve` gives it.
      layout: how arrays lie on a mesh; each device works on its own rows, heads and positions.

    Returns:
      Weighted values [B, T, N, H] in the type of the queries.

    Raises:
      ValueError: on an unknown implementation, naming the known ones; on a size that the mesh does
        not divide, or on a mesh that cuts lengths with an implementation that cannot.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown; "
            f"use one of {sorted(IMPLEMENTATIONS)}"
            + (", as ops.attention.resolve chooses" if implementation == "auto" else "")
        )
    arrays = (query_BTNH, key_BSKH, value_BSKH, segment_ids_BT)
    if layout is None and implementation == "reference":
        return reference_attention.attention(*arrays)
    if layout is not None:
        _check_sizes(query_BTNH, key_BSKH, layout)
        _check_ring(implementation, layout.size("length"))
    return _by_parts(implementation, layout, *arrays)


def resolve(
    implementation: str,
    *,
    platform: str,
    packed: bool,
    head_dim: int,
    dtype="bfloat16",
    context: int = 1,
    second_derivatives: bool = False,
) -> str:
    """The implementation that is meant, with "auto" decided; refuses one that does not fit.

    "auto" is splash on TPU; on GPU cudnn where it fits and else flash_gpu; elsewhere, and where
    these do not fit, the reference.

    Args:
      implementation: "auto" or a key of IMPLEMENTATIONS.
      platform: of the devices ("cpu", "tpu", "gpu", "cuda", "rocm").
      packed: whether a row may hold more than one segment.
      head_dim: H.
      dtype: type of queries, keys and values.
      context: devices that share a row's length.
      second_derivatives: whether the backward pass is differentiated, as length pressure does.

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
    }
    if implementation == "auto":
        fit = (name for name in ("splash", "cudnn", "flash_gpu") if not _unfit(name, **needs))
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


def _unfit(name, *, platform, packed, head_dim, dtype, context, second_derivatives):
    """Why an implementation cannot do what is needed; None where it can."""
    if name == "reference":
        return None
    if platform not in _PLATFORMS[name]:
        return f"runs on {' or '.join(_PLATFORMS[name])}, not on {platform}"
    if second_derivatives:
        return "has no second derivatives, which length pressure takes"
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
    least, most = (8, 256) if name == "splash" else (16, 128)
    if name != "cudnn" and not least <= head_dim <= most:
        return f"takes head sizes of {least} to {most}, not {head_dim}"
    return None


def _check_sizes(query_BTNH, key_BSKH, layout):
    B, T, N, _ = query_BTNH.shape
    counts = {"batch": (B, "rows"), "heads": (N, "query heads"), "kv_heads": (key_BSKH.shape[2],
              "key heads")}  # fmt: skip
    for axis, (size, name) in counts.items():
        if size % layout.size(axis):
            raise ValueError(
                f"attention over {size} {name}: the mesh cuts them in {layout.size(axis)} parts "
                f"({', '.join(layout.axis_names(axis))}), which must divide their number"
            )
    if layout.size("length") > 1:
        check_length(T, layout.size("length"))


def _check_ring(implementation, count):
    if count > 1 and implementation == "cudnn":
        raise ValueError(
            f"attention implementation 'cudnn' cannot cut a row over {count} context devices; "
            f"use 'flash_gpu'"
        )


# ---------------------------------------------------------------- each device its own part
# The derivative is declared out here, so that both passes are a plain shard_map of their own and
# no rule of differentiation has to go through one.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_parts(implementation, layout, query_BTNH, key_BSKH, value_BSKH, segment_ids_BT):
    arrays = (query_BTNH, key_BSKH, value_BSKH, segment_ids_BT)
    return _parts_forward(implementation, layout, *arrays)[0]


def _parts_forward(implementation, layout, *arrays):
    function = functools.partial(_own_forward, implementation, layout)
    query_BTNH, *rest, segments_BT = arrays
    inputs = query_BTNH, *rest, reference_attention.tied(segments_BT, query_BTNH)
    results = shard_map(function, layout, _INPUTS, (_QUERY, _LSE))(*inputs)
    out_BTNH, lse_BTN = reference_attention.named(*results)
    return out_BTNH, (*arrays, out_BTNH, lse_BTN)


def _parts_backward(implementation, layout, residuals, grad_BTNH):
    function = functools.partial(_own_backward, implementation, layout)
    axes = (*_INPUTS, _QUERY, _LSE, _QUERY)
    residuals = reference_attention.tied(residuals, grad_BTNH)
    return *shard_map(function, layout, axes, (_QUERY, _KEY, _KEY))(*residuals, grad_BTNH), None


_by_parts.defvjp(_parts_forward, _parts_backward)


def _own_forward(implementation, layout, query, key, value, segments):
    block, (axis, count) = _blocks(implementation).forward_block, _ring(layout)
    if count > 1:
        out, lse = forward_ring(block, axis, count, query, key, value, segments)
    else:
        out, lse = block(query, key, value, segments, segments, causal=True)
    return out.astype(query.dtype), lse


def _own_backward(implementation, layout, query, key, value, segments, *rest):
    block, (axis, count) = _blocks(implementation).backward_block, _ring(layout)
    if count > 1:
        grads = backward_ring(block, axis, count, query, key, value, segments, *rest)
    else:
        grads = block(query, key, value, segments, segments, *rest, causal=True)
    return tuple(grad.astype(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True))


def _blocks(implementation):
    return importlib.import_module(f"luspo_jax.ops.{IMPLEMENTATIONS[implementation]}")


def _ring(layout):
    """Name and size of the mesh axis that lengths are cut over."""
    names = () if layout is None else layout.axis_names("length")
    return (names[0], layout.size("length")) if names else (None, 1)
