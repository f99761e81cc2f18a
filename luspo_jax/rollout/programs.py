"""The device side of a rollout: programs that read runs of tokens, copy pages and decode rows.

The pool of pages is all that stays on the devices between two programs. What a row is, its block
table included, comes from the host with every chunk; so the host may reorder, add and remove rows
as it likes. Rows never read one another.

With a layout, rows are sharded over "batch", key heads over "kv_heads" and pages as `ops.pages`
says; without one, all is on one device.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.models import decoder, vision
from luspo_jax.models.experts import id_type
from luspo_jax.ops.paged_attention import PLACES_AXES, Places
from luspo_jax.ops.pages import copied, pages_axes
from luspo_jax.rollout.sampling import row_keys, sample, uniforms
from luspo_jax.types import Images


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B rows of a chunk; each reads the last token it has and draws the next.

    Attributes:
      tokens_B: int32, the row's last token; its key and value are not in pages yet.
      places: Places of these tokens.
      offsets_B: int32 rotary position of a token minus its index: below 0 after images, else 0.
      limits_B: int32 tokens, the prompt's included, at which the response is cut.
      drawn_B: bool, rows whose response has ended and whose last token is read only to record its
        experts.
      steps_B: uint32, of the noise.
      prompt_ids_B: uint32, of the noise.
      sample_ids_B: uint32, of the noise.
      key: of the noise, from `seed_key`.
      max_steps: int32, most steps of the chunk.
      leave_at: int32, number of rows without work at which it ends.
    """

    tokens_B: Any
    places: Places
    offsets_B: Any
    limits_B: Any
    drawn_B: Any
    steps_B: Any
    prompt_ids_B: Any
    sample_ids_B: Any
    key: Any
    max_steps: Any
    leave_at: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptImages:
    """The images of the prompts of one prefill, and their places.

    Attributes:
      images: in the tower's slots.
      units_RT: int32 unit that replaces a token, −1 for text.
      positions_RT3: int32 rotary positions.
    """

    images: Images
    units_RT: jax.Array
    positions_RT3: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of up to C decode steps; row b drew counts_B[b] tokens, in the first steps.

    `read_B` counts the tokens that a row read, `live_B` says whether it goes on.
    `expert_ids_CBLK` holds the expert ids of each token read, None if not recorded.
    """

    tokens_CB: jax.Array
    logprobs_CB: jax.Array
    counts_B: jax.Array
    read_B: jax.Array
    live_B: jax.Array
    steps: jax.Array
    expert_ids_CBLK: jax.Array | None = None


_ROW, _ROWS, _STEPS = ("batch",), ("batch", None), (None, "batch")
_IDS = (*_STEPS, None, None)
CHUNK_AXES = Chunk(_STEPS, _STEPS, _ROW, _ROW, _ROW, ())


@functools.partial(jax.jit, static_argnames=("num_pages", "page_size", "how", "dtype"))
def empty_pages(*, num_pages, page_size, how, dtype=None):
    """Returns a pool of `num_pages` on all devices together, in `dtype` or the forward pass's."""
    return decoder.empty_pages(how, num_pages, page_size, dtype)


@functools.partial(jax.jit, static_argnames=("how", "record"), donate_argnames="pages")
def prefill(params, pages, runs, tokens, prompt_images=None, *, how, record=False):
    """Reads a run of tokens a row into pages.

    Args:
      params: of the decoder.
      pages: the pool; donated.
      runs: Runs.
      tokens: (tokens_RT, offsets_R): int32 token ids, left-aligned, and rotary position minus index
        of the tokens of each row.
      prompt_images: PromptImages; None if no run has an image, and positions are their index plus
        the offset.
      how: the Forward.
      record: whether expert ids are returned.

    Returns:
      The pool; expert ids [R, T, L, K], None without `record`.
    """
    tokens_RT, offsets_R = tokens
    of_images = {}
    at_RT = jnp.arange(tokens_RT.shape[1], dtype=jnp.int32)[None]
    positions = (runs.starts_R + offsets_R)[:, None] + at_RT
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
            "index_RT": prompt_images.units_RT,
        }
        positions = prompt_images.positions_RT3
    pages, ids = decoder.prefill(params, tokens_RT, positions, pages, runs, how=how, **of_images)
    return pages, ids if record else None


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="pages")
def copy_pages(pages, sources_N, targets_N, *, layout=None):
    """Copies pages; with a layout every device its own part of N, with its own page numbers.

    Targets past the end are dropped.
    """
    pool_axes = pages_axes(pages.keys.dtype)
    copy = sharding.shard_map(copied, layout, (pool_axes, _ROW, _ROW), pool_axes)
    return copy(pages, sources_N, targets_N)


@functools.partial(
    jax.jit,
    static_argnames=("how", "sampling", "chunk_length", "record"),
    donate_argnames="pages",
)
def decode_chunk(params, pages, rows, *, how, sampling, chunk_length, record=False):
    """Decodes up to `rows.max_steps` ≤ chunk_length tokens for every row, in one program.

    Stops as soon as `rows.leave_at` rows have no work. The pool is donated: it is updated in place.
    `record` keeps the expert ids of every token that is read.

    Returns:
      The pool, and the Chunk of sampled tokens.
    """
    B, layout = rows.tokens_B.shape[0], how.layout
    keys_B = row_keys(rows.key, rows.steps_B, rows.prompt_ids_B, rows.sample_ids_B)
    chunk = Chunk(
        tokens_CB=jnp.zeros((chunk_length, B), jnp.int32),
        logprobs_CB=jnp.zeros((chunk_length, B), jnp.float32),
        counts_B=jnp.zeros(B, jnp.int32),
        read_B=jnp.zeros(B, jnp.int32),
        live_B=rows.places.real_B,
        steps=jnp.int32(0),
    )
    chunk_axes = CHUNK_AXES
    if record:
        shape = (chunk_length, B, how.model.num_expert_layers, how.model.experts_per_token)
        ids = jnp.zeros(shape, id_type(how.model.num_experts))
        chunk = dataclasses.replace(chunk, expert_ids_CBLK=ids)
        chunk_axes = dataclasses.replace(CHUNK_AXES, expert_ids_CBLK=_IDS)
    # Whole rows of logits on every device, so that tokens are drawn as on one device.
    draw = sharding.shard_map(
        functools.partial(_draw, sampling=sampling), layout, (_ROWS, _ROW, _ROW), (_ROW, _ROW)
    )
    pool_axes = pages_axes(pages.keys.dtype)
    stops = jnp.asarray(sampling.stop_token_ids, jnp.int32)
    fixed = [None if x is None else _placed(x, axes, layout) for x, axes in
             zip(rows.places, PLACES_AXES, strict=True)]  # fmt: skip
    places = Places(*fixed)

    def unfinished(carry):
        _, _, _, chunk = carry
        return (chunk.steps < rows.max_steps) & (jnp.sum(~chunk.live_B) < rows.leave_at)

    def body(carry):
        pages, tokens_B, drawn_B, chunk = carry
        live_B, position_B = chunk.live_B, places.positions_B + chunk.read_B
        # Other rows read their token at position 0, which writes nothing and costs least.
        now = places._replace(positions_B=jnp.where(live_B, position_B, 0), real_B=live_B)
        rotary_B = None if how.model.vision is None else now.positions_B + rows.offsets_B
        hidden_BD, pages, ids_BLK = decoder.decode_step(
            params, tokens_B, pages, now, how=how, positions_B=rotary_B
        )
        logits_BV = decoder.logits(params, hidden_BD, how=how)
        new_B, logprobs_B = draw(logits_BV, keys_B, position_B + 1)
        draws_B = live_B & ~drawn_B
        ends_B = jnp.any(new_B[:, None] == stops[None, :], axis=-1)
        ends_B = draws_B & (ends_B | (position_B + 2 >= rows.limits_B))
        # To record its experts, a response's last token is read too.
        going_B = draws_B if record else draws_B & ~ends_B
        chunk = _record(chunk, (new_B, logprobs_B, draws_B, going_B), ids_BLK)
        carry = pages, jnp.where(draws_B, new_B, tokens_B), drawn_B | ends_B, chunk
        axes = pool_axes, _ROW, _ROW, chunk_axes
        return tuple(_placed(x, of, layout) for x, of in zip(carry, axes, strict=True))

    carry = (pages, rows.tokens_B, rows.drawn_B, _placed(chunk, chunk_axes, layout))
    pages, _, _, chunk = jax.lax.while_loop(unfinished, body, carry)
    return pages, chunk


def _draw(logits_BV, keys_B, positions_B, *, sampling):
    return sample(logits_BV, uniforms(keys_B, positions_B), sampling=sampling)


def _record(chunk, drawn, ids_BLK):
    tokens_B, logprobs_B, draws_B, going_B = drawn
    ids_CBLK, at = chunk.expert_ids_CBLK, chunk.steps
    return dataclasses.replace(
        chunk,
        expert_ids_CBLK=None if ids_CBLK is None else ids_CBLK.at[at].set(ids_BLK),
        tokens_CB=chunk.tokens_CB.at[at].set(tokens_B),
        logprobs_CB=chunk.logprobs_CB.at[at].set(logprobs_B),
        counts_B=chunk.counts_B + draws_B.astype(jnp.int32),
        read_B=chunk.read_B + chunk.live_B.astype(jnp.int32),
        live_B=going_B,
        steps=at + 1,
    )


def _placed(tree, axes_tree, layout):
    """Constrains arrays, or a tree of them, to their logical axes."""
    if layout is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    axes = jax.tree.leaves(axes_tree, is_leaf=lambda node: type(node) is tuple)
    placed = [sharding.constrain(x, names, layout) for x, names in zip(leaves, axes, strict=True)]
    return jax.tree.unflatten(treedef, placed)
