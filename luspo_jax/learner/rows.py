"""Training rows: lays sequences out by a plan, and shards them as their fields declare.

NumPy in; `put` moves to devices, `split` cuts into micro-batches under jit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from luspo_jax import sharding
from luspo_jax.images import batch
from luspo_jax.learner.plan import Plan, Trunks, one_a_row, packed
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.experts import id_type
from luspo_jax.ops.sizes import bucket_length
from luspo_jax.sharding import Layout
from luspo_jax.types import ExpertIds, Images, RowImages, Sequences, TokenRows


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans the rows of a run: the only place that asks whether a run packs.

    Attributes:
      model: the decoder's configuration.
      longest: the largest possible sequence length, in tokens.
      num_buckets: number of row lengths to compile for, equally spaced up to `longest`.
      rows_per_microbatch: rows that are computed together.
      pack_length: tokens of a dense row; 0 lays one sequence per row.
      share_prompts: whether dense rows hold a prompt once for several of its responses.
      gathers: whether attention gathers the sequences of dense rows (`ops.gathered_attention`).
      pictured_at_once: responses with images that a pass without gradients lays out at once.
      layout: the mesh layout of rows; None on one device.
    """

    model: DecoderConfig
    longest: int
    num_buckets: int
    rows_per_microbatch: int
    pack_length: int = 0
    pictured_at_once: int = 1
    share_prompts: bool = False
    gathers: bool = False
    layout: Layout | None = None

    def width(self, lengths_B: np.ndarray) -> int:
        """Returns the length of arrays with one row per response: the longest sequence's bucket."""
        return bucket_length(int(np.max(lengths_B)), self.longest, num_buckets=self.num_buckets)

    def plan(self, lengths_B: np.ndarray, width: int, prompts: Sequence[Any] | None = None) -> Plan:
        """Returns the plan of sequences with these lengths.

        Args:
          lengths_B: tokens of each sequence.
          width: of arrays with one row per response.
          prompts: of each sequence, which those of equal ones share if the run does.
        """
        sizes = {"width": width, "rows_per_microbatch": self.rows_per_microbatch}
        if self.pack_length:
            trunks = prompt_trunks(prompts) if self.share_prompts and prompts else None
            return packed(lengths_B, row_length=self.pack_length, trunks=trunks, **sizes)
        return one_a_row(lengths_B, **sizes)


def prompt_trunks(prompts: Sequence[Any]) -> Trunks:
    """Returns what sequences of equal prompts may share: all but the prompt's last token."""
    ids: dict[tuple, int] = {}
    keys = [(p.tokens.tobytes(), *(image.sha for image in p.images)) for p in prompts]
    return Trunks(
        np.array([ids.setdefault(key, len(ids)) for key in keys]),
        np.array([len(p.tokens) - 1 for p in prompts]),
    )


def token_rows(
    planner: Planner,
    plan: Plan,
    prompts: Sequence[Any],
    responses: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    expert_ids: ExpertIds | None = None,
) -> TokenRows:
    """Lays B sequences, each a prompt and its response, into the rows of a plan.

    Args:
      planner: of the run.
      plan: of the sequences.
      prompts: of each response; anything with `tokens` and `images` (`prompts.PromptRecord`).
      responses: tokens of each response.
      masks: bool, the response tokens whose log-probs are computed.
      expert_ids: rows [R, T, L, K] from `plan.lay`; None without experts.

    Raises:
      ImageError: images that do not fit a prompt's placeholders.
    """
    sequences = [
        np.concatenate([prompt.tokens, tokens]).astype(np.int32)
        for prompt, tokens in zip(prompts, responses, strict=True)
    ]
    masked = [
        np.concatenate([np.zeros(len(prompt.tokens), bool), mask])
        for prompt, mask in zip(prompts, masks, strict=True)
    ]
    lengths = [len(tokens) for tokens in sequences]
    return TokenRows(
        tokens_RT=plan.lay(sequences),
        positions_RT=plan.lay(_positions(prompts, lengths, planner.model)),
        segment_ids_RT=plan.lay(plan.segments()),
        response_mask_RT=plan.lay(masked),
        rows_per_microbatch=plan.rows_per_microbatch,
        expert_ids=expert_ids,
        images=_images(planner, plan, prompts, lengths),
        sequences=gathered(planner, plan),
    )


_WIDTHS = 8  # of gathered sequences, at least


def gathered(planner: Planner, plan: Plan) -> Sequences | None:
    """Returns where a plan's sequences lie if attention gathers them; else None."""
    if not (planner.gathers and planner.pack_length):
        return None
    # Own tokens lack the prompts that are shared: of few widths, one of them would be far too wide.
    return plan.gathered(max(planner.num_buckets, _WIDTHS), planner.longest)


def _positions(prompts, lengths, model):
    """Returns rotary positions of each sequence, [n], or [n, 3] if the model reads images."""
    if model.vision is None:
        return [np.arange(n, dtype=np.int32) for n in lengths]
    found = []
    for prompt, length in zip(prompts, lengths, strict=True):
        of_prompt, after = batch.positions(prompt.tokens, prompt.images, model)
        rest = np.arange(length - len(of_prompt), dtype=np.int32) + after
        found.append(np.concatenate([of_prompt, np.repeat(rest[:, None], 3, axis=1)]))
    return found


def _images(planner, plan, prompts, lengths):
    """Returns each micro-batch's images, each once, and the unit at every token; None without any.

    One prompt's responses in one micro-batch share its images.
    """
    if not any(prompt.images for prompt in prompts):
        return None
    model, layout = planner.model, planner.layout
    groups = [[] for _ in range(plan.num_microbatches)]
    for part, prompt in zip(plan.parts_B, prompts, strict=True):
        groups[part] += prompt.images
    multiple = 1 if layout is None else layout.size("batch")
    images, num_units, rows_of = batch.stack(groups, model, multiple=multiple)
    units = []
    for part, prompt, length in zip(plan.parts_B, prompts, lengths, strict=True):
        at = [rows_of[part][image.sha] for image in prompt.images]
        here, _, _ = batch.places(prompt.tokens, prompt.images, at, num_units, model)
        units.append(np.concatenate([here, np.full(length - len(here), -1, np.int32)]))
    return RowImages(images, plan.lay(units, fill=-1))


def abstract_token_rows(
    planner: Planner, plan: Plan, expert_ids: Sequence[str] = (), images: Images | None = None
) -> TokenRows:
    """Returns the shapes of a plan's rows; allocates nothing.

    Args:
      planner: of the run.
      plan: of the sequences.
      expert_ids: names of the passes whose expert ids come with the rows.
      images: shapes of the images of all micro-batches; None if the rows have none.
    """
    model, shape = planner.model, (plan.num_rows, plan.row_length)
    ints_RT = jax.ShapeDtypeStruct(shape, np.int32)
    ids = None
    if model.num_experts:
        size = (*shape, model.num_expert_layers, model.experts_per_token)
        kind = jax.ShapeDtypeStruct(size, id_type(model.num_experts))
        ids = ExpertIds(**dict.fromkeys(expert_ids, kind))
    return TokenRows(
        tokens_RT=ints_RT,
        positions_RT=jax.ShapeDtypeStruct((*shape, 3) if model.vision else shape, np.int32),
        segment_ids_RT=ints_RT,
        response_mask_RT=jax.ShapeDtypeStruct(shape, bool),
        rows_per_microbatch=plan.rows_per_microbatch,
        expert_ids=ids,
        images=None if images is None else RowImages(images, ints_RT),
        sequences=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), gathered(planner, plan)
        ),
    )


def put(tree: Any, layout: Layout | None) -> Any:
    """Puts a batch of NumPy arrays, equal on all processes, on devices as its fields declare."""
    if layout is None:
        return tree
    return jax.tree.map(lambda x, axes: sharding.put(x, axes, layout), tree, _axes(tree))


def abstract(tree: Any, layout: Layout | None) -> Any:
    """Returns shapes, types and shardings of a batch after `put`; allocates nothing."""
    if layout is None:
        return tree
    return jax.tree.map(
        lambda x, axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(axes)),
        tree,
        _axes(tree),
    )


def split(tree: Any, num_parts: int, layout: Layout | None) -> Any:
    """Cuts a batch into micro-batches: leaves [N, …] become [num_parts, N / num_parts, …]."""

    def cut(x):
        if x.shape[0] % num_parts:
            raise ValueError(f"{x.shape[0]} rows cannot be cut into {num_parts} micro-batches")
        return x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])

    return jax.tree.map(
        lambda x, axes: sharding.constrain(x, (None, *axes), layout),
        jax.tree.map(cut, tree),
        _axes(tree),
    )


def _axes(tree, first=None):
    """Returns the logical axes of every leaf, as the fields of its dataclass declare them."""
    if dataclasses.is_dataclass(tree):
        fields = [f for f in dataclasses.fields(tree) if not f.metadata.get("static")]
        return dataclasses.replace(
            tree,
            **{f.name: _axes(getattr(tree, f.name), f.metadata.get("cut", first)) for f in fields},
        )
    if isinstance(tree, (tuple, list)):
        return type(tree)(_axes(x, first) for x in tree)
    return None if tree is None else _Axes((first, *[None] * (tree.ndim - 1)))


class _Axes(tuple):
    """Axes as a leaf of a tree, which a plain tuple is not."""
