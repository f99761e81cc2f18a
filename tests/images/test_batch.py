"""Images of a batch: each once in its group, in rows that its tokens name."""

import types

import numpy as np
import pytest

from luspo_jax.images.batch import check, in_slots, places, positions, stack
from luspo_jax.images.layout import laid_out, mrope_positions, token_units
from luspo_jax.images.record import ImageError
from tests.images.layout_cases import CONFIG, END, GRIDS, IMAGE, START, TOWER, tokens_of


def test_stacked_images_lie_in_their_slots():
    rng = np.random.default_rng(0)
    images = [(rng.normal(size=(h * w, 24)), (1, h, w)) for _, h, w in GRIDS[:3]]
    patches = in_slots(images, TOWER, count=5).images
    assert patches.patches_ISC.shape == (5, 2 * TOWER.window_slots, 24)
    for row, (values, grid) in enumerate(images):
        layout = laid_out(grid, TOWER)
        np.testing.assert_array_equal(
            patches.patches_ISC[row, layout.slots_P], values.astype(np.float32)
        )
        assert patches.valid_IS[row].sum() == len(values)
        assert not patches.patches_ISC[row][~patches.valid_IS[row]].any()
    assert not patches.valid_IS[3:].any()
    assert in_slots([], TOWER).images.patches_ISC.shape == (0, TOWER.window_slots, 24)


def test_patches_that_do_not_fit_are_named():
    with pytest.raises(ImageError, match=r"of grid \(1, 4, 4\) must be 16 x 24 .* not 16 x 23"):
        in_slots([(np.zeros((16, 23)), (1, 4, 4))], TOWER)
    image = (np.zeros((20 * 4, 24)), (1, 20, 4))
    with pytest.raises(ImageError, match=r"1 images of up to 3 windows .* 1 rows of 2 windows"):
        in_slots([image], TOWER, windows=2)
    with pytest.raises(ImageError, match=r"2 images .* do not fit into 1 rows"):
        in_slots([image, image], TOWER, count=1)


def image(sha, grid):
    """An image whose patches are drawn from its sha."""
    size = (grid[1] * grid[2], 24)
    patches_PC = np.random.default_rng(ord(sha)).normal(size=size).astype(np.float32)
    return types.SimpleNamespace(sha=sha, grid_thw=grid, patches=lambda: patches_PC)


A, B, C, D = (image(sha, grid) for sha, grid in zip("abcd", GRIDS[:4], strict=True))
FIELDS = ("patches_ISC", "positions_IS2", "valid_IS")


def test_each_image_lies_once_in_its_group():
    images, num_units, rows = stack([[A, B, A, C, A], [C, B], []], CONFIG, multiple=2)
    assert rows == [{"a": 0, "b": 1, "c": 2}, {"c": 0, "b": 1}, {}]
    windows = 2  # of the largest of all groups
    assert num_units == windows * TOWER.window_slots // TOWER.unit_patches
    # Room for three images, rounded up to 2 · {1, 2, 4 …}.
    parts = [
        in_slots([(x.patches(), x.grid_thw) for x in group], TOWER, windows=windows, count=4)
        for group in ([A, B, C], [C, B], [])
    ]
    for name in FIELDS:
        expected = np.concatenate([getattr(part.images, name) for part in parts])
        np.testing.assert_array_equal(getattr(images, name), expected)
    assert images.patches_ISC.dtype == np.float32


def test_windows_are_a_bucket():
    images, num_units, _ = stack([[A], [D]], CONFIG)
    windows = laid_out(D.grid_thw, TOWER).windows
    assert (windows, images.valid_IS.shape) == (5, (2, 6 * TOWER.window_slots))
    assert num_units == 6 * TOWER.window_slots // TOWER.unit_patches


def test_places_are_units_and_positions():
    tokens = tokens_of(1, START, [IMAGE] * 16, END, 2, START, [IMAGE], END)
    grids = [B.grid_thw, A.grid_thw]
    units_T, positions_T3, after = places(tokens, [B, A], [3, 1], 16, CONFIG)
    np.testing.assert_array_equal(units_T, token_units(tokens, grids, [3, 1], 16, CONFIG))
    expected = mrope_positions(tokens, grids, CONFIG)
    for found in ((positions_T3, after), positions(tokens, [B, A], CONFIG)):
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1] == expected[1]


def test_images_that_do_not_fit_a_prompt_are_refused_by_its_name():
    tokens = tokens_of(1, START, [IMAGE], END)
    check(tokens, [A], CONFIG, "prompt 7")
    check(tokens[:1], [], CONFIG, "prompt 7")
    with pytest.raises(ValueError, match=r"^prompt 7: 2 images for the placeholders of 1"):
        check(tokens, [A, A], CONFIG, "prompt 7")
    text = types.SimpleNamespace(vision=None)
    with pytest.raises(ValueError, match=r"^prompt 7 has 1 images and the model reads none"):
        check(tokens, [A], text, "prompt 7")
    check(tokens, [], text, "prompt 7")
