"""Training rows hold exactly what was sampled, in rows of their own and in dense ones."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from luspo_jax.learner import plan as plans
from luspo_jax.learner.logprobs import LogprobRule, microbatch_logprobs
from luspo_jax.models import decoder
from luspo_jax.models.forward import Forward
from tests import row_cases
from tests.learner.test_step import MODEL


def test_rows_hold_prompt_then_response():
    prompts, responses = [[5, 6], [7]], [[1, 2, 3], [4]]
    plan = row_cases.plan_of(prompts, responses, width=6)
    rows = row_cases.rows_of(MODEL, plan, prompts, responses)
    np.testing.assert_array_equal(rows.tokens_RT, [[5, 6, 1, 2, 3, 0], [7, 4, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.segment_ids_RT, [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.positions_RT, [[0, 1, 2, 3, 4, 0], [0, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        rows.response_mask_RT, np.array([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]], bool)
    )
    placed = plan.place([np.array([0.1, 0.2, 0.3]), np.array([0.4])])
    np.testing.assert_allclose(placed[0], [0, 0, 0.1, 0.2, 0.3, 0])
    np.testing.assert_allclose(placed[1], [0, 0.4, 0, 0, 0, 0])


def test_a_sequence_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="sequence 1 has 4 tokens"):
        plans.one_a_row([2, 4], width=3, rows_per_microbatch=1)


def test_rows_that_make_no_whole_microbatches_are_named():
    with pytest.raises(ValueError, match="make no whole micro-batches of 3 rows"):
        plans.one_a_row(np.full(8, 2), width=3, rows_per_microbatch=3)


def _lengths(count, seed, median=6000, longest=32768):
    lengths = np.round(median * np.exp(np.random.default_rng(seed).normal(size=count)))
    return np.clip(lengths, 1, longest).astype(int)


def _plan(lengths, row_length=32768, rows_per_microbatch=1):
    return plans.packed(
        lengths, width=row_length, row_length=row_length, rows_per_microbatch=rows_per_microbatch
    )


def _sequences(count=23, seed=0):
    """Prompts of 1–4 and responses of 1–14 tokens."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 19, size=rng.integers(1, 5)) for _ in range(count)]
    responses = [rng.integers(1, 19, size=rng.integers(1, 15)) for _ in range(count)]
    return prompts, responses


def _packed(sequences, row_length=24, rows_per_microbatch=1):
    plan = row_cases.plan_of(
        *sequences, width=20, pack=row_length, rows_at_once=rows_per_microbatch
    )
    return plan, row_cases.rows_of(MODEL, plan, *sequences)


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
    sequences = _sequences()
    plan, rows = _packed(sequences, rows_per_microbatch=3)
    found = {}
    assert rows.tokens_RT.shape == (plan.num_microbatches * 3, 24)
    for row in range(len(rows.tokens_RT)):
        segments = rows.segment_ids_RT[row]
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            np.testing.assert_array_equal(at, np.arange(at[0], at[-1] + 1))
            np.testing.assert_array_equal(rows.positions_RT[row, at], np.arange(len(at)))
            mask = rows.response_mask_RT[row, at]
            found[row // 3, row % 3 * 24 + at[0]] = rows.tokens_RT[row, at], mask
        assert not rows.response_mask_RT[row, segments == 0].any()
    assert len(found) == len(sequences[0])
    starts_B = plan.place_one(plan.firsts_B)
    for index, (prompt, response) in enumerate(zip(*sequences, strict=True)):
        place = plan.places_B[index]
        tokens, mask = found.pop((place // plan.responses_per_microbatch, starts_B[place]))
        np.testing.assert_array_equal(tokens, [*prompt, *response])
        np.testing.assert_array_equal(mask, [False] * len(prompt) + [True] * len(response))
    assert rows.response_mask_RT.sum() == sum(map(len, sequences[1]))


def test_values_are_laid_and_come_back():
    """Of any trailing shape, of dense rows and of one a row, with empty rows."""
    sequences = _sequences()
    lengths_B = row_cases.lengths_of(*sequences)
    rng = np.random.default_rng(3)
    alone = plans.one_a_row(lengths_B, width=20, rows_per_microbatch=6, num_rows=24)
    for plan in (alone, _packed(sequences, rows_per_microbatch=2)[0]):
        for trailing, kind in (((), np.float32), ((2, 3), np.uint8)):
            values = [(99 * rng.random((n, *trailing))).astype(kind) for n in lengths_B]
            laid = plan.lay(values, fill=7)
            assert laid.shape == (plan.num_rows, plan.row_length, *trailing)
            assert (laid == 7).sum() >= laid.size - sum(map(np.size, values))
            taken = plan.take(laid)
            assert all(x.base is None for x in taken)  # nothing holds the padded array
            for got, wanted in zip(taken, values, strict=True):
                np.testing.assert_array_equal(got, wanted)


def test_what_belongs_to_a_response_goes_to_its_place():
    prompts, responses = _sequences()
    plan, _ = _packed((prompts, responses), rows_per_microbatch=2)
    numbers = np.arange(1, 24, dtype=np.float32)
    moved = plan.place_one(numbers)
    np.testing.assert_array_equal(moved[plan.places_B], numbers)
    empty = moved == 0
    assert empty.sum() == len(empty) - 23 > 0
    placed = plan.place([-r.astype(np.float32) for r in responses])
    assert placed.shape == (plan.num_responses, 20)
    for place, prompt, response in zip(plan.places_B, prompts, responses, strict=True):
        start, end = len(prompt), len(prompt) + len(response)
        np.testing.assert_array_equal(placed[place, start:end], -response)
        assert not placed[place, :start].any()
        assert not placed[place, end:].any()
    assert not placed[empty].any()


def test_the_same_lengths_give_the_same_plan():
    lengths = np.repeat([7, 5, 5, 3], 6)
    first, again = (_plan(lengths, row_length=16, rows_per_microbatch=2) for _ in range(2))
    jax.tree.map(
        np.testing.assert_array_equal, dataclasses.asdict(first), dataclasses.asdict(again)
    )


def test_plans_that_lose_or_mix_sequences_are_refused():
    plan, _ = _packed(_sequences())
    with pytest.raises(ValueError, match="over each other"):
        dataclasses.replace(plan, starts_B=np.zeros_like(plan.starts_B))
    with pytest.raises(ValueError, match="other sequences"):
        row_cases.rows_of(MODEL, plan, *_sequences(seed=1))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 9], "sequence 1 has 9 tokens"), ([0, 2], "sequence 0 has 0"), ([], "none came")],
)
def test_sequences_that_fit_no_row_are_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        _plan(np.array(lengths, int), row_length=8)


# ---------------------------------------------------------------- prompts laid once


def _grouped(rng):
    """Groups of up to six responses to one prompt, of a token at least; some prompts recur."""
    groups = int(rng.integers(1, 9))
    asked = [rng.integers(1, 19, size=rng.integers(1, 12)) for _ in range(groups)]
    members = rng.permutation(np.repeat(np.arange(groups), rng.integers(1, 7, size=groups)))
    responses = [rng.integers(1, 19, size=rng.integers(1, 12)) for _ in members]
    return [asked[i] for i in members], responses


@pytest.mark.parametrize("seed", range(30))
def test_each_token_sees_its_own_sequence_and_no_other(seed):
    rng = np.random.default_rng(seed)
    prompts, responses = _grouped(rng)
    row_length, at_once = int(rng.integers(24, 120)), int(rng.integers(1, 4))
    plan = row_cases.plan_of(
        prompts, responses, width=24, pack=row_length, rows_at_once=at_once, share=True
    )
    rows = row_cases.rows_of(MODEL, plan, prompts, responses)
    assert rows.tokens_RT.shape == (plan.num_microbatches * at_once, row_length)
    ids_N, tokens_N, positions_N, mask_N = (
        x.reshape(-1)
        for x in (rows.segment_ids_RT, rows.tokens_RT, rows.positions_RT, rows.response_mask_RT)
    )
    rows_N = np.arange(ids_N.size) // row_length
    order_N = np.arange(ids_N.size)
    for prompt, response, at in zip(prompts, responses, plan.positions(), strict=True):
        np.testing.assert_array_equal(tokens_N[at], [*prompt, *response])
        np.testing.assert_array_equal(positions_N[at], np.arange(len(at)))
        np.testing.assert_array_equal(mask_N[at], [False] * len(prompt) + [True] * len(response))
        for index in (len(prompt) - 1, len(at) - 1):
            query = at[index]
            own = (ids_N == ids_N[query]) | (ids_N == ids_N[query] % 65536)
            seen = own & (rows_N == rows_N[query]) & (order_N <= query)
            np.testing.assert_array_equal(np.flatnonzero(seen), at[: index + 1])
    assert mask_N.sum() == sum(map(len, responses))
    assert (ids_N > 0).sum() == round((1 - plan.metrics["packing/shared"]) * plan.lengths_B.sum())


def test_prompts_are_shared_where_that_takes_less():
    """Eight responses of 10 tokens to each of 16 prompts of 40: in rows of their own 6,400 tokens,
    of groups 16 · (39 + 8 · 11).
    """
    prompts = [np.full(40, group) for group in range(16) for _ in range(8)]
    responses = [np.arange(10)] * 128
    sizes = {"width": 50, "pack": 256, "rows_at_once": 1}
    plan = row_cases.plan_of(prompts, responses, share=True, **sizes)
    assert plan.used_microbatches == 8
    assert plan.metrics["packing/shared"] == pytest.approx(1 - 16 * (39 + 8 * 11) / 6400)
    without = row_cases.plan_of(prompts, responses, **sizes)
    assert (without.used_microbatches, without.metrics["packing/shared"]) == (26, 0)
    # Rows that hold one sequence share nothing.
    own = row_cases.plan_of(prompts, responses, width=50, pack=50, share=True)
    assert not own.shared_B.any()
    # Nor do prompts of one token.
    one = row_cases.plan_of([[3]] * 8, [[5, 6]] * 8, width=5, pack=64, share=True)
    assert not one.shared_B.any()


def test_ten_thousand_sequences_that_share_are_planned_at_once():
    lengths = _lengths(10_000, 0, longest=2_000) + 500
    trunks = plans.Trunks(np.arange(10_000) // 16, np.full(10_000, 499))
    started = time.process_time()
    plan = plans.packed(
        lengths, width=32768, row_length=32768, rows_per_microbatch=1, trunks=trunks
    )
    assert time.process_time() - started < 5
    assert plan.metrics["packing/shared"] > 0.02
    assert plan.used_microbatches <= _plan(lengths).used_microbatches


# ---------------------------------------------------------------- what the model makes of them


@pytest.fixture(scope="module")
def packed():
    """Computes log-probs of dense rows of 40 tokens; five sequences, two or three a row."""
    params = decoder.init_params(jax.random.key(3), MODEL)
    rule = LogprobRule(Forward(MODEL), head_chunk_tokens=32)
    sequences = _sequences(count=5)
    plan, rows = _packed(sequences, row_length=40, rows_per_microbatch=2)
    assert (plan.num_microbatches, rows.segment_ids_RT.max()) == (1, 3)

    @jax.jit
    def function(rows):
        found = microbatch_logprobs(params, rows, rule=rule)
        return found.logprobs_RT, found.entropy_RT

    return lambda rows: [np.asarray(x) for x in function(rows)], sequences, plan, rows


def test_packed_logprobs_are_those_of_rows_alone(packed):
    compute, sequences, plan, rows = packed
    own = row_cases.plan_of(*sequences, width=20)
    alone = compute(row_cases.rows_of(MODEL, own, *sequences))
    for dense_RT, alone_RT in zip(compute(rows), alone, strict=True):
        for x, y in zip(plan.take(dense_RT), own.take(alone_RT), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6, rtol=1e-6)
        assert not dense_RT[~rows.response_mask_RT].any()


def test_nothing_leaks_between_segments_or_from_the_future(packed):
    """Every token of another segment changes, and every later one of its own: not one bit moves."""
    compute, _, plan, rows = packed
    expected = [plan.take(x) for x in compute(rows)]
    for index, length in enumerate(plan.lengths_B):
        row, start = plan.rows_B[index], plan.starts_B[index]
        for upto in range(length):
            keep = np.zeros(rows.tokens_RT.shape, bool)
            keep[row, start : start + upto + 1] = True
            other = np.where(keep, rows.tokens_RT, (rows.tokens_RT + 5) % 19).astype(np.int32)
            got = [plan.take(x) for x in compute(dataclasses.replace(rows, tokens_RT=other))]
            for x, y in zip(got, expected, strict=True):
                np.testing.assert_array_equal(x[index][: upto + 1], y[index][: upto + 1])


def test_segment_ids_are_what_keeps_them_apart(packed):
    """The test above can fail: as one segment, sequences do see each other."""
    compute, _, plan, rows = packed
    joined = dataclasses.replace(rows, segment_ids_RT=np.minimum(rows.segment_ids_RT, 1))
    gap = np.abs(compute(joined)[0] - compute(rows)[0])
    gaps = np.array([one.max() for one in plan.take(gap)])
    assert gaps[plan.starts_B > 0].max() > 1e-4
    assert gaps[plan.starts_B == 0].max() == 0
