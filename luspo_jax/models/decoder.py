"""Qwen2.5 and Qwen3 dense decoders: one stack of scanned layers with switches.

Flax stays in this file. Outside, parameters are a nested dict (layers stacked on a leading axis)
and everything is a function of `(params, arrays)`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from luspo_jax import sharding
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.layers import (
    add_bias,
    embed,
    project,
    rms_norm,
    rotate,
    rotation_of,
    swiglu,
)
from luspo_jax.ops.attention import attention as attend
from luspo_jax.ops.decode_attention import CACHE_AXES, append_and_attend
from luspo_jax.ops.normal_slice import normal_slice
from luspo_jax.sharding import constrain

INIT_STDDEV = 0.02  # initializer_range of the Qwen configurations
_MATRICES = ("kernel", "embedding", "head")  # leaves drawn at random, by the last key of their path

# What a layer keeps for the backward pass, by name. "none" recomputes nothing and "full" all but
# the layer's input; between them, the outputs of all matrix products, or of the attention alone,
# whose recomputation is the dearest at long lengths. "offload" keeps the layer's attention output
# in host memory.
_policies = jax.checkpoint_policies
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "attention": _policies.save_only_these_names("attention_out", "attention_lse"),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["attention_out", "attention_lse"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

# Modules only declare shapes; `init_params` fills them, with one random draw for all.
_zeros = nn.initializers.zeros


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of every layer: [L, B, K, S, H] each."""

    keys_LBKSH: jax.Array
    values_LBKSH: jax.Array


class RMSNorm(nn.Module):
    """`rms_norm` with its learnt scale."""

    config: DecoderConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", _zeros, x.shape[-1:], self.param_dtype)
        return rms_norm(x, scale, self.config.rms_norm_eps)


class Projection(nn.Module):
    """x · kernel (+ bias) over the last `contracted` axes of x; `axes` are those of the kernel."""

    axes: tuple[str, ...]
    features: tuple[int, ...]
    param_dtype: Any
    layout: Any
    use_bias: bool = False
    contracted: int = 1

    @nn.compact
    def __call__(self, x):
        shape = x.shape[x.ndim - self.contracted :] + self.features
        kernel = self.param("kernel", _zeros, shape, self.param_dtype)
        y = project(x, kernel, self.contracted, self.axes, self.layout)
        if self.use_bias:
            bias = self.param("bias", _zeros, self.features, self.param_dtype)
            y = add_bias(y, bias)
        return y


class Attention(nn.Module):
    """Grouped-query attention; `attend_fn` decides what the queries see.

    attend_fn(query, key, value, cache, layer, context) -> (out, cache, kept): the new keys and
    values go wherever it puts them.
    """

    config: DecoderConfig
    param_dtype: Any
    attend_fn: Any
    layout: Any

    @nn.compact
    def __call__(self, x, cache, layer, rotation, context):
        c = self.config
        heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)

        def projected(name, features, axis):
            axes = ("embed", axis, "head_dim")
            of = Projection(axes, features, self.param_dtype, self.layout, c.qkv_bias, name=name)
            return of(x)

        query = projected("query", heads, "heads")
        key, value = (projected(name, kv_heads, "kv_heads") for name in ("key", "value"))
        if c.qk_norm:
            query = RMSNorm(c, self.param_dtype, name="query_norm")(query)
            key = RMSNorm(c, self.param_dtype, name="key_norm")(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        out, cache, kept = self.attend_fn(query, key, value, cache, layer, context)
        axes = ("heads", "head_dim", "embed")
        merge = Projection(
            axes, (c.embed_dim,), self.param_dtype, self.layout, c.out_bias, 2, name="out"
        )
        return merge(out), cache, kept


class MLP(nn.Module):
    """down(silu(gate x) ⊙ up x)."""

    config: DecoderConfig
    param_dtype: Any
    layout: Any

    @nn.compact
    def __call__(self, x):
        def projection(name, axes, features):
            return Projection(axes, (features,), self.param_dtype, self.layout, name=name)

        gate, up = (
            projection(name, ("embed", "mlp"), self.config.mlp_dim)(x) for name in ("gate", "up")
        )
        return projection("down", ("mlp", "embed"), self.config.embed_dim)(swiglu(gate, up))


class Layer(nn.Module):
    """Pre-norm residual layer; its signature is that of a scan body."""

    config: DecoderConfig
    param_dtype: Any
    attend_fn: Any
    layout: Any

    @nn.compact
    def __call__(self, carry, layer, rotation, context):
        x, cache = carry
        c, dtype = self.config, self.param_dtype
        normed = RMSNorm(c, dtype, name="attention_norm")(x)
        attention = Attention(c, dtype, self.attend_fn, self.layout, name="attention")
        out, cache, kept = attention(normed, cache, layer, rotation, context)
        x = _placed(x + out, self.layout)
        normed = RMSNorm(c, dtype, name="mlp_norm")(x)
        x = _placed(x + MLP(c, dtype, self.layout, name="mlp")(normed), self.layout)
        return (x, cache), kept


def _placed(x, layout):
    """Activations [B, T, D], or [B, D] of one token a row, where they belong."""
    axes = ("batch", None) if x.ndim == 2 else ("batch", "length", None)
    return sharding.constrain(x, axes, layout)


class Decoder(nn.Module):
    """Embedding, stacked layers, and the final norm on the positions asked for."""

    config: DecoderConfig
    attend_fn: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    layout: Any = None

    @nn.compact
    def __call__(self, tokens, positions, context, cache=None, last_B=None):
        c = self.config
        matrix = (c.vocab_size, c.embed_dim)
        embedding_VD = self.param("embedding", _zeros, matrix, self.param_dtype)
        if not c.tie_embeddings:
            self.param("head", _zeros, matrix, self.param_dtype)
        x = embed(embedding_VD, tokens, self.dtype, self.layout)
        body = Layer
        if self.remat != "none":
            body = nn.remat(Layer, prevent_cse=False, policy=REMAT[self.remat])
        stack = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, self.param_dtype, self.attend_fn, self.layout, name="layers")
        rotation = rotation_of(positions, c.head_dim, c.rope_theta)
        (x, cache), kept = stack((x, cache), jnp.arange(c.num_layers), rotation, context)
        if last_B is not None:
            x = jnp.take_along_axis(x, last_B[:, None, None], axis=1, mode="clip")[:, 0]
            x = _placed(x, self.layout)
        x = RMSNorm(c, self.param_dtype, name="final_norm")(x)
        return x, cache, kept


def _attend_sequence(
    query, key, value, cache, layer, segment_ids_BT, *, implementation, keep, layout=None
):
    out = attend(
        query,
        key,
        value,
        segment_ids_BT=segment_ids_BT,
        implementation=implementation,
        layout=layout,
    )
    kept = (jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)) if keep else None
    return out, cache, kept


def _attend_cache(query, key, value, cache, layer, lengths_B, *, implementation, layout=None):
    out, keys, values = append_and_attend(
        query,
        (key, value),
        (cache.keys_LBKSH, cache.values_LBKSH),
        layer,
        positions_B=lengths_B,
        implementation=implementation,
        layout=layout,
    )
    return out, KVCache(keys, values), None


def hidden_states(
    params,
    tokens_BT,
    positions_BT,
    segment_ids_BT,
    *,
    config,
    dtype=jnp.float32,
    remat="none",
    attention="reference",
    layout=None,
):
    """Hidden states [B, T, D] after the final norm.

    Args:
      params: as `init_params` makes them, in any floating type.
      tokens_BT: int32 token ids.
      positions_BT: int32 rotary positions, from 0 in each segment.
      segment_ids_BT: int32, 0 on padding.
      config: the DecoderConfig of `params`.
      dtype: type of activations and matmuls; norms, rotation and softmax are float32.
      remat: a key of REMAT: what of a layer is kept for the backward pass.
      attention: an implementation of `ops.attention.attention`.
      layout: where rows, positions and heads lie; where positions are spread, arrays are in
        `ops.attention.ring_order`.
    """
    attend_fn = functools.partial(
        _attend_sequence, implementation=attention, keep=False, layout=layout
    )
    decoder = Decoder(config, attend_fn, dtype, remat=remat, layout=layout)
    return decoder.apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT)[0]


def prefill(
    params, tokens_BT, lengths_B, *, config, dtype=jnp.float32, attention="reference", layout=None
):
    """Hidden state of each row's last token [B, D], and the cache of all, of length T.

    Rows are left-aligned and `lengths_B` ≥ 1 long; what follows a row's length is ignored, and
    what the cache holds there is overwritten as decoding advances. Under a layout rows lie over
    "batch" and key heads over "kv_heads"; positions are on every device.
    """
    B, T = tokens_BT.shape
    tokens_BT = sharding.constrain(tokens_BT, ("batch", None), layout)
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    segment_ids_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
    attend_fn = functools.partial(
        _attend_sequence, implementation=attention, keep=True, layout=layout
    )
    hidden_BD, _, kept = Decoder(config, attend_fn, dtype, layout=layout).apply(
        {"params": params}, tokens_BT, positions_BT, segment_ids_BT, last_B=lengths_B - 1
    )
    axes = (*CACHE_AXES[:3], None, None)
    cache = KVCache(*(sharding.constrain(x, axes, layout) for x in kept))
    return sharding.constrain(hidden_BD, ("batch", None), layout), cache


def decode_step(
    params,
    tokens_B,
    lengths_B,
    cache,
    *,
    config,
    dtype=jnp.float32,
    attention="auto",
    layout=None,
):
    """Hidden state [B, D] of one more token a row, and the cache with it written in.

    Token b sits at position `lengths_B[b]`, where its key and value are written, and sees the
    entries up to and including its own. `attention` is an implementation of
    `ops.decode_attention`; under a layout the cache lies as its `append_and_attend` says. Donate
    the cache: it is updated in place.
    """
    attend_fn = functools.partial(_attend_cache, implementation=attention, layout=layout)
    hidden_BD, cache, _ = Decoder(config, attend_fn, dtype, layout=layout).apply(
        {"params": params}, tokens_B, lengths_B, lengths_B, cache
    )
    return sharding.constrain(hidden_BD, ("batch", None), layout), cache


def empty_cache(config, batch, length, dtype=jnp.float32, layout=None):
    """A zero KVCache for `batch` rows of up to `length` tokens."""
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return KVCache(
        *(sharding.constrain(jnp.zeros(shape, dtype), CACHE_AXES, layout) for _ in range(2))
    )


def head_kernel(params):
    """The output matrix [V, D]: the head's own, or the embedding where they are tied."""
    return params["head"] if "head" in params else params["embedding"]


def init_params(key, config, dtype=jnp.float32, layout=None):
    """Random parameters: normal(0, 0.02) matrices, unit norms, zero biases.

    All matrices are cut from one draw: one random generator to compile instead of one a matrix.
    With a layout the same numbers, up to rounding, are made in place, each device its part.
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
            params.append(jnp.full(leaf.shape, value, dtype, device=place))
        elif layout is None:
            params.append(noise[start : start + size].reshape(leaf.shape).astype(dtype))
        else:
            with jax.enable_x64(True):
                part = _normal_part(key, np.uint64(start), leaf.shape, names, layout)
            params.append(jax.device_put((INIT_STDDEV * part).astype(dtype), place))
        start += size
    return jax.tree.unflatten(tree, params)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _normal_part(key, start, shape, axes, layout):
    """`normal_slice`, spread over the mesh, one layer after another to spare memory."""
    if axes[0] != "layers":
        return constrain(normal_slice(key, start, shape), axes, layout)

    def one(layer):
        offset = layer * np.uint64(math.prod(shape[1:]))
        return constrain(normal_slice(key, start + offset, shape[1:]), axes[1:], layout)

    layers = jax.lax.map(one, jnp.arange(shape[0], dtype=jnp.uint64))
    return constrain(layers, axes, layout)


def abstract_params(config, dtype=jnp.float32):
    """Shapes and types of the parameters; nothing is allocated."""
    attend_fn = functools.partial(_attend_sequence, implementation="reference", keep=False)
    init = Decoder(config, attend_fn, param_dtype=dtype).init
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(init, jax.random.key(0), tokens_BT, tokens_BT, tokens_BT)["params"]


def param_axes(config):
    """The logical axis of every dimension of every parameter, as a tree of tuples."""
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
    layer = {"attention_norm": norm, "attention": attention, "mlp_norm": norm, "mlp": mlp}
    stacked = jax.tree.map(
        lambda axes: ("layers", *axes), layer, is_leaf=lambda node: isinstance(node, tuple)
    )
    tree = {"embedding": matrix, "layers": stacked, "final_norm": norm}
    return tree if config.tie_embeddings else tree | {"head": matrix}
