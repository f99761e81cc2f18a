"""Log-probability and entropy of given tokens from hidden states, without a [B, T, V] array."""

import functools

import jax
import jax.numpy as jnp

from luspo_jax.ops.precision import wide_type


def head_logprobs(
    hidden_BTD: jax.Array,
    kernel_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    temperature: float,
    chunk_length: int,
) -> tuple[jax.Array, jax.Array]:
    """Scores `targets_BT` under softmax(hidden · kernelᵀ / temperature), in chunks of positions.

        log p_t = z_target − logsumexp(z),   H_t = −Σ_v p_v log p_v,   z = h·Wᵀ / temperature

    Logits live for one chunk of positions only, forward and backward (the backward pass computes
    them again), and chunks in which nothing is scored are skipped: prompts and right padding cost
    no head. Products accumulate in float32, or float64 where the inputs are.

    Args:
      hidden_BTD: hidden state that predicts `targets_BT` at the same index.
      kernel_VD: head weights.
      targets_BT: int32 tokens to score.
      mask_BT: bool, where to score.
      temperature: divides the logits, > 0.
      chunk_length: positions a chunk; T is padded up to a multiple of it.

    Returns:
      Log-probabilities (nats, ≤ 0) and entropies (nats, ≥ 0) in the accumulator's type, both 0
      where masked.

    Raises:
      ValueError: for a temperature or a chunk length that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0 to score tokens, got {temperature}")
    if chunk_length < 1:
        raise ValueError(f"chunk_length must be ≥ 1, got {chunk_length}")
    length = targets_BT.shape[1]
    chunk = min(chunk_length, length)
    pad = -length % chunk
    if pad:
        hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0)))
        targets_BT = jnp.pad(targets_BT, ((0, 0), (0, pad)))
        mask_BT = jnp.pad(mask_BT, ((0, 0), (0, pad)))
    logprobs_BT, entropy_BT = _scored(
        1.0 / temperature, chunk, hidden_BTD, kernel_VD, targets_BT, mask_BT
    )
    return logprobs_BT[:, :length], entropy_BT[:, :length]


def _logits(hidden_BCD, kernel_VD, scale):
    return scale * jnp.einsum(
        "bcd,vd->bcv", hidden_BCD, kernel_VD, preferred_element_type=wide_type(hidden_BCD)
    )


def _is_target(targets_BC, vocab):
    # A comparison instead of a gather: it fuses, and stays local when the vocabulary is sharded.
    return targets_BC[..., None] == jnp.arange(vocab, dtype=targets_BC.dtype)[None, None, :]


def _to_chunks(x_BT, chunk):
    """[B, T, ...] -> [T/chunk, B, chunk, ...]."""
    batch, length = x_BT.shape[:2]
    return x_BT.reshape(batch, length // chunk, chunk, *x_BT.shape[2:]).swapaxes(0, 1)


def _from_chunks(x_NBC):
    chunks, batch, chunk = x_NBC.shape[:3]
    return x_NBC.swapaxes(0, 1).reshape(batch, chunks * chunk, *x_NBC.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scored(scale, chunk, hidden_BTD, kernel_VD, targets_BT, mask_BT):
    (logprobs_BT, entropy_BT), _ = _scored_forward(
        scale, chunk, hidden_BTD, kernel_VD, targets_BT, mask_BT
    )
    return logprobs_BT, entropy_BT


def _scored_forward(scale, chunk, hidden_BTD, kernel_VD, targets_BT, mask_BT):
    vocab = kernel_VD.shape[0]

    def score(hidden_BCD, targets_BC):
        logits_BCV = _logits(hidden_BCD, kernel_VD, scale)
        normalizer_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        target_BC = jnp.sum(jnp.where(_is_target(targets_BC, vocab), logits_BCV, 0.0), axis=-1)
        # −Σ p log p and not logsumexp − Σ p z, which cancels where logits are large.
        logp_BCV = logits_BCV - normalizer_BC[..., None]
        entropy_BC = -jnp.sum(jnp.exp(logp_BCV) * logp_BCV, axis=-1)
        # Rounding may leave log p at +1e-7 and the entropy of a certain choice at −1e-7.
        logprobs_BC = jnp.minimum(target_BC - normalizer_BC, 0.0)
        return logprobs_BC, jnp.maximum(entropy_BC, 0.0), normalizer_BC

    def nothing(hidden_BCD, targets_BC):
        zeros_BC = jnp.zeros(targets_BC.shape, wide_type(hidden_BCD))
        return zeros_BC, zeros_BC, zeros_BC

    def one_chunk(_, xs):
        hidden_BCD, targets_BC, mask_BC = xs
        out = jax.lax.cond(jnp.any(mask_BC), score, nothing, hidden_BCD, targets_BC)
        return None, tuple(jnp.where(mask_BC, x_BC, 0.0) for x_BC in out)

    xs = tuple(_to_chunks(x, chunk) for x in (hidden_BTD, targets_BT, mask_BT))
    _, chunked = jax.lax.scan(one_chunk, None, xs)
    logprobs_BT, entropy_BT, normalizer_BT = (_from_chunks(x) for x in chunked)
    residuals = (hidden_BTD, kernel_VD, targets_BT, mask_BT, entropy_BT, normalizer_BT)
    return (logprobs_BT, entropy_BT), residuals


def _scored_backward(scale, chunk, residuals, cotangents):
    hidden_BTD, kernel_VD, targets_BT, mask_BT, entropy_BT, normalizer_BT = residuals
    vocab = kernel_VD.shape[0]

    def grads(
        carry_VD, hidden_BCD, targets_BC, entropy_BC, normalizer_BC, d_logprob_BC, d_entropy_BC
    ):
        logp_BCV = _logits(hidden_BCD, kernel_VD, scale) - normalizer_BC[..., None]
        # d log p / dz = 1[target] − p ;  dH / dz = −p (log p + H)
        d_logits_BCV = -jnp.exp(logp_BCV) * (
            d_logprob_BC[..., None] + d_entropy_BC[..., None] * (logp_BCV + entropy_BC[..., None])
        ) + jnp.where(_is_target(targets_BC, vocab), d_logprob_BC[..., None], 0.0)
        d_logits_BCV = (scale * d_logits_BCV).astype(hidden_BTD.dtype)
        d_hidden_BCD = jnp.einsum(
            "bcv,vd->bcd", d_logits_BCV, kernel_VD, preferred_element_type=wide_type(kernel_VD)
        )
        d_kernel_VD = jnp.einsum(
            "bcv,bcd->vd", d_logits_BCV, hidden_BCD, preferred_element_type=wide_type(hidden_BCD)
        )
        return carry_VD + d_kernel_VD, d_hidden_BCD.astype(hidden_BTD.dtype)

    def nothing(carry_VD, hidden_BCD, *_):
        return carry_VD, jnp.zeros_like(hidden_BCD)

    def one_chunk(carry_VD, xs):
        mask_BC, *rest = xs
        return jax.lax.cond(jnp.any(mask_BC), grads, nothing, carry_VD, *rest)

    d_logprobs_BT, d_entropy_BT = (
        jnp.where(mask_BT, x_BT, 0.0).astype(wide_type(hidden_BTD)) for x_BT in cotangents
    )
    xs = tuple(
        _to_chunks(x, chunk)
        for x in (
            mask_BT, hidden_BTD, targets_BT, entropy_BT, normalizer_BT, d_logprobs_BT, d_entropy_BT
        )
    )  # fmt: skip
    d_kernel_VD, d_hidden = jax.lax.scan(
        one_chunk, jnp.zeros(kernel_VD.shape, wide_type(kernel_VD)), xs
    )
    return _from_chunks(d_hidden), d_kernel_VD.astype(kernel_VD.dtype), None, None


_scored.defvjp(_scored_forward, _scored_backward)
