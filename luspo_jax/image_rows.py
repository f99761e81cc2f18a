"""Images in training rows: rotary positions, the units at tokens, each micro-batch's images.

Host side, NumPy in and out. A prompt is anything with `tokens` and `images`, each image with
`patches()`, `grid_thw` and `sha` (`prompts.PromptRecord`, `images.PreparedImage`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from luspo_jax.models import image_layout
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.ops.sizes import bucket_count, rounded_up
from luspo_jax.sharding import Layout
from luspo_jax.types import Images, TokenBatch


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
        grids = [image.grid_thw for image in prompt.images]
        of_prompt, after = image_layout.mrope_positions(prompt.tokens, grids, config)
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
    own = [{} for _ in range(num_parts)]  # micro-batch → sha of an image → (its row, the image)
    for part, prompt in zip(parts_B, prompts, strict=False):
        for image in prompt.images:
            own[part].setdefault(image.sha, (len(own[part]), image))
    room = rounded_up(max(map(len, own)), 1 if layout is None else layout.size("batch"))
    every = [image for images in own for _, image in images.values()]
    windows = bucket_count(
        max(image_layout.laid_out(x.grid_thw, config.vision).windows for x in every)
    )
    stacks = [
        image_layout.stacked(
            [(image.patches(), image.grid_thw) for _, image in images.values()],
            config.vision,
            windows=windows,
            count=room,
        )
        for images in own
    ]
    num_units = windows * config.vision.window_slots // config.vision.unit_patches
    units_BT = np.full(rows.tokens_BT.shape, -1, np.int32)
    for row, (part, prompt) in enumerate(zip(parts_B, prompts, strict=False)):
        at = [own[part][image.sha][0] for image in prompt.images]
        grids = [image.grid_thw for image in prompt.images]
        units_BT[row, : len(prompt.tokens)] = image_layout.token_units(
            prompt.tokens, grids, at, num_units, config
        )
    images = Images(
        *(
            np.concatenate([getattr(stack, field.name) for stack in stacks])
            for field in dataclasses.fields(Images)
        )
    )
    return dataclasses.replace(rows, units_BT=units_BT, images=images)
