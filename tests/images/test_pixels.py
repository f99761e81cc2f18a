"""The arithmetic of the image processor on its own; `test_preparer` compares it with others."""

import numpy as np
import pytest

from luspo_jax.images.pixels import Patching, prepared, smart_size
from luspo_jax.images.record import ImageError
from tests.images.image_cases import encoded, gradient


def test_extreme_ratios():
    assert smart_size(1, 200, Patching()) == (28, 812)
    with pytest.raises(ImageError, match="aspect_ratio: 201 × 1 pixels"):
        smart_size(1, 201, Patching())


def test_bytes_and_pixels_agree():
    pixels = gradient(100, 90)
    first, second = (prepared(data, Patching()) for data in (pixels, encoded(pixels)))
    np.testing.assert_array_equal(first[0], second[0])
