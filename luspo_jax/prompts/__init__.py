"""Turns problems into prompts: templates, a renderer, and the prompt stream of a run.

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
