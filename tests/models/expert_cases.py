"""A mixture of experts computed without dispatch, and a decoder of them without scan or sharding.

What the tests of experts, of the router in training, and of the sampler's records compare with.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.layers import rms_norm, rotate, rotation_of
from luspo_jax.models.rope import frequencies

MESHES = {
    "expert 8": {"expert": 8},
    "fsdp 8": {"fsdp": 8},
    "fsdp 2, expert 4": {"fsdp": 2, "expert": 4},
    "expert 2, context 2, tensor 2": {"expert": 2, "context": 2, "tensor": 2},
    "data 2, expert 2, tensor 2": {"data": 2, "expert": 2, "tensor": 2},
}


def config(num_experts=8, experts_per_token=2, *, num_layers=5, dense_layers=(), **fields):
    """A small Qwen3-MoE; 5 layers are a size that no other dimension has."""
    sizes = {"vocab_size": 96, "embed_dim": 32, "mlp_dim": 48, "expert_dim": 16} | fields
    return DecoderConfig(
        model_type="qwen3_moe",
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=True,
        max_position=512,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        norm_topk=True,
        dense_layers=dense_layers,
        **sizes,
    )


def is_router(path):
    return any(getattr(key, "key", None) == "router" for key in path)


@functools.cache
def params(model, seed=0, scale=10.0):
    """Random weights, matrices `scale` times the usual: routers with a will of their own."""
    drawn = decoder.init_params(jax.random.key(seed), model)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key == "scale" else x * scale, drawn
    )


def with_other_routers(tree, size):
    """The same policy but for its routers, which are `size` of their spread away."""

    def moved(path, x):
        noise = size * jnp.std(x) * jax.random.normal(jax.random.key(9), x.shape, x.dtype)
        return x + noise if is_router(path) else x

    return jax.tree_util.tree_map_with_path(moved, tree)


def mixture(ids, x, weights, kernels):
    """Σ_k weight_k · expert_{id_k}(x): every expert computes every token."""
    gate, up, down = kernels
    share = jnp.sum(jax.nn.one_hot(ids, gate.shape[0], dtype=x.dtype) * weights[..., None], -2)
    hidden = jax.nn.silu(jnp.einsum("...d,edf->...ef", x, gate))
    hidden = hidden * jnp.einsum("...d,edf->...ef", x, up)
    return jnp.einsum("...ef,efd,...e->...d", hidden, down, share)


def plain_forward(tree, tokens_BT, positions_BT, segment_ids_BT, model, replayed_BTLK=None):
    """(hidden states, ids [B, T, L, K], probabilities [B, T, L, E]), layer by layer."""
    x = tree["embedding"][tokens_BT]
    turn = rotation_of(positions_BT, frequencies(model.head_dim, model.rope_theta))
    places = jnp.arange(tokens_BT.shape[1])
    seen = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    seen = seen & (places[None, :, None] >= places[None, None, :])
    groups, all_ids, all_probs = model.num_heads // model.num_kv_heads, [], []
    for stack in model.stacks:
        for index in range(stack.count):
            p = jax.tree.map(lambda v, index=index: v[index], tree[stack.name])
            normed = rms_norm(x, p["attention_norm"]["scale"], model.rms_norm_eps)
            qkv = [
                jnp.einsum("btd,dnh->btnh", normed, p["attention"][name]["kernel"])
                for name in ("query", "key", "value")
            ]
            for i, name in enumerate(("query_norm", "key_norm")):
                scale = p["attention"][name]["scale"]
                qkv[i] = rotate(rms_norm(qkv[i], scale, model.rms_norm_eps), turn)
            query, key, value = qkv[0], *(jnp.repeat(v, groups, axis=2) for v in qkv[1:])
            logits = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(model.head_dim)
            attend = jax.nn.softmax(jnp.where(seen[:, None], logits, -1e30), axis=-1)
            out = jnp.einsum("bnts,bsnh->btnh", attend, value)
            x = x + jnp.einsum("btnh,nhd->btd", out, p["attention"]["out"]["kernel"])
            normed, mlp = rms_norm(x, p["mlp_norm"]["scale"], model.rms_norm_eps), p["mlp"]
            kernels = [mlp[name]["kernel"] for name in ("gate", "up", "down")]
            if not stack.experts:
                hidden = jax.nn.silu(normed @ kernels[0]) * (normed @ kernels[1])
                x = x + hidden @ kernels[2]
                continue
            probs = jax.nn.softmax(normed @ mlp["router"]["kernel"], axis=-1)
            ids = jnp.argsort(-probs, axis=-1, stable=True)[..., : model.experts_per_token]
            all_ids.append(ids)
            all_probs.append(probs)
            if replayed_BTLK is not None:
                ids = replayed_BTLK[:, :, len(all_ids) - 1].astype(int)
            weights = jnp.take_along_axis(probs, ids, -1)
            weights = weights / weights.sum(-1, keepdims=True) if model.norm_topk else weights
            x = x + mixture(ids, normed, weights, kernels)
    x = rms_norm(x, tree["final_norm"]["scale"], model.rms_norm_eps)
    return x, jnp.stack(all_ids, -2), jnp.stack(all_probs, -2)


def worst(got, expected):
    """max|Δ| / max|expected| of the leaf where it is largest."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))
        for a, b in ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)
    )
