"""Places of patches and tokens, against plain loops over windows and against hand-worked cases."""

import itertools

import numpy as np
import pytest

from luspo_jax.images.layout import (
    image_spans,
    laid_out,
    mrope_positions,
    num_tokens,
    token_units,
)
from luspo_jax.images.record import ImageError
from tests.images.layout_cases import CONFIG, END, GRIDS, IMAGE, START, TOWER, VIDEO, tokens_of


@pytest.mark.parametrize("grid", GRIDS)
def test_every_patch_lies_in_its_window(grid):
    """Walks the image as the processor does: units in raster order, patches of each inside."""
    layout = laid_out(grid, TOWER)
    _, height, width = grid
    places = [
        (row + inner_row, column + inner_column)
        for row, column in itertools.product(range(0, height, 2), range(0, width, 2))
        for inner_row, inner_column in itertools.product(range(2), range(2))
    ]
    across = -(-width // 8)
    assert layout.windows == -(-height // 8) * across
    assert len(set(layout.slots_P.tolist())) == len(places)
    for slot, (row, column) in zip(layout.slots_P, places, strict=True):
        assert slot // TOWER.window_slots == row // 8 * across + column // 8
        assert tuple(layout.positions_S2[slot]) == (row, column)
    assert layout.valid_S.sum() == height * width
    np.testing.assert_array_equal(np.flatnonzero(layout.valid_S), np.sort(layout.slots_P))
    # A unit's patches are four slots in a row, so that merging them is a reshape.
    np.testing.assert_array_equal(layout.slots_P.reshape(-1, 4)[:, 0], 4 * layout.units_U)
    assert layout.num_tokens == num_tokens(grid, TOWER) == height * width // 4


def test_places_are_shared_and_cannot_be_changed():
    layout = laid_out(np.array([1, 4, 4]), TOWER)
    assert laid_out((1, 4, 4), TOWER) is layout
    with pytest.raises(ValueError, match="read-only"):
        layout.slots_P[0] = 1


def test_positions_of_text_and_images():
    tokens = tokens_of(1, 2, START, [IMAGE] * 6, END, 3, START, [IMAGE] * 2, END)
    grids = [(1, 4, 6), (1, 4, 2)]
    positions_T3, after = mrope_positions(tokens, grids, CONFIG)
    expected = [
        (0, 0, 0), (1, 1, 1), (2, 2, 2),
        (3, 3, 3), (3, 3, 4), (3, 3, 5), (3, 4, 3), (3, 4, 4), (3, 4, 5),
        (6, 6, 6), (7, 7, 7), (8, 8, 8),
        (9, 9, 9), (9, 10, 9), (11, 11, 11),
    ]  # fmt: skip
    assert positions_T3.dtype == np.int32
    np.testing.assert_array_equal(positions_T3, expected)
    assert after == 12
    assert image_spans(tokens, grids, CONFIG) == [(3, 9), (12, 14)]


def test_positions_of_text_alone_count():
    positions_T3, after = mrope_positions(tokens_of(5, 6, 7), [], CONFIG)
    np.testing.assert_array_equal(positions_T3, np.repeat(np.arange(3)[:, None], 3, axis=1))
    assert after == 3
    assert mrope_positions(tokens_of(), [], CONFIG)[1] == 0


def test_an_image_may_end_a_prompt_or_touch_another():
    tokens = tokens_of(1, [IMAGE] * 3)
    positions_T3, after = mrope_positions(tokens, [(1, 2, 4), (1, 2, 2)], CONFIG)
    np.testing.assert_array_equal(positions_T3, [(0, 0, 0), (1, 1, 1), (1, 1, 2), (3, 3, 3)])
    assert after == 4


def test_units_stand_at_theirtokens_of():
    tokens = tokens_of(1, [IMAGE] * 15, 2, [IMAGE], 3)
    index_T = token_units(tokens, [(1, 10, 6), (1, 2, 2)], [2, 0], 32, CONFIG)
    assert index_T.dtype == np.int32
    assert index_T[[0, 16, 18]].tolist() == [-1, -1, -1]
    # The fifth row of units begins the second window of 16.
    assert (index_T[1:16] - 64).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18]
    assert index_T[17] == 0


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        (tokens_of(1, [IMAGE] * 4), [(1, 4, 4), (1, 2, 2)], "2 images for the placeholders of 1"),
        (tokens_of(1), [(1, 4, 4)], "1 images for the placeholders of 0"),
        (tokens_of(1, [IMAGE] * 5), [(1, 4, 4)], "1 placeholders from 5 on .* have no image: 1"),
        (tokens_of([IMAGE]), [], r"1 placeholders from 0 on \(image token 30\) have no image: 0"),
        (tokens_of([IMAGE] * 3, 1), [(1, 4, 4)], "image 1 of 1 has 4 tokens and 3 placeholders"),
        (tokens_of(1, VIDEO), [], r"token 31 at 1 stands for a video \(video_token_id\)"),
        (tokens_of([IMAGE] * 4), [(2, 4, 4)], "has 2 moments, a video's"),
        (tokens_of([IMAGE] * 4), [(1, 3, 4)], "3 x 4 patches cannot be merged into units of 2 x 2"),
        (tokens_of([IMAGE] * 4), [(1, 0, 4)], "cannot be merged"),
        (tokens_of([IMAGE] * 4), [(4, 4)], r"is \(1, rows, columns\) of patches, not \(4, 4\)"),
    ],
)
def test_bad_images_are_named(tokens, grids, message):
    with pytest.raises(ImageError, match=message):
        mrope_positions(tokens, grids, CONFIG)
