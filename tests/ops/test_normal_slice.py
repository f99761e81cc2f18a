"""Parts of a draw are those of the whole, to the bit, on one device and spread over several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.ops.normal_slice import normal_slice

_spread = sharding.layout("train", {"fsdp": 4, "tensor": 2}, jax.devices())


def _part(key, start, shape, axes=None):
    def part(key, start):
        made = normal_slice(key, start, shape)
        return made if axes is None else sharding.constrain(made, axes, _spread)

    with jax.enable_x64(True):
        return jax.jit(part)(key, np.uint64(start))


@pytest.mark.parametrize(
    ("start", "shape", "axes"),
    [
        (0, (7,), None),
        (13, (3, 5, 2), None),
        (100, (8, 12, 3), ("embed", "heads", "head_dim")),
        (5001, (6, 128), ("vocab", "embed")),
        (3, (4, 33), (None, None)),
    ],
)
@pytest.mark.parametrize("seed", [0, 2**31 + 5])
def test_a_part_is_cut_from_the_whole(strict_dtypes, start, shape, axes, seed):
    key = jax.random.key(seed)
    size = int(np.prod(shape))
    whole = jax.random.normal(key, (start + size + 11,), jnp.float32)
    part = _part(key, start, shape, axes)
    assert part.dtype == jnp.float32
    np.testing.assert_array_equal(part, whole[start : start + size].reshape(shape))
    if axes is not None:
        assert part.sharding.is_equivalent_to(_spread.sharding(axes), part.ndim)


def test_positions_beyond_32_bits_are_other_numbers():
    """A position is 64 bits wide: no number of a model of 5 billion comes twice."""
    key = jax.random.key(0)
    start = 2**32 - 4
    across = np.asarray(_part(key, start, (8,)))
    np.testing.assert_array_equal(across[:4], _part(key, start, (4,)))
    np.testing.assert_array_equal(across[4:], _part(key, 2**32, (4,)))
    assert not np.array_equal(across[4:], _part(key, 0, (4,)))
