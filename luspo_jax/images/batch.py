"""Images of a batch, for the sampler and the trainer alike: stacked, and placed among tokens.

Host side, NumPy in and out. An image is anything with `patches()` and `grid_thw`, and where each is
stacked once `sha`, as `images.preparer.PreparedImage` has them; with one sha go the same patches.
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
      images: the arrays, of I images of S slots.
      num_units: units of each image, S over merge_size².
    """

    images: Images
    num_units: int


def stack(
    groups: Sequence[Sequence[Any]], config: DecoderConfig, *, multiple: int = 1
) -> tuple[Images, int, list[dict[str, int]]]:
    """Stacks the images of some groups, each once in its group.

    All groups have room for as many images as the one with most, rounded up so that devices share
    them and few programs are compiled. The windows of all are the bucket of the largest.

    Args:
      groups: the images of each micro-batch; one image at least in all.
      config: of the model.
      multiple: devices that share the images of a group.

    Returns:
      The images, group after group; units in each; of each group, sha → row within the group.

    Raises:
      ImageError: patches that are not of their grid.
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
    """Puts images in the slots that `layout.laid_out` gives them.

    Args:
      images: of each, its patches [P, C] as the image processor gives them, and its grid.
      config: of the tower.
      windows: windows of every image; default the bucket of the largest.
      count: rows to make, those without an image empty; default one an image.

    Raises:
      ImageError: patches that are not of their grid, or images that do not fit.
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
    """Says where the images of a prompt stand: (units_T, positions_T3, the next position).

    Args:
      tokens: of the prompt.
      images: of the prompt, in order.
      rows: the row of each among those that the tower encodes together.
      num_units: units in such a row.
      config: of the model.

    Returns:
      int32 unit that stands in place of each token, −1 for text; int32 rotary positions [T, 3]; the
      position of the token that comes next.

    Raises:
      ImageError: images that do not fit the placeholders.
    """
    units_T = token_units(tokens, _grids(images), rows, num_units, config)
    return units_T, *positions(tokens, images, config)


def positions(
    tokens: np.ndarray, images: Sequence[Any], config: DecoderConfig
) -> tuple[np.ndarray, int]:
    """Gives the int32 rotary positions [T, 3] of a prompt, and that of the token that comes next.

    Raises:
      ImageError: images that do not fit the placeholders.
    """
    return mrope_positions(tokens, _grids(images), config)


def check(tokens: np.ndarray, images: Sequence[Any], config: DecoderConfig, name: str) -> None:
    """Refuses images that do not fit the placeholders of a prompt, or a model without a tower.

    Raises:
      ValueError: beginning with `name`.
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
