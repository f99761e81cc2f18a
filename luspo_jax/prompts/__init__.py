"""Problems become prompts: templates, what a model reads of a problem, the stream of a run.

Nothing here imports jax.
"""

from luspo_jax.prompts.renderer import (
    PromptRecord,
    Refusal,
    Renderer,
    agreed,
    encode,
    outcomes,
    pictured,
    with_images,
)
from luspo_jax.prompts.stream import PromptStream, Survey

__all__ = [
    "PromptRecord",
    "PromptStream",
    "Refusal",
    "Renderer",
    "Survey",
    "agreed",
    "encode",
    "outcomes",
    "pictured",
    "with_images",
]
