"""What the account of lengths reads of groups, whole or in flight."""

import math

import numpy as np
import pytest

from luspo_jax.experience import accounts, shaping
from luspo_jax.experience.accounts import Seen, Trace
from luspo_jax.experience.shaping import Shaping
from luspo_jax.length.accounting import AccountState, Cohort
from luspo_jax.length.settings import LengthSettings
from luspo_jax.length.steering import LengthState
from luspo_jax.metrics import StepMetrics
from tests.experience.experience_cases import group as _group

SETTINGS = LengthSettings(account_window=4)
LIMIT = 9


def _versions(*runs):
    """Versions of a response's tokens, from (version, tokens) pairs."""
    return np.concatenate([np.full(n, version, np.uint32) for version, n in runs] or [[]])


def _flight(prompt_id, *responses):
    """A group in flight, from (stopped, its runs of versions) of each response."""
    versions = [_versions(*runs) for _, *runs in responses]
    return _group(
        prompt_id,
        [0] * len(responses),
        lengths=[len(v) for v in versions],
        stopped=[stopped for stopped, *_ in responses],
        versions=versions,
    )


# Begun in step 3; one response ended in it, one in step 5 at the limit, one goes on, and the last
# waited for a place until step 4.
FLIGHT = _flight(
    0, (True, (3, 4)), (False, (3, 4), (4, 4), (5, 1)), (False, (3, 4), (5, 2)), (False, (4, 3))
)


def _account(step, seen, consumed=(), length=None):
    metrics = StepMetrics()
    length = LengthState() if length is None else length
    return accounts.account(length, SETTINGS, step, seen, consumed, metrics), metrics.result()


def test_traces_tell_when_a_group_began_and_which_responses_ended():
    assert accounts.traces([FLIGHT], LIMIT) == [
        Trace(3, 4, 3, False),
        Trace(3, 9, 5, True),
        Trace(3, 6, None, False),
        Trace(3, 3, None, False),
    ]


def test_a_response_without_a_token_belongs_to_its_group_and_a_group_without_any_has_not_begun():
    waiting, unbegun = _flight(1, (False,), (False, (7, 2))), _flight(2, (False,), (False,))
    found = accounts.traces([waiting, unbegun], LIMIT)
    assert found == [Trace(7, 0, None, False), Trace(7, 2, None, False)]


def test_without_a_limit_all_have_ended():
    found = accounts.traces([_group(0, [1, 0], [2, 5], [True, False], version=3)])
    assert found == [Trace(3, 2, 3, False), Trace(3, 5, 3, True)]


def test_a_response_is_counted_once_when_it_ends_and_not_again_with_its_group():
    """A group over three steps: its responses end in the first, the second and the third."""
    lengths = [4, 8, 9]
    state, counts = LengthState(), []
    for step in range(3):
        reached = 4 * (step + 1)
        flight = _flight(
            0,
            *(
                (n <= reached, *[(s, min(4, n - 4 * s)) for s in range(step + 1) if n > 4 * s])
                for n in lengths
            ),
        )
        traced = accounts.traces([flight], 12)
        if step == 2:
            flight = flight.enriched(trained=[np.ones(n, bool) for n in lengths])
            state, found = _account(step, Seen(complete=traced), [flight], state)
        else:
            state, found = _account(step, Seen(in_flight=traced), length=state)
        counts.append(found["length/account/finished/count"])
        running = sum(n > reached for n in lengths)
        assert found["length/account/sampled/count"] == (3 if step == 0 else 0)
        if step == 0:
            assert found["length/account/sampled/unfinished"] == running / 3
    assert counts == [1, 1, 1]
    assert state.account.cohorts == (Cohort(0, (4, 8, 9)),)
    assert found["length/account/consumed/mean"] == 7
    assert found["length/account/consumed/age_2/mean"] == 7
    assert found["length/account/window/sampled_mean"] == pytest.approx(7)
    assert found["length/account/complete/difference"] == 0


def test_of_a_dropped_group_what_ended_has_ended_and_the_rest_is_known_from_below():
    traced = accounts.traces([FLIGHT], LIMIT)
    length = LengthState(account=AccountState(start=3, cohorts=(Cohort(3, (4,)),)))
    state, found = _account(5, Seen(dropped=traced), length=length)
    assert state.account.cohorts == (Cohort(3, (4, 9), (6, 3)),)
    assert found["length/account/finished/clip_ratio"] == 1
    assert found["length/account/window/horizon"] == LIMIT
    assert math.isnan(found["length/account/window/relative_difference"])


def test_what_is_trained_on_has_a_gradient_and_the_age_of_its_first_token():
    """The response that waited for a place is younger than its group."""
    lengths = [4, 9, 6, 3]
    trained = [np.ones(n, bool) for n in lengths]
    trained[1][:] = False
    trained[2][:-1] = False  # one token is enough
    _, found = _account(5, Seen(), [FLIGHT.enriched(trained=trained)])
    assert found["length/account/consumed/count"] == 3
    assert found["length/account/consumed/age_2/mean"] == 5
    assert found["length/account/consumed/age_1/mean"] == 3


def test_the_filters_of_a_synchronous_step_are_accounted_for():
    """The shorter half of each group, and of three groups one that teaches nothing."""
    groups = [_group(i, [1, 0, 1, 0], lengths=[2, 4, 6, 8], version=7) for i in range(2)]
    groups.append(_group(2, [1] * 4, lengths=[20] * 4, version=7))
    filters = Shaping(dynamic_sampling=True, gfpo_keep=2)
    got = shaping.collect([groups], (), shaping=filters, num_groups=2, part="right")
    state, found = _account(7, Seen(got.traces), got.groups)
    sampled = np.array([2, 4, 6, 8] * 2 + [20] * 4)
    expected = {
        "sampled/mean": sampled.mean(),
        "sampled/unfinished": 0,
        "finished/count": 12,
        "consumed/mean": 3,
        "consumed/age_0/mean": 3,
        "difference": 3 - sampled.mean(),
        "window/sampled_mean": sampled.mean(),
        "window/relative_difference": 3 / sampled.mean() - 1,
        "complete/difference": 3 - sampled.mean(),
        "flag": 0,
    }
    got = {name: found[f"length/account/{name}"] for name in expected}
    assert got == pytest.approx(expected)
    assert state.account.start == 7
