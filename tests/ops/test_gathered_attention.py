"""Gathered attention against the plain one over the same rows, for random plans."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops import gathered_attention, reference_attention
from tests import row_cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def _plan(rng, share):
    groups = int(rng.integers(1, 5))
    asked = [rng.integers(1, 19, size=rng.integers(1, 12)) for _ in range(groups)]
    prompts = [asked[i] for i in rng.permutation(np.repeat(np.arange(groups), 3))]
    responses = [rng.integers(1, 19, size=rng.integers(1, 12)) for _ in prompts]
    sizes = {
        "width": 24,
        "pack": int(rng.integers(24, 90)),
        "rows_at_once": int(rng.integers(1, 3)),
    }
    return row_cases.plan_of(prompts, responses, share=share, **sizes)


def _parts(plan, seed):
    """Arrays of each micro-batch: queries, keys, values, cotangent, segment ids, Sequences."""
    rng = np.random.default_rng(seed)
    R, T = plan.rows_per_microbatch, plan.row_length
    ids_RT = plan.lay(plan.segments()).reshape(-1, R, T)
    sequences = plan.gathered(1, plan.width)
    split = jax.tree.map(lambda x: x.reshape(plan.num_microbatches, -1, *x.shape[1:]), sequences)
    for part in range(plan.num_microbatches):
        drawn = [rng.normal(size=(R, T, N, 8)).astype(np.float32) for N in (4, 2, 2, 4)]
        yield *drawn, ids_RT[part], jax.tree.map(operator.itemgetter(part), split)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_are_those_of_the_rows(seed, share):
    plan = _plan(np.random.default_rng(seed), share)
    for *arrays, grad, ids_RT, sequences in _parts(plan, seed):
        got, back = jax.vjp(lambda *x, at=sequences: gathered_attention.attention(*x, at), *arrays)
        want, plain = jax.vjp(
            lambda *x, ids=ids_RT: reference_attention.attention(*x, ids), *arrays
        )
        real = (ids_RT[..., None, None] > 0).astype(np.float32)
        np.testing.assert_allclose(got * real, want * real, atol=3e-6)
        for a, b in zip(back(grad * real), plain(grad * real), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        # Padding gives and gets nothing, whatever it holds.
        np.testing.assert_array_equal(np.asarray(got)[ids_RT == 0], 0)
        assert all(not np.asarray(x)[ids_RT == 0].any() for x in back(grad))


@pytest.mark.parametrize("share", [False, True])
def test_the_backward_pass_is_differentiable_in_its_cotangent(share):
    """Length pressure asks how a weighted gradient moves with its weights."""
    plan = _plan(np.random.default_rng(7), share)
    *arrays, grad, ids_RT, sequences = next(_parts(plan, 7))
    real = (ids_RT[..., None, None] > 0).astype(np.float32)
    tangent = np.random.default_rng(1).normal(size=grad.shape).astype(np.float32) * real

    def moved(attend):
        def squared(grad):
            _, back = jax.vjp(attend, *arrays)
            return sum(jnp.sum(x * x) for x in back(grad))

        return jax.grad(squared)(tangent)

    got = moved(lambda *x: gathered_attention.attention(*x, sequences))
    want = moved(lambda *x: reference_attention.attention(*x, ids_RT))
    np.testing.assert_allclose(got * real, want * real, rtol=1e-4, atol=1e-4)
    assert np.abs(want).max() > 0.1


def test_every_token_has_a_place_of_its_own():
    plan = _plan(np.random.default_rng(3), True)
    for *_, ids_RT, sequences in _parts(plan, 0):
        B, C = sequences.starts_B.size, sequences.trunk_starts_C.size
        places = sequences.places_RT[ids_RT > 0]
        assert len(set(places.tolist())) == places.size
        assert places.size == sequences.counts_B.sum() + sequences.trunk_counts_C.sum()
        total = B * sequences.width + C * sequences.trunk_width
        assert places.max(initial=0) < total
        assert (sequences.places_RT[ids_RT == 0] == total).all()
