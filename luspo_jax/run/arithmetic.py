"""The batch arithmetic: what the sizes of a configuration make of a step."""

import dataclasses

from luspo_jax.run.settings import Config


@dataclasses.dataclass(frozen=True)
class BatchArithmetic:
    """What "batch size" means in this run."""

    prompts_per_step: int
    group_size: int
    responses_per_step: int
    responses_per_minibatch: int
    responses_per_microbatch: int
    updates_per_step: int
    tokens_per_row: int
    pack_length: int = 0  # 0 without packing
    packed_rows_per_microbatch: int = 0

    @property
    def rows_per_microbatch(self) -> int:
        """Rows that are computed together, dense ones or one a response."""
        return self.packed_rows_per_microbatch or self.responses_per_microbatch

    def __str__(self) -> str:
        parts = (
            f"{self.packed_rows_per_microbatch} packed rows × {self.pack_length} tokens, as many "
            "as the responses fill"
            if self.pack_length
            else f"{self.responses_per_microbatch} rows × up to {self.tokens_per_row} tokens"
        )
        return (
            f"{self.prompts_per_step} prompts × {self.group_size} responses = "
            f"{self.responses_per_step} responses a step; {self.updates_per_step} optimizer "
            f"step(s) of {self.responses_per_minibatch} responses, in micro-batches of "
            f"{parts}"
        )


def batch_arithmetic(config: Config) -> BatchArithmetic:
    """Resolves the sizes of a step from a checked configuration.

    With packing, `responses_per_microbatch` is how many of the longest fit.
    """
    rollout, train = config.rollout, config.train
    responses = rollout.prompts_per_step * rollout.group_size
    longest = config.data.max_prompt_length + rollout.max_response_length
    together = responses // train.num_minibatches // train.num_microbatches
    pack_length = rows = 0
    if train.packing:
        pack_length = train.pack_length or longest
        rows = train.microbatch_tokens // pack_length
        together = rows * pack_length // longest
    return BatchArithmetic(
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        responses_per_step=responses,
        responses_per_minibatch=responses // train.num_minibatches,
        responses_per_microbatch=together,
        updates_per_step=train.num_minibatches * train.num_epochs,
        tokens_per_row=longest,
        pack_length=pack_length,
        packed_rows_per_microbatch=rows,
    )
