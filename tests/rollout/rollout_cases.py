"""Small models and independent recomputations that the rollout tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.rollout import Request
from luspo_jax.rollout import sampling as s


def config(vocab_size=97, *, embed_dim=32, num_layers=2, tie_embeddings=True, model_type="qwen3"):
    """A small decoder of either family: Qwen3 norms queries and keys, Qwen2 adds to them."""
    return DecoderConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        mlp_dim=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        tie_embeddings=tie_embeddings,
        max_position=512,
    )


@functools.lru_cache
def random_params(model, *, scale=10.0):
    """Random weights, matrices `scale` times the usual, so that the next token matters."""

    def scaled(path, x):
        if path[-1].key == "bias":
            return 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
        return x if path[-1].key == "scale" else x * scale

    return jax.tree_util.tree_map_with_path(scaled, decoder.init_params(jax.random.key(0), model))


def countdown(longest):
    """(config, params) of a model that answers n with n − 1, …, 1, 0: lengths made to order."""
    model = config(longest + 1, embed_dim=longest + 1, num_layers=1, tie_embeddings=False)
    params = jax.tree.map(jnp.zeros_like, decoder.init_params(jax.random.key(0), model))
    params["embedding"] = jnp.eye(longest + 1)
    params["final_norm"] = jax.tree.map(jnp.ones_like, params["final_norm"])
    params["head"] = 30.0 * jnp.eye(longest + 1, k=1)
    return model, params


def requests_of(lengths, vocab_size, *, seed=0):
    """Random prompts of the given lengths; prompt_ids are not their places in the list."""
    rng = np.random.default_rng(seed)
    return [Request(1000 + 7 * i, rng.integers(0, vocab_size, n)) for i, n in enumerate(lengths)]


@functools.partial(jax.jit, static_argnames="model")
def _logits_BTV(params, tokens_BT, lengths_B, *, model):
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    segment_ids_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
    hidden_BTD = decoder.hidden_states(
        params, tokens_BT, positions_BT, segment_ids_BT, how=Forward(model)
    )
    return jnp.einsum("BTD,VD->BTV", hidden_BTD, decoder.head_kernel(params))


def teacher_logits(model, params, requests, responses):
    """Float64 logits [response tokens, V] that each response was drawn from, by a full forward."""
    prompts = {request.prompt_id: np.asarray(request.tokens) for request in requests}
    rows = [np.concatenate([prompts[r.prompt_id], r.tokens]) for r in responses]
    lengths_B = np.asarray([len(row) for row in rows], np.int32)
    tokens_BT = np.zeros((len(rows), max(lengths_B)), np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)] = row
    logits_BTV = np.asarray(_logits_BTV(params, tokens_BT, lengths_B, model=model), np.float64)
    starts = [len(prompts[r.prompt_id]) - 1 for r in responses]
    return [
        logits_BTV[b, start : start + len(r.tokens)]
        for b, (start, r) in enumerate(zip(starts, responses, strict=True))
    ]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def noise(seed, step, request, response):
    """float32 uniforms [response tokens, 2] by the noise law, one fold at a time."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    key = jax.random.fold_in(jax.random.fold_in(key, request.prompt_id), response.sample_id)
    return np.asarray(_uniforms(key))[len(request.tokens) :][: len(response.tokens)]


@jax.jit
def _uniforms(key):
    return s.uniforms(jnp.broadcast_to(key, (64,)), jnp.arange(64, dtype=jnp.int32))


def boundary_distance(logits_V, uniforms_2):
    """How far the two uniforms of a draw lie from the nearest edge of either of their CDFs."""
    p = np.exp(log_softmax(logits_V))
    Y = s.block_size(len(p))
    starts = np.arange(0, len(p), Y)
    masses = np.cumsum(np.add.reduceat(p, starts))
    block = min(np.searchsorted(masses, uniforms_2[0], side="right"), len(starts) - 1)
    # Beside an edge of the blocks either neighbour may be drawn; the first level decides alone.
    within = np.cumsum(p[block * Y : (block + 1) * Y])
    within = within / within[-1]
    return min(
        np.abs(masses[:-1] - uniforms_2[0]).min(initial=1.0),
        np.abs(within[:-1] - uniforms_2[1]).min(initial=1.0),
    )


def drawn_token(logits_V, uniforms_2):
    """The two-level inverse CDF in float64."""
    p = np.exp(log_softmax(logits_V))
    Y = s.block_size(len(p))
    masses = np.cumsum(np.add.reduceat(p, np.arange(0, len(p), Y)))
    block = np.searchsorted(masses, uniforms_2[0] * masses[-1], side="right")
    within = np.cumsum(p[block * Y : (block + 1) * Y])
    return block * Y + np.searchsorted(within, uniforms_2[1] * within[-1], side="right")
