"""The device side of a rollout: slots, and the compiled programs that fill, grow and advance them.

A slot is one row of the batch: a left-aligned sequence with its own length. Rows never read one
another, so a finished or empty slot computes what nobody looks at.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from luspo_jax.models import decoder
from luspo_jax.rollout.sampling import row_keys, sample, uniforms

BATCH_AXIS, SEQUENCE_AXIS = -4, -2  # of the arrays of a KVCache, [L, B, K, S, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """State of B slots between two chunks.

    Attributes:
      cache: keys and values of the tokens so far.
      hidden_BD: final hidden state of each row's last token, from which the next is sampled.
      keys_B: noise key of each row.
      lengths_B: int32 tokens in the row, prompt included; the position of the next one.
      limits_B: int32 length at which the response is cut.
      active_B: bool, false in finished and empty slots.
    """

    cache: decoder.KVCache
    hidden_BD: jax.Array
    keys_B: jax.Array
    lengths_B: jax.Array
    limits_B: jax.Array
    active_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Prefilled prompts, ready to be copied into slots: hidden_PD and a cache of P rows."""

    hidden_PD: jax.Array
    cache: decoder.KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Refill:
    """Which prompt of the pool goes into which slot, a row each; rows with slot ≥ B are unused.

    The used rows come first.
    """

    slots_B: jax.Array
    pool_rows_B: jax.Array
    lengths_B: jax.Array
    limits_B: jax.Array
    prompt_ids_B: jax.Array
    sample_ids_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of up to C decode steps; row b holds its counts_B[b] tokens in the first steps."""

    tokens_CB: jax.Array
    logprobs_CB: jax.Array
    counts_B: jax.Array
    active_B: jax.Array
    steps: jax.Array


@functools.partial(jax.jit, static_argnames=("num_slots", "length", "config", "dtype"))
def empty_slots(key, *, num_slots, length, config, dtype):
    """Slots that hold nothing, with room for `length` tokens each."""
    return Slots(
        cache=decoder.empty_cache(config, num_slots, length, dtype),
        hidden_BD=jnp.zeros((num_slots, config.embed_dim), dtype),
        keys_B=jnp.broadcast_to(key, (num_slots,)),
        lengths_B=jnp.zeros(num_slots, jnp.int32),
        limits_B=jnp.zeros(num_slots, jnp.int32),
        active_B=jnp.zeros(num_slots, bool),
    )


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def prefill(params, tokens_PT, lengths_P, *, config, dtype):
    """A Pool of the left-aligned prompts `tokens_PT`."""
    return Pool(*decoder.prefill(params, tokens_PT, lengths_P, config=config, dtype=dtype))


@functools.partial(jax.jit, donate_argnames="slots")
def fill(slots, pool, refill, key):
    """Copy prompts of the pool into free slots and start their responses there."""
    B = slots.lengths_B.shape[0]

    def copy(i, cache):
        row, slot = refill.pool_rows_B[i], refill.slots_B[i]
        prompt = jax.tree.map(
            lambda array: jax.lax.dynamic_slice_in_dim(array, row, 1, axis=BATCH_AXIS), pool.cache
        )
        return jax.tree.map(
            lambda array, new: jax.lax.dynamic_update_slice(
                array, new, (0,) * (array.ndim + BATCH_AXIS) + (slot, 0, 0, 0)
            ),
            cache,
            prompt,
        )

    def put(array, new):
        return array.at[refill.slots_B].set(new, mode="drop")

    count = jnp.sum(refill.slots_B < B)
    keys_B = row_keys(key, refill.prompt_ids_B, refill.sample_ids_B)
    return Slots(
        cache=jax.lax.fori_loop(0, count, copy, slots.cache),
        hidden_BD=put(slots.hidden_BD, pool.hidden_PD[refill.pool_rows_B]),
        keys_B=put(slots.keys_B, keys_B),
        lengths_B=put(slots.lengths_B, refill.lengths_B),
        limits_B=put(slots.limits_B, refill.limits_B),
        active_B=put(slots.active_B, True),
    )


@functools.partial(jax.jit, static_argnames="length")
def grow(slots, *, length):
    """The same slots with room for `length` tokens each."""

    def pad(array):
        widths = [(0, 0)] * array.ndim
        widths[SEQUENCE_AXIS] = (0, length - array.shape[SEQUENCE_AXIS])
        return jnp.pad(array, widths)

    return dataclasses.replace(slots, cache=jax.tree.map(pad, slots.cache))


@functools.partial(
    jax.jit,
    static_argnames=("config", "sampling", "chunk_length", "dtype"),
    donate_argnames="slots",
)
def decode_chunk(params, slots, max_steps, leave_at, *, config, sampling, chunk_length, dtype):
    """Up to `max_steps` ≤ chunk_length tokens for every active slot, in one program.

    Leaves as soon as `leave_at` slots are free. The slots are donated: the cache is updated in
    place.

    Returns:
      The slots, and the Chunk of what was sampled.
    """
    B = slots.lengths_B.shape[0]
    kernel_VD = decoder.head_kernel(params).astype(dtype)
    chunk = Chunk(
        tokens_CB=jnp.zeros((chunk_length, B), jnp.int32),
        logprobs_CB=jnp.zeros((chunk_length, B), jnp.float32),
        counts_B=jnp.zeros(B, jnp.int32),
        active_B=slots.active_B,
        steps=jnp.int32(0),
    )

    def unfinished(carry):
        slots, chunk = carry
        return (chunk.steps < max_steps) & (jnp.sum(~slots.active_B) < leave_at)

    def body(carry):
        slots, chunk = carry
        logits_BV = jnp.einsum(
            "BD,VD->BV", slots.hidden_BD, kernel_VD, preferred_element_type=jnp.float32
        )
        uniforms_B2 = uniforms(slots.keys_B, slots.lengths_B)
        tokens_B, logprobs_B = sample(logits_BV, uniforms_B2, sampling=sampling)
        chunk = _record(chunk, slots.active_B, tokens_B, logprobs_B)
        slots = _advance(slots, tokens_B, params, config=config, sampling=sampling, dtype=dtype)
        return slots, chunk

    slots, chunk = jax.lax.while_loop(unfinished, body, (slots, chunk))
    return slots, dataclasses.replace(chunk, active_B=slots.active_B)


def _record(chunk, active_B, tokens_B, logprobs_B):
    return dataclasses.replace(
        chunk,
        tokens_CB=chunk.tokens_CB.at[chunk.steps].set(tokens_B),
        logprobs_CB=chunk.logprobs_CB.at[chunk.steps].set(logprobs_B),
        counts_B=chunk.counts_B + active_B.astype(jnp.int32),
        steps=chunk.steps + 1,
    )


def _advance(slots, tokens_B, params, *, config, sampling, dtype):
    """Append `tokens_B` to the active rows, and end those that stop or are full."""
    # Others decode at position 0 of their own row: it costs least, and a refill writes over it.
    positions_B = jnp.where(slots.active_B, slots.lengths_B, 0)
    hidden_BD, cache = decoder.decode_step(
        params, tokens_B, positions_B, slots.cache, config=config, dtype=dtype
    )
    lengths_B = slots.lengths_B + slots.active_B.astype(jnp.int32)
    stops = jnp.asarray(sampling.stop_token_ids, jnp.int32)
    stopped_B = jnp.any(tokens_B[:, None] == stops[None, :], axis=-1)
    return dataclasses.replace(
        slots,
        cache=cache,
        hidden_BD=hidden_BD,
        lengths_B=lengths_B,
        active_B=slots.active_B & ~stopped_B & (lengths_B < slots.limits_B),
    )
