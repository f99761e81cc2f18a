"""Dimension key, alignment law, and the frozen pytrees that cross from one stage to the next.

Shape suffixes, as in `logprobs_BT`:

    B  sequences (= P·G)    P  prompts         G  group (samples of one prompt)
    T  tokens               S  key/value length
    N  query heads          K  key/value heads H  head dim
    D  model (embedding)    F  mlp             V  vocabulary
    L  layers               E  experts         R  rows

The alignment law: every `_BT` array is indexed by the token it scores. A sequence is a prompt and
then its response; `logprobs_BT[b, t]` is the log-probability of token t of sequence b given the
tokens before it, and token 0, which nothing predicts, is masked. Masks are boolean.
`segment_ids_RT` is 0 on padding and ≥ 1 elsewhere; tokens see only their own segment.
"""

import dataclasses
from typing import Any

import jax

# Each leaf of a batch is cut over the devices as its field says: a field of this metadata along its
# first dimension; a leaf without it lies whole on every device. `learner.rows` reads it.
CUT_BY_ROWS = {"cut": "batch"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertIds:
    """The experts that routers chose for each token of some rows, as earlier passes recorded them.

    Ids are [R, T, L, K]: K experts in each of the L layers that have experts, unsigned integers.

    Attributes:
      sampler: recorded by the pass that sampled the tokens; None where it was not recorded.
      old: recorded by the trainer's pass with the policy that starts the step; None without one.
    """

    sampler: jax.Array | None = None
    old: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """Images in the slots of the vision tower (`images.layout`).

    Every micro-batch has equally many, empty ones included.

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
class RowImages:
    """The images that rows show, and where.

    Attributes:
      images: the images of each micro-batch, one micro-batch after another.
      units_RT: int32 unit of an image that stands in place of a token, −1 for text; counted through
        the images of the row's own micro-batch.
    """

    images: Images
    units_RT: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRows:
    """What the model reads: sequences in rows of one length, micro-batch by micro-batch.

    A `learner.plan.Plan` says which sequence lies where; a row may hold one, several or none.

    Attributes:
      tokens_RT: int32 token ids.
      positions_RT: int32 rotary positions, counted from 0 in each segment; [R, T, 3] for a model
        that reads images.
      segment_ids_RT: int32, 1, 2, … along a row, 0 on padding.
      response_mask_RT: bool, the tokens whose log-probs are computed.
      rows_per_microbatch: rows that are computed together; static.
      expert_ids: recorded choices of the routers of a mixture of experts; None without experts.
      images: None where the rows show none.
    """

    tokens_RT: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    positions_RT: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    segment_ids_RT: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    response_mask_RT: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    rows_per_microbatch: int = dataclasses.field(metadata={"static": True})
    expert_ids: ExpertIds | None = dataclasses.field(default=None, metadata=CUT_BY_ROWS)
    images: RowImages | None = dataclasses.field(default=None, metadata=CUT_BY_ROWS)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that the rows hold, empty ones included."""
        return self.tokens_RT.shape[0] // self.rows_per_microbatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResponseRows:
    """What the objective reads: one row a response, each micro-batch's own one after another.

    A plan pads the responses of a micro-batch with empty ones, all of whose values are 0.

    Attributes:
      starts_B: int32, where each sequence begins in the rows of its micro-batch, counted through
        them (r·T + t).
      response_mask_BT: bool, the tokens that are trained on.
      advantages_B: float32 advantage of each response.
      group_ids_B: int32, equal for the responses of one prompt.
      sampler_logprobs_BT: float32 as the sampler computed them.
      old_logprobs_BT: float32 under the policy that starts the step; None where it equals the
        policy being updated (one minibatch, one epoch), so that the extra pass is saved.
      old_entropy_BT: float32 entropies of the same policy; None unless the objective ranks them.
      ref_logprobs_BT: float32 under the reference policy; None without a KL term.
    """

    starts_B: jax.Array
    response_mask_BT: jax.Array
    advantages_B: jax.Array
    group_ids_B: jax.Array
    sampler_logprobs_BT: jax.Array
    old_logprobs_BT: jax.Array | None = None
    old_entropy_BT: jax.Array | None = None
    ref_logprobs_BT: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """What one optimizer step reads."""

    rows: TokenRows
    responses: ResponseRows


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
