"""The batch arithmetic: the sizes of a step, computed from a configuration."""

import dataclasses

from luspo_jax.run.settings import Config


@dataclasses.dataclass(frozen=True)
class BatchArithmetic:
    """What "batch size" means in this run.

    Attributes:
      prompts_per_step, group_size: prompts of a rollout step, and responses to each.
      responses_per_step, responses_per_minibatch: responses of a rollout step, and of an update.
      responses_per_microbatch: responses that are computed together; for dense rows, how many of
        the longest fit.
      updates_per_step: optimizer steps of a rollout step.
      tokens_per_row: tokens of the longest prompt plus the longest response.
      row_length, rows_per_microbatch: tokens of a model input row, and rows computed together.
      pack_length: row_length if rows are dense; 0 if they hold one response each.
      row_unit: the unit that a mesh divides, and the field that sets its number.
    """

    prompts_per_step: int
    group_size: int
    responses_per_step: int
    responses_per_minibatch: int
    responses_per_microbatch: int
    updates_per_step: int
    tokens_per_row: int
    row_length: int
    rows_per_microbatch: int
    pack_length: int
    row_unit: str
    microbatch: str  # in words

    def __str__(self) -> str:
        return (
            f"{self.prompts_per_step} prompts × {self.group_size} responses = "
            f"{self.responses_per_step} responses a step; {self.updates_per_step} optimizer "
            f"step(s) of {self.responses_per_minibatch} responses, in micro-batches of "
            f"{self.microbatch}"
        )

    def advice(self, parts: int) -> str:
        """Returns the flag that lets `parts` devices share a micro-batch; empty if none does."""
        rows = self.rows_per_microbatch
        if not self.pack_length or rows % parts == 0:
            return ""
        tokens = -(-rows // parts) * parts * self.row_length
        return f"set --config.train.microbatch_tokens={tokens}, or "


def batch_arithmetic(config: Config) -> BatchArithmetic:
    """Resolves the sizes of a step from a checked configuration."""
    rollout, train = config.rollout, config.train
    responses = rollout.prompts_per_step * rollout.group_size
    longest = config.data.max_prompt_length + rollout.max_response_length
    rows = _dense_rows(train, longest) if train.packing else _own_rows(train, responses, longest)
    return BatchArithmetic(
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        responses_per_step=responses,
        responses_per_minibatch=responses // train.num_minibatches,
        updates_per_step=train.num_minibatches * train.num_epochs,
        tokens_per_row=longest,
        **rows,
    )


def _own_rows(train, responses, longest):
    rows = responses // train.num_minibatches // train.num_microbatches
    return {
        "responses_per_microbatch": rows,
        "row_length": longest,
        "rows_per_microbatch": rows,
        "pack_length": 0,
        "row_unit": "responses of a micro-batch (train.num_microbatches)",
        "microbatch": f"{rows} rows × up to {longest} tokens",
    }


def _dense_rows(train, longest):
    length = train.pack_length or longest
    rows = train.microbatch_tokens // length
    return {
        "responses_per_microbatch": rows * length // longest,
        "row_length": length,
        "rows_per_microbatch": rows,
        "pack_length": length,
        "row_unit": "packed rows of a micro-batch (train.microbatch_tokens)",
        "microbatch": f"{rows} packed rows × {length} tokens, as many as the responses fill",
    }
