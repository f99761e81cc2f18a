"""Few sizes, each large enough."""

import pytest

from luspo_jax.ops.sizes import bucket_count, bucket_length, rounded_up


@pytest.mark.parametrize(
    ("count", "multiple", "size"),
    [(1, 1, 1), (5, 1, 8), (8, 1, 8), (1, 6, 6), (6, 6, 6), (7, 6, 12), (13, 6, 24), (3, 8, 8)],
)
def test_sizes_that_devices_share(count, multiple, size):
    assert rounded_up(count, multiple) == size


@pytest.mark.parametrize(
    ("length", "size"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (65, 100), (100, 100)]
)
def test_sizes_cut_at_the_most(length, size):
    assert rounded_up(length, 16, most=100) == size


def test_a_limit_below_the_smallest_size():
    assert rounded_up(3, 16, most=10) == 10


def test_there_are_few_sizes():
    sizes = sorted({bucket_count(n) for n in range(1, 65)})
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(bucket_count(n) >= n for n in range(1, 65))


@pytest.mark.parametrize(
    ("longest", "expected"), [(1, 25), (25, 25), (26, 50), (99, 100), (100, 100)]
)
def test_bucket_length(longest, expected):
    assert bucket_length(longest, 100, num_buckets=4) == expected


def test_bucket_length_beyond_maximum_is_refused():
    with pytest.raises(ValueError, match="exceeds"):
        bucket_length(101, 100, num_buckets=4)


def test_padding_is_a_third_at_most():
    expected = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 9: 12, 13: 16, 17: 24, 25: 32, 33: 48}
    assert {windows: bucket_count(windows) for windows in expected} == expected
    for windows in range(1, 2000):
        assert windows <= bucket_count(windows) <= max(windows, 1.5 * (windows - 1))
