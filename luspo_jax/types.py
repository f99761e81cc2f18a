"""Dimension key, alignment law, and the frozen pytrees that pass from stage to stage.

Shape suffixes, as in `logprobs_BT`:

    B  sequences (= P·G)    P  prompts         G  group (samples of one prompt)
    T  tokens               S  key/value length
    N  query heads          K  key/value heads H  head dim
    D  model (embedding)    F  mlp             V  vocabulary
    L  layers               E  experts         R  rows

The alignment law: every `_BT` array is indexed by the token its values belong to. A sequence is
a prompt followed by its response; `logprobs_BT[b, t]` is the log-probability of token t of sequence
b given the tokens before it. Token 0, which nothing predicts, is masked. Masks are boolean.
`segment_ids_RT` is 0 on padding and ≥ 1 elsewhere; tokens see only their own segment and, in the
branch of a prompt that several responses share, the prompt (`ops.segments`).
"""

import dataclasses
from typing import Any

import jax

# Fields with this metadata are sharded over the devices along the first dimension of their leaves;
# other leaves of a batch are replicated. `learner.rows` reads it.
CUT_BY_ROWS = {"cut": "batch"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertIds:
    """The expert ids that routers chose for each token of some rows, recorded by earlier passes.

    Ids are unsigned integers [R, T, L, K]: K experts in each of the L layers that have experts.

    Attributes:
      sampler: recorded while sampling; None if not recorded.
      old: recorded by the trainer's pass with the policy that starts the step; None without one.
    """

    sampler: jax.Array | None = None
    old: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """Images in the slots of the vision tower (`images.layout`).

    Every micro-batch has the same number, empty ones included.

    Attributes:
      patches_ISC: float32 values of each patch, 0 in empty slots.
      positions_IS2: int32 row and column of each patch.
      valid_IS: bool, whether the slot holds a patch.
    """

    patches_ISC: jax.Array
    positions_IS2: jax.Array
    valid_IS: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowImages:
    """The images in some rows, and their places.

    Attributes:
      images: the images of all micro-batches, concatenated.
      units_RT: int32 image unit that replaces a token, −1 for text; an index into the units of all
        images of the row's micro-batch.
    """

    images: Images
    units_RT: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
    """Where sequences, and the trunks that some continue, lie in the rows of each micro-batch.

    Positions are those of a micro-batch's concatenated rows. A trunk is what several sequences
    share (`ops.segments`); own tokens are those behind it.

    Attributes:
      starts_B: int32 first own token of each sequence.
      counts_B: int32 number of its own tokens; 0 for none.
      trunks_B: int32 index of its trunk in the micro-batch; of others the number of trunks.
      trunk_starts_C: int32 first token of each trunk.
      trunk_counts_C: int32 number of its tokens; 0 for none.
      places_RT: int32 place of each token in the micro-batch's arrays [B, width] and, behind them,
        [C, trunk_width]; of padding the number of places.
      width: at least the largest of `counts_B`; static.
      trunk_width: at least the largest of `trunk_counts_C`, 0 without trunks; static.
    """

    starts_B: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    counts_B: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    trunks_B: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    trunk_starts_C: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    trunk_counts_C: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    places_RT: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    width: int = dataclasses.field(metadata={"static": True})
    trunk_width: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRows:
    """The model's input: sequences in rows of one length, grouped into micro-batches.

    A `learner.plan.Plan` says where each sequence lies; a row may hold one, several or none.

    Attributes:
      tokens_RT: int32 token ids.
      positions_RT: int32 rotary positions, counted from 0 in each segment; [R, T, 3] for a model
        that reads images.
      segment_ids_RT: int32, 1, 2, … along a row, more for branches; 0 on padding.
      response_mask_RT: bool, the tokens whose log-probs are computed.
      rows_per_microbatch: rows that are computed together; static.
      expert_ids: recorded choices of the routers of a mixture of experts; None without experts.
      images: None if the rows have no images.
      sequences: for attention that gathers them (`ops.gathered_attention`); else None.
    """

    tokens_RT: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    positions_RT: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    segment_ids_RT: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    response_mask_RT: jax.Array = dataclasses.field(metadata=CUT_BY_ROWS)
    rows_per_microbatch: int = dataclasses.field(metadata={"static": True})
    expert_ids: ExpertIds | None = dataclasses.field(default=None, metadata=CUT_BY_ROWS)
    images: RowImages | None = dataclasses.field(default=None, metadata=CUT_BY_ROWS)
    sequences: Sequences | None = dataclasses.field(default=None, metadata=CUT_BY_ROWS)

    @property
    def num_microbatches(self) -> int:
        """Number of micro-batches, empty ones included."""
        return self.tokens_RT.shape[0] // self.rows_per_microbatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResponseRows:
    """The objective's input: one row per response, grouped into micro-batches.

    A plan pads each micro-batch with empty responses, all of whose values are 0.

    Attributes:
      starts_B: int32 start of each sequence, r·T + t for row r of its micro-batch and position t;
        of one whose prompt lies elsewhere, where it would start with the prompt before it.
      response_mask_BT: bool, the tokens that are trained on.
      advantages_B: float32 advantage of each response.
      group_ids_B: int32, equal for the responses of one prompt.
      sampler_logprobs_BT: float32, computed by the sampler; None for demonstrations, which it did
        not sample.
      old_logprobs_BT: float32 under the old policy: the one that starts the step, and for tokens
        that an earlier policy sampled the one that `Objective.old_policy` says; None if it equals
        the policy being updated (one minibatch, one epoch), which saves the extra pass.
      starts_step_B: bool, responses whose old policy is the one being updated, as this is the
        step's first update; their `old_logprobs_BT` are not read. None if that holds of none.
      old_entropy_BT: float32 entropies of the policy that starts the step; None unless the
        objective ranks them.
      ref_logprobs_BT: float32 under the reference policy; None without a KL term, and where the
        update computes them.
      token_weights_BT: float32 factor on each token's loss; None for 1.
      ages_BT: int32 steps that the policy took between sampling each token and this step; None if
        the policy that starts the step sampled all that the step trains on.
      token_advantages_BT: float32 advantage of each token; None if all of a response have its own.
      segment_starts_BT: bool, tokens that begin a segment; None unless the ratio has segments.
    """

    starts_B: jax.Array
    response_mask_BT: jax.Array
    advantages_B: jax.Array
    group_ids_B: jax.Array
    sampler_logprobs_BT: jax.Array | None
    old_logprobs_BT: jax.Array | None = None
    starts_step_B: jax.Array | None = None
    old_entropy_BT: jax.Array | None = None
    ref_logprobs_BT: jax.Array | None = None
    token_weights_BT: jax.Array | None = None
    ages_BT: jax.Array | None = None
    token_advantages_BT: jax.Array | None = None
    segment_starts_BT: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """The input of one optimizer step."""

    rows: TokenRows
    responses: ResponseRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes.

    Attributes:
      params: float32 master weights, a nested dict.
      opt_state: the optax state.
      skipped_updates: int32 number of updates skipped because their gradient was not finite.
      ref_params: the reference policy of the KL term; None without one.
      marked_params: the policy before the last update whose length pressure is measured; None
        without such measurements.
    """

    params: Any
    opt_state: Any
    skipped_updates: jax.Array
    ref_params: Any = None
    marked_params: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterState(TrainState):
    """The same of a run that trains a low-rank adapter: params and their copies are the adapter's.

    A class of its own, so that checkpoints, which leave the base out, are those of a TrainState.

    Attributes:
      base: the frozen weights, which no update changes.
    """

    base: Any = None
