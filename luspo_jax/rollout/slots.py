"""The device side of a rollout: slots, and the compiled programs that fill, grow and advance them.

A slot is one row of the batch: a left-aligned sequence with its own length. Rows never read one
another, so a finished or empty slot computes values that nobody reads.

With a layout, slots and prompts of the pool are sharded over "batch", key heads over "kv_heads" and
the cache positions of slots are dealt out over "cache_length"; without one, all is on one device.
The programs here never move a slot to another device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.models import decoder, vision
from luspo_jax.models.experts import id_type
from luspo_jax.ops.decode_attention import CACHE_AXES, dealt_positions
from luspo_jax.rollout.sampling import row_keys, sample, uniforms
from luspo_jax.types import Images

BATCH_AXIS, SEQUENCE_AXIS = -4, -2  # of the arrays of a KVCache, [L, B, K, S, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """State of B slots between two chunks.

    Attributes:
      cache: keys and values of the tokens so far.
      hidden_BD: final hidden state of each row's last token, from which the next is sampled.
      keys_B: noise key of each row.
      lengths_B: int32 tokens in the row, prompt included; the index of the next token.
      offsets_B: int32 rotary position of the next token minus its index: below 0 after images,
        else 0.
      limits_B: int32 length at which the response is cut.
      active_B: bool, false in finished and empty slots.
    """

    cache: decoder.KVCache
    hidden_BD: jax.Array
    keys_B: jax.Array
    lengths_B: jax.Array
    offsets_B: jax.Array
    limits_B: jax.Array
    active_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptImages:
    """The images of the prompts of one prefill, and their places.

    Attributes:
      images: in the tower's slots.
      units_PT: int32 unit that replaces a token, −1 for text.
      positions_PT3: int32 rotary positions.
    """

    images: Images
    units_PT: jax.Array
    positions_PT3: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Prefilled prompts, ready to be copied into slots: hidden_PD and a cache of P rows."""

    hidden_PD: jax.Array
    cache: decoder.KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Refill:
    """Pairs of pool prompt and slot, one per row; rows with slot ≥ B are unused.

    The used rows come first.
    """

    slots_B: jax.Array
    pool_rows_B: jax.Array
    lengths_B: jax.Array
    offsets_B: jax.Array
    limits_B: jax.Array
    prompt_ids_B: jax.Array
    sample_ids_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of up to C decode steps; row b has counts_B[b] tokens, in the first steps.

    `expert_ids_CBLK` holds the expert ids of each token, None if not recorded.
    """

    tokens_CB: jax.Array
    logprobs_CB: jax.Array
    counts_B: jax.Array
    active_B: jax.Array
    steps: jax.Array
    expert_ids_CBLK: jax.Array | None = None


_ROW, _ROWS, _STEPS = ("batch",), ("batch", None), (None, "batch")
_PROMPT_AXES = (*CACHE_AXES[:3], None, None)
SLOTS_AXES = Slots(decoder.KVCache(CACHE_AXES, CACHE_AXES), _ROWS, *[_ROW] * 5)
POOL_AXES = Pool(_ROWS, decoder.KVCache(_PROMPT_AXES, _PROMPT_AXES))
REFILL_AXES = Refill(*[(None,)] * 7)
CHUNK_AXES = Chunk(_STEPS, _STEPS, _ROW, _ROW, ())
_IDS = (*_STEPS, None, None)


def _leaves(axes_tree):
    return jax.tree.leaves(axes_tree, is_leaf=lambda node: isinstance(node, tuple))


def _placed(tree, axes_tree, layout):
    leaves, treedef = jax.tree.flatten(tree)
    placed = [
        sharding.constrain(x, axes, layout)
        for x, axes in zip(leaves, _leaves(axes_tree), strict=True)
    ]
    return jax.tree.unflatten(treedef, placed)


@functools.partial(jax.jit, static_argnames=("num_slots", "length", "how"))
def empty_slots(key, *, num_slots, length, how):
    """Returns empty slots with room for `length` tokens each."""
    slots = Slots(
        cache=decoder.empty_cache(how, num_slots, length),
        hidden_BD=jnp.zeros((num_slots, how.model.embed_dim), jnp.dtype(how.dtype)),
        keys_B=jnp.broadcast_to(key, (num_slots,)),
        lengths_B=jnp.zeros(num_slots, jnp.int32),
        offsets_B=jnp.zeros(num_slots, jnp.int32),
        limits_B=jnp.zeros(num_slots, jnp.int32),
        active_B=jnp.zeros(num_slots, bool),
    )
    return _placed(slots, SLOTS_AXES, how.layout)


@functools.partial(jax.jit, static_argnames=("how", "record"))
def prefill(params, tokens_PT, lengths_P, prompt_images=None, *, how, record=False):
    """Returns (Pool of the left-aligned prompts `tokens_PT`, their expert ids [P, T, L, K] with
    `record`); `prompt_images` is None if no prompt has an image."""
    of_images = {}
    if prompt_images is not None:
        images = prompt_images.images
        units_IUD = vision.encode(
            params["vision"],
            images.patches_ISC,
            images.positions_IS2,
            images.valid_IS,
            how=how,
        )
        of_images = {
            "units_UD": units_IUD.reshape(-1, units_IUD.shape[-1]),
            "index_BT": prompt_images.units_PT,
            "positions_BT": prompt_images.positions_PT3,
        }
    hidden_PD, cache, ids = decoder.prefill(params, tokens_PT, lengths_P, how=how, **of_images)
    return Pool(hidden_PD, cache), ids if record else None


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="slots")
def fill(slots, pool, refill, key, *, layout=None):
    """Copies prompts of the pool into free slots and starts their responses there.

    With a layout, every device gathers the pool's prompts from the devices with which it shares the
    batch, and copies those for its own slots. Meanwhile it holds the pool's P · T padded tokens,
    2 L K H / (size("kv_heads") · size("cache_length")) elements each, and a copy of their keys or
    values.
    """
    keys_B = row_keys(key, refill.prompt_ids_B, refill.sample_ids_B)
    if layout is None:
        return _filled(slots, pool, refill, keys_B)
    leaves, treedef = jax.tree.flatten((slots, pool, refill, keys_B))

    def function(*parts):
        return tuple(jax.tree.leaves(_filled_part(*jax.tree.unflatten(treedef, parts), layout)))

    axes = [*_leaves([SLOTS_AXES, POOL_AXES, REFILL_AXES]), (None,)]
    filled = sharding.shard_map(function, layout, axes, tuple(_leaves(SLOTS_AXES)))(*leaves)
    return jax.tree.unflatten(jax.tree.structure(slots), filled)


def _filled_part(slots, pool, refill, keys_B, layout):
    """Runs `fill` on one device, with its slots, positions and prompts."""
    B, batch = slots.lengths_B.shape[0], layout.axis_names("batch")
    cache = jax.tree.map(lambda x: dealt_positions(x, layout), pool.cache)
    pool = dataclasses.replace(pool, cache=cache)
    if batch:

        def gathered(x, axis):
            return jax.lax.all_gather(x, batch, axis=axis, tiled=True)

        cache = jax.tree.map(lambda x: gathered(x, x.ndim + BATCH_AXIS), pool.cache)
        pool = Pool(gathered(pool.hidden_PD, 0), cache)
        own_B = refill.slots_B - jax.lax.axis_index(batch) * B
        own_B = jnp.where((own_B >= 0) & (own_B < B), own_B, B)
        order_B = jnp.argsort(own_B == B, stable=True)  # the used rows first
        refill = dataclasses.replace(refill, slots_B=own_B)
        refill, keys_B = jax.tree.map(lambda x: x[order_B], (refill, keys_B))
    return _filled(slots, pool, refill, keys_B)


def _filled(slots, pool, refill, keys_B):
    """Returns the slots with the prompts of the used rows of `refill`."""
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
    return Slots(
        cache=jax.lax.fori_loop(0, count, copy, slots.cache),
        hidden_BD=put(slots.hidden_BD, pool.hidden_PD[refill.pool_rows_B]),
        keys_B=put(slots.keys_B, keys_B),
        lengths_B=put(slots.lengths_B, refill.lengths_B),
        offsets_B=put(slots.offsets_B, refill.offsets_B),
        limits_B=put(slots.limits_B, refill.limits_B),
        active_B=put(slots.active_B, True),
    )


def grow(slots, *, length, layout=None):
    """Returns the slots with room for `length` tokens each; no position changes its device.

    The slots' arrays are freed: keys go before values come, so at most one and a half caches are
    held at a time.
    """

    def grown(array):
        longer = grow_array(array, length=length, layout=layout)
        array.delete()
        return longer

    return dataclasses.replace(slots, cache=jax.tree.map(grown, slots.cache))


@functools.partial(jax.jit, static_argnames=("length", "layout"))
def grow_array(array, *, length, layout=None):
    """Pads keys or values [L, B, K, S, H] to room for `length` tokens per slot."""
    parts = 1 if layout is None else layout.size("cache_length")

    def pad(array):
        widths = [(0, 0)] * array.ndim
        widths[SEQUENCE_AXIS] = (0, length // parts - array.shape[SEQUENCE_AXIS])
        return jnp.pad(array, widths)

    pad_part = sharding.shard_map(pad, layout, (CACHE_AXES,), CACHE_AXES)
    return sharding.constrain(pad_part(array), CACHE_AXES, layout)


@functools.partial(
    jax.jit,
    static_argnames=("how", "sampling", "chunk_length", "record"),
    donate_argnames="slots",
)
def decode_chunk(params, slots, max_steps, leave_at, *, how, sampling, chunk_length, record=False):
    """Decodes up to `max_steps` ≤ chunk_length tokens for every active slot, in one program.

    Stops as soon as `leave_at` slots are free. The slots are donated: the cache is updated in
    place. `record` keeps each token's expert ids.

    Returns:
      The slots, and the Chunk of sampled tokens.
    """
    B, layout = slots.lengths_B.shape[0], how.layout
    chunk = Chunk(
        tokens_CB=jnp.zeros((chunk_length, B), jnp.int32),
        logprobs_CB=jnp.zeros((chunk_length, B), jnp.float32),
        counts_B=jnp.zeros(B, jnp.int32),
        active_B=slots.active_B,
        steps=jnp.int32(0),
    )
    chunk_axes = CHUNK_AXES
    if record:
        shape = (chunk_length, B, how.model.num_expert_layers, how.model.experts_per_token)
        ids = jnp.zeros(shape, id_type(how.model.num_experts))
        chunk = dataclasses.replace(chunk, expert_ids_CBLK=ids)
        chunk_axes = dataclasses.replace(CHUNK_AXES, expert_ids_CBLK=_IDS)
    chunk = _placed(chunk, chunk_axes, layout)
    # Whole rows of logits on every device, so that tokens are drawn as on one device.
    draw = sharding.shard_map(
        functools.partial(_draw, sampling=sampling), layout, (_ROWS, _ROW, _ROW), (_ROW, _ROW)
    )

    def unfinished(carry):
        slots, chunk = carry
        return (chunk.steps < max_steps) & (jnp.sum(~slots.active_B) < leave_at)

    def body(carry):
        slots, chunk = carry
        logits_BV = decoder.logits(params, slots.hidden_BD, how=how)
        tokens_B, logprobs_B = draw(logits_BV, slots.keys_B, slots.lengths_B)
        active_B = slots.active_B
        slots, ids_BLK = _advance(slots, tokens_B, params, how=how, sampling=sampling)
        chunk = _record(chunk, active_B, tokens_B, logprobs_B, ids_BLK)
        return _placed(slots, SLOTS_AXES, layout), _placed(chunk, chunk_axes, layout)

    slots, chunk = jax.lax.while_loop(unfinished, body, (slots, chunk))
    return slots, dataclasses.replace(chunk, active_B=slots.active_B)


def _draw(logits_BV, keys_B, positions_B, *, sampling):
    return sample(logits_BV, uniforms(keys_B, positions_B), sampling=sampling)


def _record(chunk, active_B, tokens_B, logprobs_B, ids_BLK):
    ids_CBLK = chunk.expert_ids_CBLK
    return dataclasses.replace(
        chunk,
        expert_ids_CBLK=None if ids_CBLK is None else ids_CBLK.at[chunk.steps].set(ids_BLK),
        tokens_CB=chunk.tokens_CB.at[chunk.steps].set(tokens_B),
        logprobs_CB=chunk.logprobs_CB.at[chunk.steps].set(logprobs_B),
        counts_B=chunk.counts_B + active_B.astype(jnp.int32),
        steps=chunk.steps + 1,
    )


def _advance(slots, tokens_B, params, *, how, sampling):
    """Returns (slots, the tokens' expert ids): appends `tokens_B` to the active rows, and ends rows
    that stop or are full."""
    # Other rows decode at position 0 of their own row: cheapest, and a refill overwrites it.
    positions_B = jnp.where(slots.active_B, slots.lengths_B, 0)
    hidden_BD, cache, ids_BLK = decoder.decode_step(
        params,
        tokens_B,
        positions_B,
        slots.cache,
        how=how,
        real_B=slots.active_B,
        positions_B=None if how.model.vision is None else positions_B + slots.offsets_B,
    )
    lengths_B = slots.lengths_B + slots.active_B.astype(jnp.int32)
    stops = jnp.asarray(sampling.stop_token_ids, jnp.int32)
    stopped_B = jnp.any(tokens_B[:, None] == stops[None, :], axis=-1)
    slots = dataclasses.replace(
        slots,
        cache=cache,
        hidden_BD=hidden_BD,
        lengths_B=lengths_B,
        active_B=slots.active_B & ~stopped_B & (lengths_B < slots.limits_B),
    )
    return slots, ids_BLK
