"""maj@k against enumeration of every subset of voters."""

import collections
import itertools

import numpy as np
import pytest

from luspo_jax.benchmarks.voting import Mode, ballot, majority_at_k, mode


def by_enumeration(predictions, right, k):
    """The mean over all subsets of k voters of the winner's score, ties shared."""
    ballots = [ballot(prediction) for prediction in predictions]
    score = {
        vote: np.mean([r for b, r in zip(ballots, right, strict=True) if b == vote])
        for vote in ballots
    }
    outcomes = []
    for voters in itertools.combinations(range(len(ballots)), k):
        votes = collections.Counter(ballots[i] for i in voters if ballots[i] is not None)
        most = max(votes.values(), default=0)
        winners = [vote for vote, count in votes.items() if count == most]
        outcomes.append(np.mean([score[vote] for vote in winners]) if winners else 0.0)
    return np.mean(outcomes)


CASES = {
    "one right answer": (["1", "1", "2", "3"], [1, 1, 0, 0]),
    "ties": (["1", "2", "1", "2", "3", "3"], [1, 0, 1, 0, 0, 0]),
    "abstentions": (["1", None, None, "2", "2", ""], [1, 0, 0, 0, 0, 0]),
    "nobody answers": ([None, None, None], [0, 0, 0]),
    "all right": (["7", "7", "7"], [1, 1, 1]),
    "right in two spellings that are not joined": (["x+1", "1+x", "2"], [1, 1, 0]),
    "judged differently once": (["1", "1", "1", "2"], [1, 1, 0, 0]),
    "many rivals": (["1", "1", "1", *"223344567"], [1, 1, 1, *[0] * 9]),
}


@pytest.mark.parametrize("name", CASES)
def test_majority_is_the_mean_over_subsets(name):
    predictions, right = CASES[name]
    ks = range(1, len(predictions) + 1)
    expected = [by_enumeration(predictions, right, k) for k in ks]
    np.testing.assert_allclose(majority_at_k(predictions, right, ks), expected, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_mode_is_the_majority_of_all(name):
    predictions, right = CASES[name]
    found = mode(predictions, right)
    assert found.accuracy == pytest.approx(majority_at_k(predictions, right, [len(right)])[0])
    votes = [ballot(p) for p in predictions if ballot(p) is not None]
    pairs = list(itertools.combinations(votes, 2))
    if pairs:
        assert found.distinct == pytest.approx(len(set(votes)) / len(votes))
        assert found.differ == pytest.approx(np.mean([a != b for a, b in pairs]))
    else:
        assert (found.distinct, found.differ) == (None, None)


def test_dispersion_by_hand():
    found = mode(["0.5", "1/2", "3", None], [1, 1, 0, 0])
    assert (found.accuracy, found.distinct) == (1.0, 2 / 3)
    assert found.differ == pytest.approx(2 / 3)
    assert mode(["7", None], [1, 0]) == Mode(1.0, None, None)
    assert mode([None], [0]) == Mode(0.0, None, None)


def test_random_cases():
    rng = np.random.default_rng(0)
    for _ in range(30):
        n = int(rng.integers(1, 9))
        answers = rng.integers(0, 4, n)
        predictions = [None if a == 3 else str(a) for a in answers]
        right = (answers == 0).astype(int)
        ks = range(1, n + 1)
        expected = [by_enumeration(predictions, right, k) for k in ks]
        np.testing.assert_allclose(majority_at_k(predictions, right, ks), expected, atol=1e-12)


def test_no_digit_is_lost_at_many_responses():
    """All responses but one right: maj@n is 1, maj@1 the accuracy, nothing leaves [0, 1]."""
    predictions, right = ["1"] * 999 + ["2"], [1] * 999 + [0]
    first, middle, last = majority_at_k(predictions, right, [1, 500, 1000])
    assert first == pytest.approx(0.999)
    assert middle == pytest.approx(1.0)
    assert last == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [("0.5", r"\frac12"), ("1,000", "1000"), ("2.0", "2"), (r"\dfrac{x}{2}", r"\frac{x}{2}")],
)
def test_spellings_of_one_answer_are_one_vote(one, other):
    assert ballot(one) == ballot(other)


def test_bad_numbers_of_voters_are_refused():
    with pytest.raises(ValueError, match="must lie in 1"):
        majority_at_k(["1"], [1], [2])
