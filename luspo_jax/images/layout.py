"""The places of an image's patches and tokens, computed on the host to keep shapes static.

The image processor gives patches unit by unit: units (merge_size² patches, one token) in raster
order, and patches in raster order inside each unit. The tower takes them in slots, window after
window; a window is a full square of slots even if the image ends inside it. Attention within
windows is then a plain reshape, and compiled programs depend on an image's size only through its
number of windows, rounded up to a bucket.

NumPy only: this runs in worker processes, which have no jax.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from luspo_jax.images.record import ImageError
from luspo_jax.models.vision_config import VisionConfig

Grid = tuple[int, int, int]  # patches of an image in time (1), rows and columns


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """Places of one image of P patches and U units in W windows, of `window_slots` slots each.

    Attributes:
      grid: patches in time, rows and columns.
      windows: W.
      slots_P: slot of every patch, in the image processor's order.
      units_U: index in slot order of each token's unit, for tokens in raster order.
      positions_S2: int32 row and column of the patch in every slot; S = W · window_slots.
      valid_S: whether the slot holds a patch; false past the image's edge.
    """

    grid: Grid
    windows: int
    slots_P: np.ndarray
    units_U: np.ndarray
    positions_S2: np.ndarray
    valid_S: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the image takes in a prompt."""
        return len(self.units_U)


def checked_grid(grid: Any, config: VisionConfig) -> Grid:
    """Returns a grid of patches (time, rows, columns) as integers.

    Raises:
      ImageError: the grid is a video's, empty, or cannot be merged into units.
    """
    numbers = tuple(int(size) for size in np.asarray(grid).reshape(-1))
    if len(numbers) != 3:
        raise ImageError(
            "misfit", f"the grid of an image is (1, rows, columns) of patches, not {numbers}"
        )
    if numbers[0] != 1:
        raise ImageError(
            "misfit",
            f"a grid of {numbers} patches has {numbers[0]} moments, a video's: only images, of 1, "
            f"are implemented",
        )
    if min(numbers) < 1 or numbers[1] % config.merge_size or numbers[2] % config.merge_size:
        raise ImageError(
            "misfit",
            f"a grid of {numbers[1]} x {numbers[2]} patches cannot be merged into units of "
            f"{config.merge_size} x {config.merge_size}: resize the image to multiples of "
            f"{config.merge_size * config.patch_size} pixels, as Qwen2VLImageProcessor does",
        )
    return numbers


def num_tokens(grid: Any, config: VisionConfig) -> int:
    """Returns the number of tokens of an image in a prompt: its patches over merge_size²."""
    _, rows, columns = checked_grid(grid, config)
    return rows * columns // config.unit_patches


def laid_out(grid: Any, config: VisionConfig) -> ImageLayout:
    """Returns the places of an image with a grid (1, rows, columns) of patches.

    Windows, the units of a window and the patches of a unit are in raster order. Equal grids give
    the same arrays, which are read-only.

    Raises:
      ImageError: as `checked_grid`.
    """
    return _laid_out(checked_grid(grid, config), config)


@functools.lru_cache(maxsize=1024)
def _laid_out(grid, config):
    merge, side = config.merge_size, config.window_units
    height, width = grid[1] // merge, grid[2] // merge
    row_U, column_U = (x.reshape(-1) for x in np.indices((height, width)))
    across = -(-width // side)
    window_U = row_U // side * across + column_U // side
    units_U = window_U * side**2 + row_U % side * side + column_U % side
    inner = np.arange(config.unit_patches)
    slots_P = (units_U[:, None] * config.unit_patches + inner).reshape(-1)
    windows = -(-height // side) * across
    positions_S2 = np.zeros((windows * config.window_slots, 2), np.int32)
    valid_S = np.zeros(len(positions_S2), bool)
    rows = row_U[:, None] * merge + inner // merge
    columns = column_U[:, None] * merge + inner % merge
    positions_S2[slots_P] = np.stack([rows, columns], axis=-1).reshape(-1, 2)
    valid_S[slots_P] = True
    layout = ImageLayout(
        grid, windows, slots_P.astype(np.int32), units_U.astype(np.int32), positions_S2, valid_S
    )
    for array in (layout.slots_P, layout.units_U, positions_S2, valid_S):
        array.flags.writeable = False
    return layout


def image_spans(tokens: np.ndarray, grids: Sequence[Any], config) -> list[tuple[int, int]]:
    """Returns where each image's placeholders begin and end in a token sequence.

    Args:
      tokens: int tokens [T], with one placeholder per image token.
      grids: of the images, in order.
      config: DecoderConfig with a tower.

    Raises:
      ImageError: the numbers of images and placeholder runs differ, an image has another number of
        placeholders than tokens, or there are placeholders of a video.
    """
    tokens = np.asarray(tokens)
    if (tokens == config.video_token_id).any():
        raise ImageError(
            "misfit",
            f"token {config.video_token_id} at {int(np.argmax(tokens == config.video_token_id))} "
            f"stands for a video (video_token_id), and only images are implemented",
        )
    here = tokens == config.image_token_id
    sizes = [num_tokens(grid, config.vision) for grid in grids]
    spans, start = [], 0
    for number, size in enumerate(sizes):
        rest = np.flatnonzero(here[start:])
        if not len(rest):
            raise ImageError(
                "misfit",
                f"{len(sizes)} images for the placeholders of {number}: image token "
                f"{config.image_token_id} (image_token_id) must stand once for each token of an "
                f"image, here {sizes}",
            )
        start += int(rest[0])
        run = _run(here, start)
        if run < size:
            raise ImageError(
                "misfit",
                f"image {number + 1} of {len(sizes)} has {size} tokens and {run} placeholders, at "
                f"{start}: image token {config.image_token_id} (image_token_id) must stand once "
                f"for each token of its image",
            )
        spans.append((start, start + size))
        start += size
    left = np.flatnonzero(here[start:])
    if len(left):
        raise ImageError(
            "misfit",
            f"{len(left)} placeholders from {start + int(left[0])} on (image token "
            f"{config.image_token_id}) have no image: {len(sizes)} images have {sum(sizes)} tokens",
        )
    return spans


def _run(here, start):
    """Returns the number of consecutive true entries from `start` on."""
    ends = np.flatnonzero(~here[start:])
    return int(ends[0]) if len(ends) else len(here) - start


def mrope_positions(tokens: np.ndarray, grids: Sequence[Any], config) -> tuple[np.ndarray, int]:
    """Returns (int32 positions [T, 3] in time, row and column; position of the next token).

    A text token's three positions are equal: one more than the greatest before it. The tokens of an
    image that begins at position p have time p, and p plus the row and column of their unit
    (`get_rope_index` of transformers; Wang et al. 2024, arXiv:2409.12191, section 2.1). The
    sequence begins at 0; `tokens` has no padding.

    Raises:
      ImageError: as `image_spans`.
    """
    tokens = np.asarray(tokens)
    positions_T3 = np.zeros((len(tokens), 3), np.int32)
    place = end = 0
    for (start, stop), grid in zip(image_spans(tokens, grids, config), grids, strict=True):
        _, rows, columns = (int(size) for size in np.asarray(grid).reshape(-1))
        units = rows // config.vision.merge_size, columns // config.vision.merge_size
        positions_T3[end:start] = place + np.arange(start - end, dtype=np.int32)[:, None]
        place += start - end
        positions_T3[start:stop, 0] = place
        positions_T3[start:stop, 1:] = place + np.indices(units).reshape(2, -1).T
        place, end = place + max(units), stop
    positions_T3[end:] = place + np.arange(len(tokens) - end, dtype=np.int32)[:, None]
    return positions_T3, place + len(tokens) - end


def token_units(
    tokens: np.ndarray, grids: Sequence[Any], rows: Sequence[int], num_units: int, config
) -> np.ndarray:
    """Returns the row of the flattened embeddings that replaces each token: int32 [T], −1 for text.

    Args:
      tokens: int tokens [T].
      grids: of the images, in order.
      rows: each image's row in the batch that the tower encodes.
      num_units: units per row, slots over merge_size².
      config: DecoderConfig with a tower.

    Raises:
      ImageError: as `image_spans`.
    """
    index_T = np.full(len(tokens), -1, np.int32)
    spans = image_spans(tokens, grids, config)
    for (start, stop), grid, row in zip(spans, grids, rows, strict=True):
        index_T[start:stop] = row * num_units + laid_out(grid, config.vision).units_U
    return index_T
