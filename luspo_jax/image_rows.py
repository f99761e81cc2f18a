"""Images in training rows: rotary positions, the units at tokens, each micro-batch's images.

Host side, NumPy in and out. A prompt is anything with `tokens` and `images`, each image with
`patches()`, `grid_thw` and `sha` (`prompts.PromptRecord`, `images.preparer.PreparedImage`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from luspo_jax.images import batch
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.sharding import Layout
from luspo_jax.types import TokenBatch


def with_positions(rows: TokenBatch, prompts: Sequence[Any], config: DecoderConfig) -> TokenBatch:
    """The rows with rotary positions [B, T, 3] of rows that hold images, the response after its
    prompt; as they are, of a model of text.

    Args:
      rows: of `packing.padded_rows`.
      prompts: of each row, with its images.
      config: of the model.

    Raises:
      ImageError: images that do not fit a prompt's placeholders.
    """
    if config.vision is None:
        return rows
    length = rows.tokens_BT.shape[1]
    positions = np.zeros((len(rows.tokens_BT), length, 3), np.int32)
    places = np.arange(length, dtype=np.int32)[:, None]
    for row, prompt in enumerate(prompts):
        of_prompt, after = batch.positions(prompt.tokens, prompt.images, config)
        start = len(prompt.tokens)
        positions[row] = places + (after - start)
        positions[row, :start] = of_prompt
    positions[rows.segment_ids_BT == 0] = 0
    return dataclasses.replace(rows, positions_BT=positions)


def with_images(
    rows: TokenBatch,
    prompts: Sequence[Any],
    parts_B: np.ndarray,
    num_parts: int,
    *,
    config: DecoderConfig,
    layout: Layout | None = None,
) -> TokenBatch:
    """The rows with the images of each micro-batch, each once, and the unit at every token.

    One prompt's responses in one micro-batch share its images. All micro-batches have room for as
    many images as the one with most, rounded up so that devices share them and few programs are
    compiled. Rows without any image stay as they are.

    Args:
      rows: of `packing.padded_rows`.
      prompts: of each row, with its images; rows beyond them are empty.
      parts_B: the micro-batch of each row.
      num_parts: micro-batches.
      config: of the model.
      layout: where images will lie; None on one device.

    Raises:
      ImageError: images that do not fit a prompt's placeholders.
    """
    if not any(prompt.images for prompt in prompts):
        return rows
    groups = [[] for _ in range(num_parts)]
    for part, prompt in zip(parts_B, prompts, strict=False):
        groups[part] += prompt.images
    multiple = 1 if layout is None else layout.size("batch")
    images, num_units, rows_of = batch.stack(groups, config, multiple=multiple)
    units_BT = np.full(rows.tokens_BT.shape, -1, np.int32)
    for row, (part, prompt) in enumerate(zip(parts_B, prompts, strict=False)):
        at = [rows_of[part][image.sha] for image in prompt.images]
        units_T, _, _ = batch.places(prompt.tokens, prompt.images, at, num_units, config)
        units_BT[row, : len(prompt.tokens)] = units_T
    return dataclasses.replace(rows, units_BT=units_BT, images=images)
