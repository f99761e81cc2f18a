"""The decoder's Flax modules: layers, and the stacks that scan over them.

Only this file uses Flax. `decoder` has the functions of `(params, arrays)` for all other modules.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from luspo_jax import sharding
from luspo_jax.models.adapted_experts import adapted_mlp
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.experts import expert_mlp, route
from luspo_jax.models.forward import Forward
from luspo_jax.models.layers import (
    BFLOAT16_PRODUCTS,
    add_bias,
    embed,
    project,
    replaced,
    rms_norm,
    rotate,
    rotation_of,
    swiglu,
)
from luspo_jax.models.rope import frequencies
from luspo_jax.ops.precision import wide_type

# Activations that a layer keeps for the backward pass, by name. "none" recomputes nothing; "full"
# recomputes all but the layer's input. Between them, the outputs of all matrix products are kept,
# or those of attention alone, whose recomputation is the most expensive at long lengths. "offload"
# keeps the layer's attention output in host memory.
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


class RMSNorm(nn.Module):
    """`rms_norm` with a learnt scale."""

    config: DecoderConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", _zeros, x.shape[-1:], self.param_dtype)
        return rms_norm(x, scale, self.config.rms_norm_eps)


class Projection(nn.Module):
    """x · kernel (+ bias) over the last `contracted` axes of x; `axes` are the kernel's."""

    axes: tuple[str, ...]
    features: tuple[int, ...]
    param_dtype: Any
    how: Forward
    use_bias: bool = False
    contracted: int = 1

    @nn.compact
    def __call__(self, x):
        shape = x.shape[x.ndim - self.contracted :] + self.features
        kernel = self.param("kernel", _zeros, shape, self.param_dtype)
        precision = BFLOAT16_PRODUCTS if self.how.rounds_products else None
        y = project(x, kernel, self.contracted, self.axes, self.how.layout, precision)
        if self.use_bias:
            bias = self.param("bias", _zeros, self.features, self.param_dtype)
            y = add_bias(y, bias)
        return y


class Attention(nn.Module):
    """Grouped-query attention; `attend_fn` determines what the queries see.

    attend_fn(query, key, value, pages, layer, context) -> (out, pages) also decides where the new
    keys and values are stored.
    """

    how: Forward
    param_dtype: Any
    attend_fn: Any

    @nn.compact
    def __call__(self, x, pages, layer, rotation, context):
        c = self.how.model
        heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)

        def projected(name, features, axis):
            axes = ("embed", axis, "head_dim")
            of = Projection(axes, features, self.param_dtype, self.how, c.qkv_bias, name=name)
            return of(x)

        query = projected("query", heads, "heads")
        key, value = (projected(name, kv_heads, "kv_heads") for name in ("key", "value"))
        if c.qk_norm:
            query = RMSNorm(c, self.param_dtype, name="query_norm")(query)
            key = RMSNorm(c, self.param_dtype, name="key_norm")(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        out, pages = self.attend_fn(query, key, value, pages, layer, context)
        axes = ("heads", "head_dim", "embed")
        merge = Projection(
            axes, (c.embed_dim,), self.param_dtype, self.how, c.out_bias, 2, name="out"
        )
        return merge(out), pages


class MLP(nn.Module):
    """down(silu(gate x) ⊙ up x)."""

    how: Forward
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.how.model

        def projection(name, axes, features):
            return Projection(axes, (features,), self.param_dtype, self.how, name=name)

        gate, up = (projection(name, ("embed", "mlp"), c.mlp_dim)(x) for name in ("gate", "up"))
        return projection("down", ("mlp", "embed"), c.embed_dim)(swiglu(gate, up))


class Weight(nn.Module):
    """A kernel alone."""

    shape: tuple[int, ...]
    param_dtype: Any

    @nn.compact
    def __call__(self):
        return self.param("kernel", _zeros, self.shape, self.param_dtype)


class Experts(nn.Module):
    """Σ_k p_k · MLP_k(x) over the K experts that a router chooses; also returns the routing."""

    how: Forward
    param_dtype: Any

    @nn.compact
    def __call__(self, x, real, replayed):
        c, dtype, layout = self.how.model, self.param_dtype, self.how.layout
        # Whatever the others' type: rounded, it would choose other experts than the trainer's.
        router = Weight((c.embed_dim, c.num_experts), _wide(dtype), name="router")
        inward, outward = (c.embed_dim, c.expert_dim), (c.expert_dim, c.embed_dim)
        kernels = tuple(
            Weight((c.num_experts, *shape), dtype, name=name)()
            for name, shape in (("gate", inward), ("up", inward), ("down", outward))
        )
        weights, routed, sent = route(
            x,
            router(),
            count=c.experts_per_token,
            normalise=c.norm_topk,
            replayed=replayed,
            real=real,
            layout=layout,
        )
        # A sampler's kernels of few bits are multiplied as they are.
        mlp = expert_mlp if self.how.adapter is None else adapted_mlp
        return mlp(x, sent, weights, kernels, self.how.expert_kernel, layout), routed


class Layer(nn.Module):
    """Pre-norm residual layer, with the signature of a scan body.

    `real` is false on padding; `replayed` has expert ids that replace the router's.
    """

    how: Forward
    param_dtype: Any
    attend_fn: Any
    experts: bool  # in place of an ordinary MLP

    @nn.compact
    def __call__(self, carry, layer, replayed, rotation, context, real):
        x, pages = carry
        c, dtype, layout = self.how.model, self.param_dtype, self.how.layout
        normed = RMSNorm(c, dtype, name="attention_norm")(x)
        attention = Attention(self.how, dtype, self.attend_fn, name="attention")
        out, pages = attention(normed, pages, layer, rotation, context)
        x = placed(x + out, layout)
        normed = RMSNorm(c, dtype, name="mlp_norm")(x)
        routed = None
        if self.experts:
            out, routed = Experts(self.how, dtype, name="mlp")(normed, real, replayed)
        else:
            out = MLP(self.how, dtype, name="mlp")(normed)
        x = placed(x + out, layout)
        return (x, pages), routed


def placed(x, layout):
    """Shards activations [B, T, D], or [B, D] for one token per row, by the layout."""
    axes = ("batch", None) if x.ndim == 2 else ("batch", "length", None)
    return sharding.constrain(x, axes, layout)


class Decoder(nn.Module):
    """Embedding, stacked layers, and the final norm at the requested positions."""

    how: Forward
    attend_fn: Any
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens,
        positions,
        context,
        pages=None,
        last_B=None,
        real=None,
        replayed=None,
        images=None,
    ):
        c, layout = self.how.model, self.how.layout
        matrix = (c.vocab_size, c.embed_dim)
        embedding_VD = self.param("embedding", _zeros, matrix, self.param_dtype)
        if not c.tie_embeddings:
            self.param("head", _zeros, matrix, self.param_dtype)
        x = embed(embedding_VD, tokens, jnp.dtype(self.how.dtype), layout)
        if images is not None:
            x = replaced(x, *images, layout)
        sections = c.mrope_section if positions.ndim > tokens.ndim else ()
        scaling = c.rope_scaling
        rotation = rotation_of(
            positions,
            frequencies(c.head_dim, c.rope_theta, scaling),
            sections,
            1.0 if scaling is None else scaling.rotation_factor,
        )
        routed = []
        for stack in c.stacks:
            done = sum(part.load_LE.shape[0] for part in routed)
            own = None
            if stack.experts and replayed is not None:
                own = replayed[done : done + stack.count]
            layers = jnp.arange(stack.start, stack.start + stack.count)
            scanned = self._scanned(stack)
            (x, pages), found = scanned((x, pages), layers, own, rotation, context, real)
            routed += [found] if stack.experts else []
        if last_B is not None:
            x = jnp.take_along_axis(x, last_B[:, None, None], axis=1, mode="clip")[:, 0]
            x = placed(x, layout)
        x = RMSNorm(c, self.param_dtype, name="final_norm")(x)
        return x, pages, self._recorded(routed)

    def _scanned(self, stack):
        body = Layer
        if self.how.remat != "none":
            body = nn.remat(Layer, prevent_cse=False, policy=REMAT[self.how.remat])
        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=stack.count,
        )
        return scanned(self.how, self.param_dtype, self.attend_fn, stack.experts, name=stack.name)

    def _recorded(self, routed):
        """Returns Routed for all layers with experts, [..., L, K]; None without experts."""
        if not routed:
            return None
        routed = _joined(routed)
        return dataclasses.replace(routed, expert_ids=jnp.moveaxis(routed.expert_ids, 0, -2))


def _wide(dtype):
    return wide_type(jax.ShapeDtypeStruct((), dtype))


def _joined(stacks):
    """Concatenates several trees along their layers."""
    return stacks[0] if len(stacks) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)
