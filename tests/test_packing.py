"""Training rows hold exactly what was sampled, in rows of their own and in dense ones."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from luspo_jax import packing
from luspo_jax.logprobs import Scoring, token_logprobs
from luspo_jax.models import decoder
from luspo_jax.types import TrainBatch
from tests.test_update import MODEL


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


def _lengths(count, seed, median=6000, longest=32768):
    lengths = np.round(median * np.exp(np.random.default_rng(seed).normal(size=count)))
    return np.clip(lengths, 1, longest).astype(int)


def _plan(lengths, row_length=32768, rows_per_microbatch=1):
    return packing.plan(lengths, row_length=row_length, rows_per_microbatch=rows_per_microbatch)


def _rows(count=23, seed=0, width=20):
    """Prompts of 1–4 and responses of 1–14 tokens, as rows and as a list of sequences."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 19, size=rng.integers(1, 5)) for _ in range(count)]
    responses = [rng.integers(1, 19, size=rng.integers(1, 15)) for _ in range(count)]
    rows = packing.padded_rows(prompts, responses, length=width, pad_id=0)
    return rows, list(zip(prompts, responses, strict=True))


def _packed(rows, **sizes):
    plan = _plan((rows.segment_ids_BT > 0).sum(axis=1), **sizes)
    return plan, packing.packed_rows(rows, plan)


@pytest.mark.parametrize("rows_per_microbatch", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_little_padding_at_lognormal_lengths(seed, rows_per_microbatch):
    lengths = _lengths(1024, seed)
    plan = _plan(lengths, rows_per_microbatch=rows_per_microbatch)
    computed = plan.used_microbatches * rows_per_microbatch * 32768
    assert 1 - lengths.sum() / computed <= 0.05
    assert plan.metrics["packing/padding"] == pytest.approx(1 - lengths.sum() / computed)
    # Rows of a batch are memory: not many more than there are responses.
    assert plan.num_microbatches * plan.responses_per_microbatch <= 3 * 1024


@pytest.mark.parametrize("shares", [(0.4, 0.3), (0.5, 0.34), (0.6, 0.4), (0.34, 0.33), (1.0, 0.01)])
def test_rows_are_few_at_awkward_lengths(shares):
    """Against a bound on what any placement needs: the tokens, and sequences above half a row."""
    lengths = np.repeat([int(1000 * share) for share in shares], 60)
    best = max(np.ceil(lengths.sum() / 1000), (lengths > 500).sum())
    assert _plan(lengths, row_length=1000).used_microbatches <= 1.25 * best


def test_ten_thousand_sequences_are_planned_at_once():
    started = time.process_time()
    plan = _plan(_lengths(10_000, 0))
    assert time.process_time() - started < 2  # 0.05 s; minutes if every row were looked at
    assert plan.metrics["packing/padding"] <= 0.05


def test_rows_computed_together_have_like_work():
    """Devices that share a micro-batch wait for the slowest: little is lost to that."""
    lengths = _lengths(1024, 0)
    plan = _plan(lengths, rows_per_microbatch=8)
    size = plan.used_microbatches * 8
    work = np.bincount(plan.rows_B, weights=lengths.astype(float) ** 2, minlength=size)
    slowest = work.reshape(-1, 8).max(axis=1).sum() * 8
    assert work.sum() / slowest > 0.95


def test_every_sequence_is_in_exactly_one_segment():
    rows, sequences = _rows()
    plan, batch = _packed(rows, row_length=24, rows_per_microbatch=3)
    packed, found = batch.packed, {}
    assert packed.tokens_RT.shape == (plan.num_microbatches * 3, 24)
    for row in range(len(packed.tokens_RT)):
        segments = packed.segment_ids_RT[row]
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            np.testing.assert_array_equal(at, np.arange(at[0], at[-1] + 1))
            np.testing.assert_array_equal(packed.positions_RT[row, at], np.arange(len(at)))
            mask = packed.response_mask_RT[row, at]
            found[row // 3, row % 3 * 24 + at[0]] = packed.tokens_RT[row, at], mask
        assert not packed.response_mask_RT[row, segments == 0].any()
    assert len(found) == len(sequences)
    for index, (prompt, response) in enumerate(sequences):
        place = plan.places_B[index]
        tokens, mask = found.pop((place // plan.responses_per_microbatch, packed.starts_B[place]))
        np.testing.assert_array_equal(tokens, [*prompt, *response])
        np.testing.assert_array_equal(mask, [False] * len(prompt) + [True] * len(response))
        np.testing.assert_array_equal(batch.tokens_BT[place], rows.tokens_BT[index])
    assert batch.response_mask_BT.sum() == rows.response_mask_BT.sum()


def test_a_batch_is_moved_whole_and_comes_back():
    rows, _ = _rows()
    numbers = np.arange(1, 24, dtype=np.float32)
    batch = TrainBatch(
        rows=rows,
        advantages_B=numbers,
        group_ids_B=np.arange(23, dtype=np.int32),
        old_logprobs_BT=-rows.tokens_BT.astype(np.float32),
        old_entropy_BT=None,
        ref_logprobs_BT=None,
        sampler_logprobs_BT=rows.tokens_BT.astype(np.float32),
    )
    plan = _plan((rows.segment_ids_BT > 0).sum(axis=1), row_length=24, rows_per_microbatch=2)
    moved = packing.packed_batch(batch, plan)
    assert moved.old_entropy_BT is None
    np.testing.assert_array_equal(packing.from_places(moved.advantages_B, plan), numbers)
    np.testing.assert_array_equal(moved.old_logprobs_BT, -moved.rows.tokens_BT)
    empty = moved.advantages_B == 0
    assert empty.sum() == len(empty) - 23 > 0
    assert not moved.rows.response_mask_BT[empty].any()


def test_the_same_lengths_give_the_same_plan():
    lengths = np.repeat([7, 5, 5, 3], 6)
    first, again = (_plan(lengths, row_length=16, rows_per_microbatch=2) for _ in range(2))
    jax.tree.map(
        np.testing.assert_array_equal, dataclasses.asdict(first), dataclasses.asdict(again)
    )


def test_plans_that_lose_or_mix_sequences_are_refused():
    rows, _ = _rows()
    plan, _ = _packed(rows, row_length=24)
    other = dataclasses.replace(plan, starts_B=np.zeros_like(plan.starts_B))
    with pytest.raises(ValueError, match="over each other"):
        packing.packed_rows(rows, other)
    with pytest.raises(ValueError, match="other sequences"):
        packing.packed_rows(_rows(seed=1)[0], plan)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 9], "sequence 1 has 9 tokens"), ([0, 2], "sequence 0 has 0"), ([], "none came")],
)
def test_sequences_that_fit_no_row_are_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        _plan(np.array(lengths, int), row_length=8)


# ---------------------------------------------------------------- what the model makes of them


@pytest.fixture(scope="module")
def scored():
    """Scores packed rows of 40 tokens, and the packed rows of 5 sequences, two or three a row."""
    params = decoder.init_params(jax.random.key(3), MODEL)
    scoring = Scoring(MODEL, head_chunk_tokens=32)
    rows, _ = _rows(count=5)
    plan, batch = _packed(rows, row_length=40, rows_per_microbatch=2)
    assert (plan.num_microbatches, batch.packed.segment_ids_RT.max()) == (1, 3)
    function = jax.jit(lambda rows: token_logprobs(params, rows, scoring=scoring))
    return lambda rows: [np.asarray(x) for x in function(rows)], rows, plan, batch


def test_packed_logprobs_are_those_of_rows_alone(scored):
    score, rows, plan, batch = scored
    for packed, alone in zip(score(batch), score(rows), strict=True):
        np.testing.assert_allclose(packing.from_places(packed, plan), alone, atol=2e-6, rtol=1e-6)
        assert not packed[~batch.response_mask_BT].any()


def test_nothing_leaks_between_segments_or_from_the_future(scored):
    """Every token of another segment changes, and every later one of its own: not one bit moves."""
    score, _, plan, batch = scored
    expected, packed = score(batch), batch.packed
    for index in range(len(plan.lengths_B)):
        row, start = plan.rows_B[index], plan.starts_B[index]
        place = plan.places_B[index]
        last = np.flatnonzero(batch.response_mask_BT[place])[-1]
        for upto in range(last + 1):
            keep = np.zeros(packed.tokens_RT.shape, bool)
            keep[row, start : start + upto + 1] = True
            other = np.where(keep, packed.tokens_RT, (packed.tokens_RT + 5) % 19).astype(np.int32)
            changed = dataclasses.replace(packed, tokens_RT=other)
            got = score(dataclasses.replace(batch, packed=changed))
            for x, y in zip(got, expected, strict=True):
                np.testing.assert_array_equal(x[place, : upto + 1], y[place, : upto + 1])


def test_segment_ids_are_what_keeps_them_apart(scored):
    """The test above can fail: as one segment, sequences do see each other."""
    score, _, plan, batch = scored
    joined = np.minimum(batch.packed.segment_ids_RT, 1)
    changed = dataclasses.replace(batch.packed, segment_ids_RT=joined)
    gap = np.abs(score(dataclasses.replace(batch, packed=changed))[0] - score(batch)[0])
    behind = plan.places_B[plan.starts_B > 0]
    assert gap[behind].max() > 1e-4
    assert gap[plan.places_B[plan.starts_B == 0]].max() == 0
