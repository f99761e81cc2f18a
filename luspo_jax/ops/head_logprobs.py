"""Log-probs and entropies of given tokens from hidden states, without a [B, T, V] array."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.ops.moves import moved
from luspo_jax.ops.precision import wide_type
from luspo_jax.sharding import Layout


def head_logprobs(
    hidden_BTD: jax.Array,
    kernel_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    temperature: float,
    chunk_tokens: int,
    layout: Layout | None = None,
    collision: bool = False,
) -> tuple[jax.Array, ...]:
    """Computes the log-prob of each target and the entropy, in chunks of positions.

        log p_t = z_target − logsumexp(z),   H_t = −Σ_v p_v log p_v,   z = h·Wᵀ / temperature

    and, with `collision`, Σ_v p_v², the probability that two draws are the same token.

    Logits exist for one chunk of positions at a time, forward and backward (the backward pass
    recomputes them). Chunks that the mask leaves empty are skipped: prompts and right padding cost
    no head. Products accumulate in float32, or float64 for float64 inputs.

    With a layout each device computes its own rows and positions. The weights are gathered once, in
    the hidden states' type; their gradient is summed in float32 and returned in the weights'
    sharding. A sharded vocabulary stays sharded: sums over it are summed over devices.

    Args:
      hidden_BTD: hidden state that predicts `targets_BT` at the same index.
      kernel_VD: head weights in any float type; their gradient has the same type.
      targets_BT: int32 target tokens.
      mask_BT: bool, the positions to compute.
      temperature: divides the logits, > 0.
      chunk_tokens: tokens (rows × positions) per device whose logits exist at one time, at most.
      layout: sharding of rows, positions and weights.
      collision: also compute Σp²; nothing then carries a gradient.

    Returns:
      Log-probs (nats, ≤ 0) and entropies (nats, ≥ 0) in the accumulator's type, and Σp² if asked
        for; 0 where masked.

    Raises:
      ValueError: a temperature or a number of tokens that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0 to score tokens, got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be ≥ 1, got {chunk_tokens}")
    inputs = _Inputs(hidden_BTD, kernel_VD, targets_BT, mask_BT)
    if collision:
        found = _scored_parts(1.0 / temperature, chunk_tokens, layout, inputs, collision=True)
        logprobs_BT, entropy_BT, _, collision_BT = jax.lax.stop_gradient(found)
        return logprobs_BT, entropy_BT, collision_BT
    return _scored(1.0 / temperature, chunk_tokens, layout, inputs)


class _Inputs(NamedTuple):
    """The arrays of `head_logprobs`, or one thing for each of them, such as its axes."""

    hidden_BTD: Any
    kernel_VD: Any
    targets_BT: Any
    mask_BT: Any


_ROWS, _KERNEL = ("batch", "length"), ("vocab", "embed")
_AXES = _Inputs(("batch", "length", None), _KERNEL, _ROWS, _ROWS)


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """The part of the vocabulary on this device, and the mesh axes that hold the rest.

    `kernel` is [V, D], or [D, V] where it is gathered along D: collectives of a GPU join and cut
    the slowest axis, and transpose the whole of it before or after them for any other one.
    """

    kernel: jax.Array
    names: tuple[str, ...]
    axes: str = "vd"

    @property
    def size(self):
        return self.kernel.shape[self.axes.index("v")]

    def logits(self, hidden_BCD, scale):
        return scale * self._product(f"bcd,{self.axes}->bcv", hidden_BCD, self.kernel)

    def hidden_grads(self, d_logits_BCV):
        return self.total(self._product(f"bcv,{self.axes}->bcd", d_logits_BCV, self.kernel))

    def _product(self, how, x, y):
        return jnp.einsum(how, x, y, preferred_element_type=wide_type(x))

    def is_target(self, targets_BC):
        # A comparison instead of a gather: it fuses, and the token may be on another device.
        vocab = self.size
        if self.names:
            targets_BC = targets_BC - jax.lax.axis_index(self.names) * vocab
        return targets_BC[..., None] == jnp.arange(vocab, dtype=targets_BC.dtype)[None, None, :]

    def total(self, x):
        """Sums a partial sum over all parts of the vocabulary."""
        return jax.lax.psum(x, self.names) if self.names else x

    def logsumexp(self, logits_BCV):
        if not self.names:
            return jax.nn.logsumexp(logits_BCV, axis=-1)
        top_BC = jax.lax.pmax(jnp.max(logits_BCV, axis=-1), self.names)
        masses_BCV = jnp.exp(logits_BCV - top_BC[..., None])
        return top_BC + jnp.log(self.total(jnp.sum(masses_BCV, axis=-1)))


def _vocabulary(kernel_VD, dtype, layout):
    kernel_VD = kernel_VD.astype(dtype)
    if layout is None:
        return _Vocabulary(kernel_VD, ())
    names = layout.axis_names("vocab")
    cut = layout.axis_names("embed")
    if cut and layout.mesh.devices.flat[0].platform != "tpu":
        return _Vocabulary(jax.lax.all_gather(kernel_VD.T, cut, axis=0, tiled=True), names, "dv")
    if cut:
        kernel_VD = jax.lax.all_gather(kernel_VD, cut, axis=1, tiled=True)
    return _Vocabulary(kernel_VD, names)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Tokens that are computed together, [chunks, b, c]; b · c are `_chunk_tokens`.

    On one device those that the mask asks for come first, so that no chunk but one holds others.

    Attributes:
      shape: of the arrays [B, T].
      parts: (b, c); on a mesh b is B, because its rows stay where they are.
      order: int32 token of each place, B · T for none; None on a mesh.
      places: int32 place of each token.
    """

    shape: tuple[int, int]
    parts: tuple[int, int]
    order: jax.Array | None = None
    places: jax.Array | None = None

    def cut(self, x_BT):
        """Cuts [B, T, …] into [chunks, b, c, …], zeros where there are no tokens."""
        if self.order is not None:
            flat = moved(x_BT.reshape(-1, *x_BT.shape[2:]), self.order, self.places)
            return flat.reshape(-1, *self.parts, *x_BT.shape[2:])
        batch, chunk = self.parts
        x_BT = jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % chunk), *[(0, 0)] * (x_BT.ndim - 2)))
        return x_BT.reshape(batch, -1, chunk, *x_BT.shape[2:]).swapaxes(0, 1)

    def joined(self, x_NBC):
        """Undoes `cut`."""
        rest = x_NBC.shape[3:]
        if self.order is not None:
            flat = moved(x_NBC.reshape(-1, *rest), self.places, self.order)
            return flat.reshape(*self.shape, *rest)
        x_BT = x_NBC.swapaxes(0, 1).reshape(self.shape[0], -1, *rest)
        return x_BT[:, : self.shape[1]]


_TOGETHER = 32  # tokens on the last axis of a chunk: XLA on CPU reduces [1, tokens, V] slowly


def _chunks(chunk_tokens, mask_BT, layout):
    B, T = mask_BT.shape
    if layout is not None:
        return _Chunks((B, T), (B, min(max(1, chunk_tokens // B), T)))
    size = min(chunk_tokens, B * T)
    parts = (size // _TOGETHER, _TOGETHER) if size >= _TOGETHER else (1, size)
    size = parts[0] * parts[1]
    wanted_N = mask_BT.reshape(-1)
    counted_N = jnp.cumsum(wanted_N, dtype=jnp.int32)
    others_N = counted_N[-1] + jnp.arange(B * T, dtype=jnp.int32) - counted_N
    places_N = jnp.where(wanted_N, counted_N - 1, others_N)
    order_N = jnp.argsort(places_N).astype(jnp.int32)
    order_N = jnp.pad(order_N, (0, -(B * T) % size), constant_values=B * T)
    return _Chunks((B, T), parts, order_N, places_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scored(scale, chunk_tokens, layout, inputs):
    return _scored_forward(scale, chunk_tokens, layout, inputs)[0]


def _scored_forward(scale, chunk_tokens, layout, inputs):
    found = _scored_parts(scale, chunk_tokens, layout, inputs, collision=False)
    logprobs_BT, entropy_BT, normalizer_BT = found
    return (logprobs_BT, entropy_BT), (inputs, entropy_BT, normalizer_BT)


def _scored_parts(scale, chunk_tokens, layout, inputs, *, collision):
    local = functools.partial(_forward, scale, chunk_tokens, layout, collision=collision)
    return sharding.shard_map(local, layout, [_AXES], (_ROWS,) * (3 + collision))(inputs)


def _forward(scale, chunk_tokens, layout, inputs, *, collision):
    hidden_BTD, kernel_VD, targets_BT, mask_BT = inputs
    vocabulary = _vocabulary(kernel_VD, hidden_BTD.dtype, layout)
    chunks = _chunks(chunk_tokens, mask_BT, layout)

    def score(hidden_BCD, targets_BC):
        logits_BCV = vocabulary.logits(hidden_BCD, scale)
        normalizer_BC = vocabulary.logsumexp(logits_BCV)
        is_target = vocabulary.is_target(targets_BC)
        target_BC = vocabulary.total(jnp.sum(jnp.where(is_target, logits_BCV, 0.0), axis=-1))
        # −Σ p log p instead of logsumexp − Σ p z, which cancels for large logits.
        logp_BCV = logits_BCV - normalizer_BC[..., None]
        entropy_BC = -vocabulary.total(jnp.sum(jnp.exp(logp_BCV) * logp_BCV, axis=-1))
        # Rounding may leave log p at +1e-7 and the entropy of a certain choice at −1e-7.
        logprobs_BC = jnp.minimum(target_BC - normalizer_BC, 0.0)
        found = logprobs_BC, jnp.maximum(entropy_BC, 0.0), normalizer_BC
        if not collision:
            return found
        return *found, vocabulary.total(jnp.sum(jnp.exp(2 * logp_BCV), axis=-1))

    def nothing(hidden_BCD, targets_BC):
        zeros_BC = jnp.zeros(targets_BC.shape, wide_type(hidden_BCD))
        return (zeros_BC,) * (3 + collision)

    def one_chunk(_, xs):
        hidden_BCD, targets_BC, mask_BC = xs
        out = jax.lax.cond(jnp.any(mask_BC), score, nothing, hidden_BCD, targets_BC)
        return None, tuple(jnp.where(mask_BC, x_BC, 0.0) for x_BC in out)

    xs = tuple(chunks.cut(x) for x in (hidden_BTD, targets_BT, mask_BT))
    _, chunked = jax.lax.scan(one_chunk, None, xs)
    return tuple(chunks.joined(x) for x in chunked)


def _scored_backward(scale, chunk_tokens, layout, residuals, cotangents):
    inputs, entropy_BT, normalizer_BT = residuals
    arrays = (inputs, entropy_BT, normalizer_BT, *cotangents)
    d_hidden_BTD, d_kernel_VD = _gradients(scale, chunk_tokens, layout, arrays)
    d_hidden_BTD = d_hidden_BTD.astype(inputs.hidden_BTD.dtype)
    return (_Inputs(d_hidden_BTD, d_kernel_VD.astype(inputs.kernel_VD.dtype), None, None),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gradients(scale, chunk_tokens, layout, arrays):
    return _spread_backward(scale, chunk_tokens, layout, _filled)(*arrays)


def _gradients_forward(scale, chunk_tokens, layout, arrays):
    return _gradients(scale, chunk_tokens, layout, arrays), arrays


def _gradients_backward(scale, chunk_tokens, layout, arrays, cotangents):
    """Differentiates the backward pass, as length pressure does; `_filled` cannot be."""
    return (jax.vjp(_spread_backward(scale, chunk_tokens, layout, _all), *arrays)[1](cotangents),)


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _spread_backward(scale, chunk_tokens, layout, over):
    local = functools.partial(_backward, scale, chunk_tokens, layout, over)
    return sharding.shard_map(local, layout, [_AXES, *[_ROWS] * 4], _AXES[:2])


def _filled(grads, start, mask_NBC, xs):
    """Runs the chunks that the mask does not leave empty.

    A condition that skips the others would copy the weights' gradient, its largest operand and
    result, in each of them.
    """
    filled_N = jnp.any(mask_NBC, axis=(1, 2))
    order_N = jnp.argsort(~filled_N, stable=True)

    def one_chunk(i, carry):
        d_kernel, d_hidden_NBCD = carry
        n = order_N[i]
        at_n = (jax.lax.dynamic_index_in_dim(x, n, keepdims=False) for x in xs)
        d_kernel, d_hidden_BCD = grads(d_kernel, *at_n)
        return d_kernel, jax.lax.dynamic_update_index_in_dim(d_hidden_NBCD, d_hidden_BCD, n, 0)

    count = jnp.sum(filled_N, dtype=jnp.int32)
    return jax.lax.fori_loop(0, count, one_chunk, (start, jnp.zeros_like(xs[0])))


def _all(grads, start, mask_NBC, xs):
    """Runs all chunks, and does nothing in those that the mask leaves empty."""

    def nothing(carry, hidden_BCD, *_):
        return carry, jnp.zeros_like(hidden_BCD)

    def one_chunk(carry, xs):
        mask_BC, *rest = xs
        return jax.lax.cond(jnp.any(mask_BC), grads, nothing, carry, *rest)

    return jax.lax.scan(one_chunk, start, (mask_NBC, *xs))


def _backward(scale, chunk_tokens, layout, over, inputs, *found_BT):
    hidden_BTD, kernel_VD, targets_BT, mask_BT = inputs
    entropy_BT, normalizer_BT, *cotangents = found_BT
    vocabulary = _vocabulary(kernel_VD, hidden_BTD.dtype, layout)
    chunks = _chunks(chunk_tokens, mask_BT, layout)
    # On a CPU the product's left side is transposed by a slow copy: that of the hidden states is
    # the smaller one. Elsewhere the weights' own order saves a copy of the gradient at the end.
    on_cpu = layout is None and sharding.available_devices()[0].platform == "cpu"
    axes = "dv" if on_cpu else vocabulary.axes

    # Length pressure differentiates this in the cotangents; a chunk's logits are not kept.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def grads(carry, hidden_BCD, targets_BC, entropy_BC, normalizer_BC, d_logprob_BC, d_entropy_BC):
        logp_BCV = vocabulary.logits(hidden_BCD, scale) - normalizer_BC[..., None]
        # d log p / dz = 1[target] − p ;  dH / dz = −p (log p + H)
        d_logits_BCV = -jnp.exp(logp_BCV) * (
            d_logprob_BC[..., None] + d_entropy_BC[..., None] * (logp_BCV + entropy_BC[..., None])
        ) + jnp.where(vocabulary.is_target(targets_BC), d_logprob_BC[..., None], 0.0)
        d_logits_BCV = (scale * d_logits_BCV).astype(hidden_BTD.dtype)
        d_hidden_BCD = vocabulary.hidden_grads(d_logits_BCV)
        d_kernel = jnp.einsum(
            f"bcd,bcv->{axes}",
            hidden_BCD,
            d_logits_BCV,
            preferred_element_type=wide_type(hidden_BCD),
        )
        return carry + d_kernel, d_hidden_BCD.astype(hidden_BTD.dtype)

    d_logprobs_BT, d_entropy_BT = (
        jnp.where(mask_BT, x_BT, 0.0).astype(wide_type(hidden_BTD)) for x_BT in cotangents
    )
    mask_NBC, *xs = (
        chunks.cut(x)
        for x in (
            mask_BT, hidden_BTD, targets_BT, entropy_BT, normalizer_BT, d_logprobs_BT, d_entropy_BT
        )
    )  # fmt: skip
    sizes = {"v": vocabulary.size, "d": hidden_BTD.shape[-1]}
    start = jnp.zeros([sizes[axis] for axis in axes], wide_type(kernel_VD))
    d_kernel, d_hidden = over(grads, start, mask_NBC, tuple(xs))
    if axes == "vd":
        d_kernel_VD = sharding.summed_over_rows(d_kernel, _KERNEL, layout)
    else:
        d_kernel_VD = sharding.summed_over_rows(d_kernel, _KERNEL[::-1], layout).T
    return chunks.joined(d_hidden), d_kernel_VD


_scored.defvjp(_scored_forward, _scored_backward)
