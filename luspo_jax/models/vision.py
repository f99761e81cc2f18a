"""Qwen2.5-VL's vision tower as functions of `(params, arrays)`: patches in, embeddings out.

Patches of an image lie in slots, window after window (`images.layout`), so that a program knows of
an image's size only how many windows it was padded to. Most blocks attend within windows, the
`full_layers` over the whole image; both kinds have the same parameters, stacked on a leading axis,
and one scan runs over them all. The merger makes one embedding of each unit of merge_size² patches
(Bai et al. 2025, arXiv:2502.13923, section 2.1).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from luspo_jax.models.decoder_layers import REMAT, placed
from luspo_jax.models.layers import (
    add_bias,
    along_last_axes,
    project,
    rms_norm,
    rotate,
    swiglu,
)
from luspo_jax.models.rope import frequencies
from luspo_jax.models.vision_config import NORM_EPS, ROPE_THETA
from luspo_jax.ops.attention import attention as attend
from luspo_jax.ops.precision import wide, wide_type
from luspo_jax.sharding import constrain

_MASKED = -1e30  # finite: the exponential of a masked score is exactly zero, never NaN

# Logical axes of the parameters. A patch's kernel has colours, frames, rows and columns.
_AXES = {
    "patch": {"kernel": (None, None, None, None, "embed")},
    "blocks": {
        "attention_norm": {"scale": ("norm",)},
        "attention": {
            "qkv": {
                "kernel": ("embed", None, "heads", "head_dim"),
                "bias": (None, "heads", "head_dim"),
            },
            "out": {"kernel": ("heads", "head_dim", "embed"), "bias": ("norm",)},
        },
        "mlp_norm": {"scale": ("norm",)},
        "mlp": {
            "gate": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
            "up": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
            "down": {"kernel": ("mlp", "embed"), "bias": ("norm",)},
        },
    },
    "merger": {
        "norm": {"scale": ("norm",)},
        "hidden": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
        "out": {"kernel": ("mlp", "embed"), "bias": ("norm",)},
    },
}


def _shapes(config):
    """Returns shapes of the parameters, in the structure of `_AXES`."""
    D, F, heads = config.embed_dim, config.mlp_dim, (config.num_heads, config.head_dim)
    M = config.unit_patches * D
    return {
        "patch": {"kernel": (*config.patch_shape, D)},
        "blocks": {
            "attention_norm": {"scale": (D,)},
            "attention": {
                "qkv": {"kernel": (D, 3, *heads), "bias": (3, *heads)},
                "out": {"kernel": (*heads, D), "bias": (D,)},
            },
            "mlp_norm": {"scale": (D,)},
            "mlp": {
                "gate": {"kernel": (D, F), "bias": (F,)},
                "up": {"kernel": (D, F), "bias": (F,)},
                "down": {"kernel": (F, D), "bias": (D,)},
            },
        },
        "merger": {
            "norm": {"scale": (D,)},
            "hidden": {"kernel": (M, M), "bias": (M,)},
            "out": {"kernel": (M, config.out_dim), "bias": (config.out_dim,)},
        },
    }


def _with_blocks(tree, first):
    """Prepends `first` to the tuples of the blocks."""

    def is_leaf(node):
        return isinstance(node, tuple)

    blocks = jax.tree.map(lambda leaf: (first, *leaf), tree["blocks"], is_leaf=is_leaf)
    return {**tree, "blocks": blocks}


def abstract_params(config, dtype=jnp.float32):
    """Returns shapes and types of the tower's parameters; allocates nothing."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        _with_blocks(_shapes(config), config.depth),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def param_axes(config):
    """Returns the logical axis of every dimension of every parameter, as a tree of tuples."""
    del config  # the same for all towers
    return _with_blocks(_AXES, "layers")


def cut_sizes(config):
    """Returns sizes that a mesh must divide evenly: name in config.json → (logical axis, size)."""
    return {
        "vision_config.hidden_size": ("embed", config.embed_dim),
        "vision_config.num_heads": ("heads", config.num_heads),
        "vision_config.intermediate_size": ("mlp", config.mlp_dim),
        "vision_config.out_hidden_size": ("embed", config.out_dim),
    }


def encode(params, patches_ISC, positions_IS2, valid_IS, *, how):
    """Embeddings of the units of I images [I, U, D], U = S / merge_size², in the order of slots.

    `images.batch.in_slots` makes the arrays; `images.layout.token_units` says which unit of the
    flattened result stands at which token. Units without patches are finite and mean nothing, and
    change nothing of the others.

    Args:
      params: the tower's own, `params["vision"]`, in any floating type.
      patches_ISC: floating; each patch as from the image processor, C its numbers.
      positions_IS2: int32 row and column of each slot's patch.
      valid_IS: bool, whether the slot holds a patch; S a multiple of a window's slots.
      how: the Forward. Its `vision_attention` reads segment ids and is of `full_layers`; under its
        layout images lie over "batch", each image's windows over "length" where that divides their
        number.

    Raises:
      ValueError: sizes that do not fit, or an attention that takes lengths only (cudnn): the slots
        of an image are not contiguous.
    """
    config, layout = how.model.vision, how.layout
    _check(patches_ISC, config, how.vision_attention)
    patches_ISC = placed(patches_ISC.astype(how.dtype), layout)
    kernel_CD = params["patch"]["kernel"].reshape(-1, config.embed_dim)
    x_ISD = placed(project(patches_ISC, kernel_CD, 1, (None, "embed"), layout), layout)
    rotation = _rotation(positions_IS2, config.head_dim)
    full_attention = functools.partial(_attend_image, how.vision_attention, layout)

    def block(x_ISD, scanned):
        block_params, full = scanned
        return _block(x_ISD, block_params, full, rotation, valid_IS, full_attention, how)

    if how.remat != "none":
        block = jax.checkpoint(block, prevent_cse=False, policy=REMAT[how.remat])
    full_L = np.isin(np.arange(config.depth), config.full_layers)
    x_ISD, _ = lax.scan(block, x_ISD, (params["blocks"], full_L))
    return _merge(x_ISD, params["merger"], config, layout)


def _block(x, params, full, rotation, valid_IS, full_attention, how):
    """One pre-norm residual block, as the body of a scan."""
    axes, config, layout = _AXES["blocks"], how.model.vision, how.layout
    normed = rms_norm(x, params["attention_norm"]["scale"], NORM_EPS)
    qkv = _affine(normed, params["attention"]["qkv"], axes["attention"]["qkv"], layout)
    query, key, value = (qkv[:, :, i] for i in range(3))
    arrays = rotate(query, rotation), rotate(key, rotation), value, valid_IS
    windowed = functools.partial(_attend_windows, config.window_slots, layout)
    if len(config.full_layers) == config.depth:
        out = full_attention(*arrays)
    elif not config.full_layers:
        out = windowed(*arrays)
    else:  # only one of the two is computed
        out = lax.cond(full, full_attention, windowed, *arrays)
    out = _affine(out, params["attention"]["out"], axes["attention"]["out"], layout, contracted=2)
    x = placed(x + out, layout)
    normed = rms_norm(x, params["mlp_norm"]["scale"], NORM_EPS)
    gate, up = (
        _affine(normed, params["mlp"][name], axes["mlp"][name], layout) for name in ("gate", "up")
    )
    out = _affine(swiglu(gate, up), params["mlp"]["down"], axes["mlp"]["down"], layout)
    return placed(x + out, layout), None


def _affine(x, params, axes, layout, contracted=1):
    """Computes x · kernel + bias over the last `contracted` axes of x."""
    return add_bias(
        project(x, params["kernel"], contracted, axes["kernel"], layout), params["bias"]
    )


def _merge(x_ISD, params, config, layout):
    """Computes out(gelu(hidden(x))) of the normed, concatenated patches of each unit."""
    I, S, D = x_ISD.shape
    units_IUM = rms_norm(x_ISD, params["norm"]["scale"], NORM_EPS).reshape(
        I, S // config.unit_patches, config.unit_patches * D
    )
    axes = _AXES["merger"]
    hidden = _affine(units_IUM, params["hidden"], axes["hidden"], layout)
    hidden = jax.nn.gelu(hidden, approximate=False)
    return placed(_affine(hidden, params["out"], axes["out"], layout), layout)


def _rotation(positions_IS2, head_dim):
    """Returns (cos, sin), float32 [I, S, 1, H/2]: the first half of the angles use the row.

    The other half use the column.
    """
    positions = positions_IS2.astype(jnp.float32)[..., None]
    angles = positions * along_last_axes(frequencies(head_dim // 2, ROPE_THETA), positions.ndim)
    angles = angles.reshape(*positions_IS2.shape[:2], 1, head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def _attend_image(implementation, layout, query, key, value, valid_IS):
    """Attends over all patches of an image."""
    return attend(
        query,
        key,
        value,
        segment_ids_BT=valid_IS.astype(jnp.int32),
        causal=False,
        implementation=implementation,
        layout=layout,
    )


# The backward pass recomputes the weights of all windows: they are 64 numbers per patch and head,
# as many as the rest of a block keeps.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0, 1))
def _attend_windows(slots, layout, query_ISNH, key_ISNH, value_ISNH, valid_IS):
    """Attends over the patches of each window, `slots` per window."""
    I, S, N, H = query_ISNH.shape
    scaled_ISNH = (wide(query_ISNH) * H**-0.5).astype(query_ISNH.dtype)

    def windows(x, *rest):
        x = x.reshape(I, S // slots, slots, *x.shape[2:])
        return constrain(x, (*_window_axes(S // slots, layout), None, *rest), layout)

    query, key, value = (windows(x, "heads", None) for x in (scaled_ISNH, key_ISNH, value_ISNH))
    total = wide_type(query)
    scores = jnp.einsum("iwqnh,iwknh->iwnqk", query, key, preferred_element_type=total)
    scores = jnp.where(windows(valid_IS)[:, :, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("iwnqk,iwknh->iwqnh", weights, value, preferred_element_type=total)
    out_ISNH = out.astype(query.dtype).reshape(I, S, N, H)
    return checkpoint_name(out_ISNH, "attention_out")


def _window_axes(count, layout):
    """Returns axes of images and their windows; unevenly divided windows are on every device."""
    cut = layout is not None and count % layout.size("length") == 0
    return "batch", "length" if cut else None


def _check(patches_ISC, config, attention):
    I, S, C = patches_ISC.shape
    expected = math.prod(config.patch_shape)
    if S % config.window_slots or expected != C:
        raise ValueError(
            f"patches of {I} images are [{S}, {C}] each; the tower takes a multiple of "
            f"{config.window_slots} slots (a window of window_size {config.window_size}) of "
            f"{expected} numbers, as images.batch.in_slots makes them"
        )
    if attention == "cudnn":
        raise ValueError(
            "attention implementation 'cudnn' takes lengths, and the patches of an image are not "
            "one run in its slots; use 'flash_gpu', or what ops.attention.resolve gives for "
            "packed=True"
        )
