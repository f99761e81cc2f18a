"""Dimension key, alignment law, and the frozen pytrees that cross from one stage to the next.

Shape suffixes, as in `logprobs_BT`:

    B  sequences (= P·G)    P  prompts         G  group (samples of one prompt)
    T  tokens               S  key/value length
    N  query heads          K  key/value heads H  head dim
    D  model (embedding)    F  mlp             V  vocabulary
    L  layers               E  experts         R  packed rows

The alignment law: every `_BT` array is indexed by the token it scores. `tokens_BT` holds a prompt
and then its response, left-aligned and padded on the right; `logprobs_BT[b, t]` is the
log-probability of `tokens_BT[b, t]` given the tokens before it, and position 0, which nothing
predicts, is masked. Masks are boolean. `segment_ids_BT` is 0 on padding and ≥ 1 elsewhere;
tokens see only their own segment.
"""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts that routers chose for each token of some rows, as passes before recorded them.

    Ids are [rows, T, L, K]: K experts of each of the L layers that have experts, unsigned integers.

    Attributes:
      sampler: of the pass that sampled the tokens; None where it was not recorded.
      old: of the trainer's pass with the policy that starts the step; None where there was none.
    """

    sampler: jax.Array | None = None
    old: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """Images that rows hold, in the slots of the vision tower (`images.layout`).

    Equally many belong to each micro-batch, empty ones included; the units that rows name are those
    of their own micro-batch's images, counted through.

    Attributes:
      patches_ISC: float32 values of each patch, 0 where there is none.
      positions_IS2: int32 row and column of each.
      valid_IS: bool, whether there is a patch.
    """

    patches_ISC: jax.Array
    positions_IS2: jax.Array
    valid_IS: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """The sequences of a TokenBatch laid end to end in rows of one length, micro-batch by
    micro-batch; made by `packing.packed_rows`.

    Attributes:
      tokens_RT: int32 token ids.
      positions_RT: int32 rotary positions, counted from 0 in each segment; [R, T, 3] with images.
      segment_ids_RT: int32, 1, 2, … along a row, 0 on padding.
      response_mask_RT: bool, the tokens to score.
      starts_B: int32, where each sequence begins in the rows of its micro-batch, counted through
        them (r·T + t); 0 for an empty row of the TokenBatch.
      rows_per_microbatch: rows that are computed together; static.
      experts: of a mixture of experts, what was recorded; else None.
      units_RT: int32 unit of an image that stands in place of a token, −1 for text; None without
        images.
    """

    tokens_RT: jax.Array
    positions_RT: jax.Array
    segment_ids_RT: jax.Array
    response_mask_RT: jax.Array
    starts_B: jax.Array
    rows_per_microbatch: int = dataclasses.field(metadata={"static": True})
    experts: Experts | None = None
    units_RT: jax.Array | None = None

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that the rows hold, empty ones included."""
        return self.tokens_RT.shape[0] // self.rows_per_microbatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """What the model reads: one row a sequence.

    Attributes:
      tokens_BT: int32 token ids, prompt then response, padded on the right.
      positions_BT: int32 rotary positions, counted from 0 in each segment; [B, T, 3] with images.
      segment_ids_BT: int32, 0 on padding.
      response_mask_BT: bool, true on response tokens, the stop token included.
      packed: the same sequences in dense rows, which the model then reads in place of these; None
        where it reads these.
      experts: of a mixture of experts, what was recorded, unless `packed` has it; else None.
      units_BT: int32 unit of an image that stands in place of a token, −1 for text, unless `packed`
        has it; None without images.
      images: the images; None where there are none.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    response_mask_BT: jax.Array
    packed: PackedRows | None = None
    experts: Experts | None = None
    units_BT: jax.Array | None = None
    images: Images | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """What one optimizer step reads: token rows and what the objective knows of each.

    Attributes:
      rows: the token rows.
      advantages_B: float32 advantage of each response.
      group_ids_B: int32, equal for the responses of one prompt.
      old_logprobs_BT: float32 under the policy that starts the step; None where it equals the
        policy being updated (one minibatch, one epoch), so that the extra pass is saved.
      old_entropy_BT: float32 entropies of the same policy; None unless the objective ranks them.
      ref_logprobs_BT: float32 under the reference policy; None without a KL term.
      sampler_logprobs_BT: float32 as the sampler computed them.
    """

    rows: TokenBatch
    advantages_B: jax.Array
    group_ids_B: jax.Array
    old_logprobs_BT: jax.Array | None
    old_entropy_BT: jax.Array | None
    ref_logprobs_BT: jax.Array | None
    sampler_logprobs_BT: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything the optimizer changes.

    Attributes:
      params: float32 master weights, a nested dict.
      opt_state: the optax state.
      skipped_updates: int32, how many updates had a non-finite gradient and were not taken.
      ref_params: the reference policy of the KL term; None without one.
      marked_params: the policy before the last update whose length pressure is measured; None
        without such measurements.
    """

    params: Any
    opt_state: Any
    skipped_updates: jax.Array
    ref_params: Any = None
    marked_params: Any = None
