"""Assumed images of a rehearsed run, and the work of the vision tower on them.

Conventions are those of `costs`; for the tower itself:

    matrices    every slot of every row of images is computed, with or without a patch:
                a block forward 1, backward 2, recomputed as a layer of the decoder is; the product
                with the pixels forward 1, backward 1 (pixels have no gradient); the merger 1 and 2
    attention   windowed blocks: window² pairs a window, forward 2 products a pair, backward 5 (the
                scores again); the others slots² pairs an image, 2 and 7 (5 with "reference")

A frozen tower has only a forward pass. Scores of windows pass memory 3 times forward and 6
backward, in float32. Every device gets the embeddings of all images of its micro-batch.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.command import UsageError
from experiments.rehearsal.costs import RECOMPUTED, Parts, Work, others
from luspo_jax.images.layout import laid_out
from luspo_jax.images.pixels import Patching, smart_size
from luspo_jax.images.record import ImageError
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.vision_config import VisionConfig
from luspo_jax.ops.sizes import bucket_count
from luspo_jax.types import Images


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Assumed images: every prompt has `count`, all of one size.

    Attributes:
      count: of each prompt.
      height, width: in pixels, after resizing.
      tokens: of each image in its prompt.
      slots: of each in the tower, its windows rounded up to a bucket.
    """

    count: int
    height: int
    width: int
    tokens: int
    slots: int


def assumed(
    config: ConfigDict,
    model: DecoderConfig,
    count: int | None = None,
    size: tuple[int, int] | None = None,
) -> Pictures | None:
    """Returns the images with which a run is rehearsed; None without images.

    Args:
      config: of the run.
      model: its decoder.
      count: images per prompt; by default 1, or 0 for a text model.
      size: (height, width) in pixels, limited by `data.min_pixels` and `data.max_pixels`; by
        default the largest square that these and the longest prompt allow.

    Raises:
      UsageError: images for a text model, or more than a prompt holds.
    """
    vision = model.vision
    if vision is None and (count or size):
        raise UsageError(f"--images and --image_size: {config.model.path} reads no images")
    count = 1 if count is None else count
    if vision is None or not count:
        return None
    side = vision.patch_size * vision.merge_size
    most = config.data.max_prompt_length // count - 2  # tokens; two stand around an image
    patching = Patching(
        vision.patch_size,
        vision.merge_size,
        min_pixels=config.data.min_pixels or side**2,
        max_pixels=config.data.max_pixels or max(1, most) * side**2,
    )
    if size is None:
        units = math.isqrt(max(1, min(most, patching.max_pixels // side**2)))
        size = (units * side, units * side)
    try:
        height, width = smart_size(*size, patching)
    except ImageError as error:
        raise UsageError(f"--image_size={size[0]}x{size[1]}: {error}") from None
    grid = 1, height // vision.patch_size, width // vision.patch_size
    layout = laid_out(grid, vision)
    if layout.num_tokens > most:
        raise UsageError(
            f"--images={count} of {height} x {width} pixels take {layout.num_tokens} tokens each "
            f"and data.max_prompt_length={config.data.max_prompt_length} holds {most}: lower "
            f"data.max_pixels or --image_size, or raise data.max_prompt_length"
        )
    slots = bucket_count(layout.windows) * vision.window_slots
    return Pictures(count, height, width, layout.num_tokens, slots)


def shapes(images: int, pictures: Pictures, vision: VisionConfig) -> Images:
    """Returns the shapes of `images` images in slots."""
    S = pictures.slots
    return Images(
        patches_ISC=jax.ShapeDtypeStruct((images, S, math.prod(vision.patch_shape)), np.float32),
        positions_IS2=jax.ShapeDtypeStruct((images, S, 2), np.int32),
        valid_IS=jax.ShapeDtypeStruct((images, S), bool),
    )


def described(pictures: Pictures | None) -> dict[str, Any]:
    """Describes the images for a report's `lengths`; empty without images."""
    if pictures is None:
        return {}
    values = dataclasses.asdict(pictures)
    return {
        "images": {"a_prompt": values.pop("count"), **values},
    }


# ---------------------------------------------------------------- costs


def _block(vision):
    """Counts the entries of a block's matrices."""
    return 4 * vision.embed_dim**2 + 3 * vision.embed_dim * vision.mlp_dim


def _merger(vision):
    joined = vision.unit_patches * vision.embed_dim
    return joined * (joined + vision.out_dim)


def _pixels(vision):
    return math.prod(vision.patch_shape) * vision.embed_dim


def matrices(vision: VisionConfig) -> int:
    """Counts the entries of all matrices of the tower."""
    return vision.depth * _block(vision) + _merger(vision) + _pixels(vision)


def forward(vision: VisionConfig, images: int, slots: int, part: Parts, width: int) -> Work:
    """Counts the tower over `images` rows of `slots`, over the devices that share tokens."""
    args = vision, images, slots, part, width
    work = _products(*args) + _pixel_product(*args) + _merging(*args)
    work += _attention(*args, products=(2, 2), scores=3)
    return work + _embeddings(*args)


def backward(
    vision: VisionConfig,
    images: int,
    slots: int,
    part: Parts,
    width: int,
    *,
    remat: str,
    kernel: str,
) -> Work:
    """Counts the tower's backward pass, with recomputation."""
    args = vision, images, slots, part, width
    work = _pixel_product(*args)
    for again in (_products(*args), _merging(*args)):
        work += Work(2 * again.flops, 2 * again.memory, again.links)
    grads = 4 * matrices(vision) / part.tensor
    work += Work(0, 2 * grads + 3 * grads / part.embed, grads * others(part.embed))
    work += Work(0, 0, 2 * grads / part.embed * others(part.copies))
    full = 5 if kernel == "reference" else 7
    work += _attention(*args, products=(5, full), scores=6)
    layers, with_attention = RECOMPUTED[remat]
    if layers:
        last = vision.embed_dim * vision.mlp_dim
        work += _products(*args, share=1 - last / _block(vision))
    if with_attention:
        work += _attention(*args, products=(2, 2), scores=3)
    return work + _embeddings(*args)


def _embeddings(vision, images, slots, part, width):
    """Counts embeddings written and sent to every device, or their gradients summed over all."""
    size = width * images * slots / vision.unit_patches * vision.out_dim
    return Work(0, size, size * others(part.tokens))


def training(*args: Any, frozen: bool, remat: str, kernel: str) -> Work:
    """Counts the tower's part of one micro-batch of an update; arguments as for `forward`."""
    work = forward(*args)
    return work if frozen else work + backward(*args, remat=remat, kernel=kernel)


def activation_values(vision: VisionConfig, remat: str) -> int:
    """Counts values per slot kept for the backward pass, and those of the current block."""
    D, F = vision.embed_dim, vision.mlp_dim
    inside = 16 * D + 3 * F + 3 * vision.num_heads * vision.window_slots
    kept = {"none": inside, "full": D, "offload": D, "attention": 2 * D, "dots": 6 * D + 2 * F}
    return vision.depth * kept[remat] + inside


def _products(vision, images, slots, part, width, share=1.0):
    """Counts the forward products of all blocks; `share` of them, for a recomputation."""
    D, F, t, c = vision.embed_dim, vision.mlp_dim, part.tensor, width
    patches, entries = images * slots / part.tokens, vision.depth * _block(vision)
    gathered = c * entries / t
    memory = gathered * (2 if part.embed > 1 else 1)
    memory += c * patches * vision.depth * (7 * D + 3 * F) / t
    sums = 2 * c * 2 * vision.depth * patches * D
    links = gathered * others(part.embed) + sums * others(t)
    return Work(2 * patches * entries * share / t, memory, links)


def _pixel_product(vision, images, slots, part, width):
    """Counts the product with the pixels, which are on every device of those that share heads."""
    patches, gathered = images * slots / part.tokens, width * _pixels(vision)
    memory = gathered * (2 if part.embed > 1 else 1)
    memory += width * patches * (math.prod(vision.patch_shape) + vision.embed_dim)
    return Work(2 * patches * _pixels(vision), memory, gathered * others(part.embed))


def _merging(vision, images, slots, part, width):
    """Counts the merger's forward pass."""
    t, c = part.tensor, width
    units, gathered = images * slots / part.tokens / vision.unit_patches, c * _merger(vision) / t
    memory = gathered * (2 if part.embed > 1 else 1)
    memory += c * units * (3 * vision.unit_patches * vision.embed_dim + vision.out_dim) / t
    links = gathered * others(part.embed) + 2 * c * units * vision.out_dim * others(t)
    return Work(2 * units * _merger(vision) / t, memory, links)


def _attention(vision, images, slots, part, width, *, products, scores):
    """Counts `products` per pair, in windows and over whole images; window scores pass memory."""
    D, inside, full = vision.embed_dim, *_blocks(vision)
    patches = images * slots / part.tokens / part.tensor
    in_windows = patches * vision.window_slots * inside
    flops = 2 * D * (products[0] * in_windows + products[1] * patches * slots * full)
    passes = products[0] * inside + products[1] * full
    memory = width * passes / 2 * patches * 4 * D
    memory += 4 * scores * vision.num_heads * in_windows
    keys = 2 * D * width * full * images * slots / part.batch / part.tensor
    return Work(flops, memory, keys * others(part.length))


def _blocks(vision):
    """Returns (blocks that attend in windows, blocks that attend over the image)."""
    return vision.depth - len(vision.full_layers), len(vision.full_layers)


def image_size(text: str) -> tuple[int, int] | None:
    """Parses "HEIGHTxWIDTH" into (height, width); None if empty."""
    if not text:
        return None
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--image_size={text} must be HEIGHTxWIDTH in pixels, as 448x672")
    return int(parts[0]), int(parts[1])
