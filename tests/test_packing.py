"""Training rows hold exactly what was sampled."""

import numpy as np
import pytest

from luspo_jax import packing


def test_rows_hold_prompt_then_response():
    rows = packing.padded_rows(
        [np.array([5, 6]), np.array([7])], [np.array([1, 2, 3]), np.array([4])], length=6, pad_id=9
    )
    np.testing.assert_array_equal(rows.tokens_BT, [[5, 6, 1, 2, 3, 9], [7, 4, 9, 9, 9, 9]])
    np.testing.assert_array_equal(rows.segment_ids_BT, [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.positions_BT, [[0, 1, 2, 3, 4, 0], [0, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        rows.response_mask_BT, np.array([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]], bool)
    )
    placed = packing.place_responses([[0.1, 0.2, 0.3], [0.4]], rows.response_mask_BT)
    np.testing.assert_allclose(placed[0], [0, 0, 0.1, 0.2, 0.3, 0])
    np.testing.assert_allclose(placed[1], [0, 0.4, 0, 0, 0, 0])


def test_a_row_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="row 1"):
        packing.padded_rows(
            [np.array([1]), np.array([1, 2])], [np.array([1]), np.array([3, 4])], length=3, pad_id=0
        )


@pytest.mark.parametrize(
    ("longest", "expected"), [(1, 25), (25, 25), (26, 50), (99, 100), (100, 100)]
)
def test_bucket_length(longest, expected):
    assert packing.bucket_length(longest, 100, num_buckets=4) == expected


def test_bucket_length_beyond_maximum_is_refused():
    with pytest.raises(ValueError, match="exceeds"):
        packing.bucket_length(101, 100, num_buckets=4)
