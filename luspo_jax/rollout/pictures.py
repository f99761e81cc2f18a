"""The host side of prompts with images: where their units and positions are."""

import numpy as np

from luspo_jax.models import image_layout
from luspo_jax.ops.sizes import rounded_up


def of_prompts(requests, config, *, length, rows, multiple=1):
    """(Patches, units_PT, positions_PT3) of a prefill of `requests`, and offsets_P.

    Images are rounded up to few counts that `multiple` devices share, their windows to a bucket.
    Without any image the first is None, and offsets_P are 0.

    Args:
      requests: of the batch, in order.
      config: the DecoderConfig.
      length: tokens that prompts are padded to.
      rows: prompts that the batch is padded to.
      multiple: devices that share the images.

    Raises:
      ImageError: images that do not fit a request's placeholders, naming its prompt_id.
    """
    offsets_P = np.zeros(rows, np.int32)
    images = [image for request in requests for image in request.images]
    if not images:
        return None, offsets_P
    patches = image_layout.stacked(
        [(image.patches(), image.grid_thw) for image in images],
        config.vision,
        count=rounded_up(len(images), multiple),
    )
    num_units = patches.valid_IS.shape[1] // config.vision.unit_patches
    units_PT = np.full((rows, length), -1, np.int32)
    positions_PT3 = np.zeros((rows, length, 3), np.int32)
    positions_PT3[:] = np.arange(length, dtype=np.int32)[:, None]
    first = 0
    for row, request in enumerate(requests):
        count, size = len(request.images), len(request.tokens)
        units_T, positions_T3, after = places(
            request.tokens, request.images, range(first, first + count), num_units, config
        )
        units_PT[row, :size], positions_PT3[row, :size] = units_T, positions_T3
        offsets_P[row] = after - size
        first += count
    return (patches, units_PT, positions_PT3), offsets_P


def places(tokens, images, rows, num_units, config):
    """(units_T, positions_T3, position of the next token) of a prompt; see `image_layout`."""
    grids = [image.grid_thw for image in images]
    units_T = image_layout.token_units(tokens, grids, rows, num_units, config)
    return units_T, *image_layout.mrope_positions(tokens, grids, config)


def check(tokens, images, config, name):
    """Refuses images that do not fit the placeholders of a prompt, or a model without a tower.

    Raises:
      ValueError: beginning with `name`.
    """
    if config.vision is None:
        if images:
            raise ValueError(f"{name} has {len(images)} images and the model reads none")
        return
    try:
        image_layout.image_spans(np.asarray(tokens), [image.grid_thw for image in images], config)
    except image_layout.ImageError as error:
        raise ValueError(f"{name}: {error}") from None
