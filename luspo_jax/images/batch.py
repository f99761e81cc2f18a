"""Stacks the images of a batch and places them among tokens, for sampler and trainer alike.

Host side, NumPy in and out. An image is anything with `patches()` and `grid_thw`, plus `sha` if
each is stacked once, like `images.preparer.PreparedImage`; equal `sha` means equal patches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from luspo_jax.images.layout import image_spans, laid_out, mrope_positions, token_units
from luspo_jax.images.record import ImageError
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.vision_config import VisionConfig
from luspo_jax.ops.sizes import bucket_count, rounded_up
from luspo_jax.types import Images


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Images in slots, ready for `vision.encode`.

    Attributes:
      images: arrays of I images of S slots.
      num_units: units of each image, S over merge_size².
    """

    images: Images
    num_units: int


def stack(
    groups: Sequence[Sequence[Any]], config: DecoderConfig, *, multiple: int = 1
) -> tuple[Images, int, list[dict[str, int]]]:
    """Stacks the images of several groups, each image once per group.

    Each group gets as many rows as the largest has images, rounded up so that devices divide them
    and few programs are compiled. The bucket of the largest image sets the windows of all.

    Args:
      groups: the images of each micro-batch; at least one image overall.
      config: of the model.
      multiple: number of devices that share the images of a group.

    Returns:
      The images of all groups, concatenated; units per image; for each group, sha → row in it.

    Raises:
      ImageError: patches do not match their grid.
    """
    own = [{image.sha: image for image in group} for group in groups]
    room = rounded_up(max(map(len, own)), multiple)
    layouts = [laid_out(image.grid_thw, config.vision) for of in own for image in of.values()]
    windows = bucket_count(max(layout.windows for layout in layouts))
    parts = [
        in_slots(
            [(image.patches(), image.grid_thw) for image in of.values()],
            config.vision,
            windows=windows,
            count=room,
        )
        for of in own
    ]
    names = [field.name for field in dataclasses.fields(Images)]
    images = Images(*(np.concatenate([getattr(x.images, name) for x in parts]) for name in names))
    rows = [{sha: row for row, sha in enumerate(of)} for of in own]
    return images, parts[0].num_units, rows


def in_slots(
    images: Sequence[tuple[np.ndarray, Any]],
    config: VisionConfig,
    *,
    windows: int | None = None,
    count: int | None = None,
) -> Stacked:
    """Puts images into the slots that `layout.laid_out` assigns.

    Args:
      images: (patches [P, C] in the image processor's order, grid) of each image.
      config: of the tower.
      windows: windows of every image; by default the bucket of the largest.
      count: number of rows, those without an image empty; by default one per image.

    Raises:
      ImageError: patches do not match their grid, or images do not fit.
    """
    layouts = [laid_out(grid, config) for _, grid in images]
    largest = max((layout.windows for layout in layouts), default=1)
    windows = bucket_count(largest) if windows is None else windows
    count = len(images) if count is None else count
    if largest > windows or len(images) > count:
        raise ImageError(
            "misfit",
            f"{len(images)} images of up to {largest} windows do not fit into {count} rows of "
            f"{windows} windows",
        )
    slots, channels = windows * config.window_slots, int(np.prod(config.patch_shape))
    patches_ISC = np.zeros((count, slots, channels), np.float32)
    positions_IS2 = np.zeros((count, slots, 2), np.int32)
    valid_IS = np.zeros((count, slots), bool)
    for row, ((patches_PC, _), layout) in enumerate(zip(images, layouts, strict=True)):
        expected = (len(layout.slots_P), channels)
        if np.shape(patches_PC) != expected:
            raise ImageError(
                "misfit",
                f"the patches of an image of grid {layout.grid} must be {expected[0]} x "
                f"{expected[1]} numbers, not {' x '.join(map(str, np.shape(patches_PC)))}",
            )
        patches_ISC[row, layout.slots_P] = patches_PC
        own = len(layout.valid_S)
        positions_IS2[row, :own], valid_IS[row, :own] = layout.positions_S2, layout.valid_S
    return Stacked(Images(patches_ISC, positions_IS2, valid_IS), slots // config.unit_patches)


def places(
    tokens: np.ndarray,
    images: Sequence[Any],
    rows: Sequence[int],
    num_units: int,
    config: DecoderConfig,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the places of a prompt's images: (units_T, positions_T3, the next position).

    Args:
      tokens: of the prompt.
      images: of the prompt, in order.
      rows: the row of each image in the batch that the tower encodes.
      num_units: units per row.
      config: of the model.

    Returns:
      int32 unit that replaces each token, −1 for text; int32 rotary positions [T, 3]; the position
      of the next token.

    Raises:
      ImageError: images that do not fit the placeholders.
    """
    units_T = token_units(tokens, _grids(images), rows, num_units, config)
    return units_T, *positions(tokens, images, config)


def positions(
    tokens: np.ndarray, images: Sequence[Any], config: DecoderConfig
) -> tuple[np.ndarray, int]:
    """Returns the int32 rotary positions [T, 3] of a prompt, and that of the next token.

    Raises:
      ImageError: images that do not fit the placeholders.
    """
    return mrope_positions(tokens, _grids(images), config)


def check(tokens: np.ndarray, images: Sequence[Any], config: DecoderConfig, name: str) -> None:
    """Refuses images that do not fit a prompt's placeholders, or that the model has no tower for.

    Raises:
      ValueError: with a message that begins with `name`.
    """
    if config.vision is None:
        if images:
            raise ValueError(f"{name} has {len(images)} images and the model reads none")
        return
    try:
        image_spans(np.asarray(tokens), _grids(images), config)
    except ImageError as error:
        raise ValueError(f"{name}: {error.detail}") from None


def _grids(images):
    return [image.grid_thw for image in images]
