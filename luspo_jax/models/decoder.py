"""Qwen2.5, Qwen3, Qwen3-MoE and Qwen2.5-VL decoders as functions of `(params, arrays)`.

Parameters are a nested dict; consecutive layers of one kind are stacked on a leading axis
(`DecoderConfig.stacks`). The parameters of an image tower are under "vision"; `vision.encode`
computes embeddings of images, and the functions here use them in place of token embeddings.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax import sharding
from luspo_jax.models import vision
from luspo_jax.models.decoder_layers import REMAT, Decoder
from luspo_jax.models.experts import EXPERT_AXES, ROUTER_AXES, Routed, check_ids
from luspo_jax.models.forward import Forward
from luspo_jax.models.low_rank import (
    abstract_adapter,
    abstract_base,
    adapter_axes,
    base_axes,
    composed,
    merged_tree,
)
from luspo_jax.models.quantised import (
    Quantised,
    is_quantised,
    quantise_tree,
    quantised_axes,
    scaled,
    split,
)
from luspo_jax.ops.attention import attention as attend
from luspo_jax.ops.normal_slice import normal_slice
from luspo_jax.ops.paged_attention import append_and_attend
from luspo_jax.ops.paged_prefill import write_and_attend
from luspo_jax.ops.pages import Pages, pages_axes, zeros
from luspo_jax.sharding import constrain

__all__ = [
    "REMAT",
    "Routed",
    "abstract_frozen",
    "abstract_params",
    "abstract_trained",
    "cast",
    "cut_sizes",
    "decode_step",
    "empty_pages",
    "forward",
    "frozen_axes",
    "head_kernel",
    "hidden_states",
    "init_params",
    "logits",
    "param_axes",
    "prefill",
    "trained_axes",
    "whole_axes",
    "whole_params",
]

INIT_STDDEV = 0.02  # initializer_range of the Qwen configurations
_MATRICES = ("kernel", "embedding", "head")  # leaves drawn at random, by their last key


def _attend_sequence(query, key, value, pages, layer, context, *, how):
    segment_ids_BT, sequences = context
    out = attend(
        query,
        key,
        value,
        segment_ids_BT=segment_ids_BT,
        implementation=how.attention,
        layout=how.layout,
        sequences=sequences,
    )
    return out, pages


def _attend_runs(query, key, value, pages, layer, runs, *, how):
    return write_and_attend(
        query,
        Pages(key, value),
        pages,
        layer,
        runs=runs,
        implementation=how.attention,
        layout=how.layout,
    )


def _attend_pages(query, key, value, pages, layer, places, *, how):
    return append_and_attend(
        query,
        Pages(key, value),
        pages,
        layer,
        places=places,
        implementation=how.paged_attention,
        layout=how.layout,
    )


def hidden_states(params, tokens_BT, positions_BT, segment_ids_BT, *, how, **images):
    """Hidden states [B, T, D] after the final norm: the first of what `forward` gives."""
    return forward(params, tokens_BT, positions_BT, segment_ids_BT, how=how, **images)[0]


def forward(
    params,
    tokens_BT,
    positions_BT,
    segment_ids_BT,
    *,
    how,
    replayed_BTLK=None,
    images=None,
    sequences=None,
):
    """Returns (hidden states [B, T, D] after the final norm, Routed or None).

    Args:
      params: as from `init_params`, in any floating type.
      tokens_BT: int32 token ids.
      positions_BT: int32 rotary positions, from 0 in each segment; [B, T, 3] where images give
        tokens positions in time, row and column (`images.layout.mrope_positions`).
      segment_ids_BT: int32, 0 on padding.
      how: the Forward; where its layout spreads positions, arrays are in
        `ops.attention.ring_order`.
      replayed_BTLK: expert ids to use in place of the routers' choice, L the layers that have
        experts; None where routers choose.
      images: (units [U, D], index [B, T]): embeddings of images, by `vision.encode`, and the int32
        row of them that stands in place of a token's embedding, −1 where the token's own does
        (`images.layout.token_units`); None without images.
      sequences: `types.Sequences` of dense rows, for attention that gathers them.
    """
    decoder = Decoder(how, functools.partial(_attend_sequence, how=how))
    replayed = None
    if replayed_BTLK is not None:
        check_ids(replayed_BTLK, tokens_BT, how.model, "replayed_BTLK")
        replayed = jnp.moveaxis(replayed_BTLK, -2, 0)
    shape = tokens_BT.shape
    arrays = (tokens_BT, positions_BT, segment_ids_BT, sequences, images)
    if sequences is not None and not how.model.num_experts:
        # XLA on a CPU sums over [1, tokens, …] many times slower than over [tokens / 64, 64, …],
        # and to gathered sequences the rows are one.
        width = math.gcd(shape[1], 64)
        arrays = jax.tree.map(
            lambda x: x.reshape(-1, width, *x.shape[2:]) if x.shape[:2] == shape else x, arrays
        )
    tokens_BT, positions_BT, segment_ids_BT, sequences, images = arrays
    hidden_BTD, _, routed = decoder.apply(
        {"params": params},
        tokens_BT,
        positions_BT,
        (segment_ids_BT, sequences),
        real=segment_ids_BT > 0,
        replayed=replayed,
        images=images,
    )
    return hidden_BTD.reshape(*shape, -1), routed


def prefill(
    params,
    tokens_RT,
    positions_RT,
    pages,
    runs,
    *,
    how,
    units_UD=None,
    index_RT=None,
):
    """Reads a run of tokens a row into pages: (updated pages, expert ids).

    Under a layout rows are sharded over "batch" and pages as `ops.pages` says. The ids are
    [R, T, L, K], None without experts. Donate the pages: they are updated in place.

    Args:
      params: of the decoder.
      tokens_RT: int32 token ids, left-aligned.
      positions_RT: int32 rotary positions, [R, T, 3] where images give tokens three.
      pages: the pool.
      runs: `paged_prefill.Runs`; tokens after a row's count are ignored.
      how: the Forward.
      units_UD: units of images, as in `forward`.
      index_RT: their index.
    """
    layout = how.layout
    tokens_RT = sharding.constrain(tokens_RT, ("batch", None), layout)
    real_RT = jnp.arange(tokens_RT.shape[1])[None] < runs.counts_R[:, None]
    decoder = Decoder(how, functools.partial(_attend_runs, how=how))
    _, pages, routed = decoder.apply(
        {"params": params},
        tokens_RT,
        positions_RT,
        runs,
        pages,
        last_B=jnp.zeros_like(runs.counts_R),  # nothing reads it: one position is the least
        real=real_RT,
        images=None if units_UD is None else (units_UD, index_RT),
    )
    return pages, _ids(routed, layout)


def decode_step(params, tokens_B, pages, places, *, how, positions_B=None):
    """Reads one more token per row: (hidden state [B, D], updated pages, expert ids).

    Token b sits at position `places.positions_B[b]`, where its key and value are written, and sees
    the entries up to and including its own. Its rotary position is that, or `positions_B[b]`, which
    lags behind after images. The ids are [B, L, K], None without experts; rows that are not
    `places.real_B` go to none. Donate the pages: they are updated in place.
    """
    layout = how.layout
    decoder = Decoder(how, functools.partial(_attend_pages, how=how))
    rotary_B = places.positions_B if positions_B is None else positions_B
    hidden_BD, pages, routed = decoder.apply(
        {"params": params}, tokens_B, rotary_B, places, pages, real=places.real_B
    )
    return sharding.constrain(hidden_BD, ("batch", None), layout), pages, _ids(routed, layout)


def _ids(routed, layout):
    if routed is None:
        return None
    axes = ("batch", *[None] * (routed.expert_ids.ndim - 1))
    return sharding.constrain(routed.expert_ids, axes, layout)


def empty_pages(how, num_pages, page_size, dtype=None):
    """A pool of zero pages: `num_pages` of `page_size` tokens, all devices together.

    Keys and values have `dtype`, by default that of the forward pass; int8 has scales.
    """
    c = how.model
    dtype = jnp.dtype(dtype or how.dtype)
    shape = (c.num_kv_heads, c.num_layers, num_pages, page_size, c.head_dim)
    leaves, treedef = jax.tree.flatten(zeros(shape, dtype))
    axes = jax.tree.leaves(pages_axes(dtype), is_leaf=lambda node: type(node) is tuple)
    placed = [constrain(x, names, how.layout) for x, names in zip(leaves, axes, strict=True)]
    return jax.tree.unflatten(treedef, placed)


def head_kernel(params):
    """Returns the output matrix [V, D]: the head, or the embedding if they are tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits(params, hidden_BD, *, how):
    """Returns logits [B, V], float32, of hidden states in the type of `how`.

    Each device multiplies by its shard of the head: the logits are gathered, not the head.
    """
    values_VD, scales_V = split(head_kernel(params))
    values_VD = values_VD.astype(jnp.dtype(how.dtype))
    logits_BV = jnp.einsum("BD,VD->BV", hidden_BD, values_VD, preferred_element_type=jnp.float32)
    return sharding.constrain(scaled(logits_BV, scales_V), ("batch", "vocab"), how.layout)


def init_params(key, config, dtype=jnp.float32, layout=None):
    """Initialises parameters at random: normal(0, 0.02) matrices, unit norms, zero biases.

    All matrices are slices of one draw: one random generator to compile instead of one per matrix.
    With a layout each device generates its own part, with the same numbers up to rounding.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))
    axes = jax.tree.leaves(param_axes(config), is_leaf=lambda node: isinstance(node, tuple))
    drawn = [leaf.size if path[-1].key in _MATRICES else 0 for path, leaf in leaves]
    if layout is None:
        noise = INIT_STDDEV * jax.random.normal(key, (sum(drawn),), jnp.float32)
    params, start = [], 0
    for (path, leaf), size, names in zip(leaves, drawn, axes, strict=True):
        place = None if layout is None else layout.sharding(names)
        if not size:
            value = float(path[-1].key == "scale")
            params.append(jnp.full(leaf.shape, value, leaf.dtype, device=place))
        elif layout is None:
            params.append(noise[start : start + size].reshape(leaf.shape).astype(leaf.dtype))
        else:
            with jax.enable_x64(True):
                part = _normal_part(key, np.uint64(start), leaf.shape, names, layout)
            params.append(jax.device_put((INIT_STDDEV * part).astype(leaf.dtype), place))
        start += size
    return jax.tree.unflatten(tree, params)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _normal_part(key, start, shape, axes, layout):
    """Draws `normal_slice` sharded over the mesh, one layer after another to save memory."""
    if axes[0] != "layers":
        return constrain(normal_slice(key, start, shape), axes, layout)

    def one(layer):
        offset = layer * np.uint64(math.prod(shape[1:]))
        return constrain(normal_slice(key, start + offset, shape[1:]), axes[1:], layout)

    layers = jax.lax.map(one, jnp.arange(shape[0], dtype=jnp.uint64))
    return constrain(layers, axes, layout)


def abstract_params(config, dtype=jnp.float32):
    """Shapes and types of the parameters, routers float32 at least; nothing is allocated.

    int8 is what `cast` gives: matrices with scales, and bfloat16 for others.
    """
    if is_quantised(dtype):
        return jax.eval_shape(lambda tree: cast(tree, dtype), abstract_params(config))
    how = Forward(config)
    attend_fn = functools.partial(_attend_sequence, how=how)
    init = Decoder(how, attend_fn, param_dtype=dtype).init
    key = jax.eval_shape(jax.random.key, 0)  # the default device may be one to compile for
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(init, key, tokens_BT, tokens_BT, (tokens_BT, None))["params"]
    if config.vision is not None:
        tree = {**tree, "vision": vision.abstract_params(config.vision, dtype)}
    return tree


def cast(params, dtype):
    """Casts parameters to the types of `abstract_params`: routers stay float32.

    int8 rounds each matrix to a Quantised one, and leaves those that are; others are bfloat16.
    Adapters are merged into their matrices first, in float32.

    Raises:
      ValueError: int8, naming a kernel that it does not cover.
    """
    params = merged_tree(params)
    if is_quantised(dtype):
        params, dtype = quantise_tree(params), jnp.bfloat16

    def one(path, x):
        whole = isinstance(x, Quantised) or any(key.key == "router" for key in path)
        return x if whole else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda node: isinstance(node, Quantised)
    )


def param_axes(config, dtype=jnp.float32):
    """Returns the logical axis of every dimension of every parameter, as a tree of tuples.

    In int8, a matrix has a Quantised with the axes of its values and scales.
    """
    if is_quantised(dtype):
        return quantised_axes(param_axes(config))
    norm, matrix = {"scale": ("norm",)}, ("vocab", "embed")
    heads, kv_heads = ("heads", "head_dim"), ("kv_heads", "head_dim")
    attention = {
        "query": {"kernel": ("embed", *heads)},
        "key": {"kernel": ("embed", *kv_heads)},
        "value": {"kernel": ("embed", *kv_heads)},
        "out": {"kernel": (*heads, "embed")},
    }
    if config.qkv_bias:
        attention["query"]["bias"] = heads
        attention["key"]["bias"] = attention["value"]["bias"] = kv_heads
    if config.out_bias:
        attention["out"]["bias"] = ("norm",)
    if config.qk_norm:
        attention["query_norm"] = attention["key_norm"] = {"scale": ("head_dim",)}
    mlp = {name: {"kernel": ("embed", "mlp")} for name in ("gate", "up")}
    mlp["down"] = {"kernel": ("mlp", "embed")}
    experts = {"router": {"kernel": ROUTER_AXES}}
    for name, axes in zip(("gate", "up", "down"), EXPERT_AXES, strict=True):
        experts[name] = {"kernel": axes}
    tree = {"embedding": matrix, "final_norm": norm}
    for stack in config.stacks:
        layer = {"attention_norm": norm, "attention": attention, "mlp_norm": norm}
        layer["mlp"] = experts if stack.experts else mlp
        tree[stack.name] = jax.tree.map(
            lambda axes: ("layers", *axes), layer, is_leaf=lambda node: isinstance(node, tuple)
        )
    if config.vision is not None:
        tree["vision"] = vision.param_axes(config.vision)
    return tree if config.tie_embeddings else tree | {"head": matrix}


def trained_axes(how):
    """Returns the logical axes of what a step changes: the parameters', or the adapter's."""
    axes = param_axes(how.model)
    return axes if how.adapter is None else adapter_axes(axes, how.adapter)


def abstract_trained(how):
    """Returns shapes and types, float32, of what a step changes."""
    params = abstract_params(how.model)
    if how.adapter is None:
        return params
    return abstract_adapter(params, param_axes(how.model), how.adapter)


def abstract_frozen(how):
    """Returns shapes and types of the frozen weights of an adapter."""
    return abstract_base(abstract_params(how.model), param_axes(how.model), how.adapter)


def frozen_axes(how):
    """Returns the logical axes of the frozen weights of an adapter."""
    return base_axes(param_axes(how.model), how.adapter)


def whole_params(base, trained, how):
    """Returns what a forward pass reads: what is trained, or `base` with the adapter in place."""
    return trained if how.adapter is None else composed(base, trained, how.adapter.scale)


def whole_axes(how):
    """Returns the logical axes of what a forward pass reads, with those of an adapter in place."""
    axes = param_axes(how.model)
    return axes if how.adapter is None else whole_params(frozen_axes(how), trained_axes(how), how)


def cut_sizes(config):
    """Returns sizes that a mesh must divide evenly: name in config.json → (logical axis, size)."""
    sizes = {
        "num_key_value_heads": ("kv_heads", config.num_kv_heads),
        "num_attention_heads": ("heads", config.num_heads),
        "vocab_size": ("vocab", config.vocab_size),
        "hidden_size": ("embed", config.embed_dim),
    }
    if config.num_expert_layers < config.num_layers:
        sizes["intermediate_size"] = ("mlp", config.mlp_dim)
    if config.num_experts:
        sizes["moe_intermediate_size"] = ("mlp", config.expert_dim)
        sizes["num_experts"] = ("experts", config.num_experts)
    return sizes if config.vision is None else sizes | vision.cut_sizes(config.vision)
