"""Samples to score, from prompts and the texts of responses."""

from typing import Any

from luspo_jax.rewards.answers.extraction import with_opening
from luspo_jax.rewards.record import Sample


def sample_of(prompt: Any, text: str, length: int, max_length: int) -> Sample:
    """Returns a response as verifiers see it; a `<think>` that ends the prompt belongs to it.

    Args:
      prompt: anything with `text` and `example` (`prompts.PromptRecord`).
      text: the decoded response.
      length: its tokens.
      max_length: the sampler's limit, in tokens.
    """
    return Sample(
        response=with_opening(prompt.text, text),
        answer=prompt.example.answer,
        length=length,
        max_length=max_length,
        meta=prompt.example.meta,
        problem=prompt.example.problem,
    )
