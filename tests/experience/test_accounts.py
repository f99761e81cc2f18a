"""What the account of lengths reads of groups, whole or in flight."""

import numpy as np

from luspo_jax.experience import accounts
from luspo_jax.experience.groups import Group
from luspo_jax.length.accounting import AccountState, Finished, Running
from luspo_jax.length.settings import LengthSettings
from luspo_jax.metrics import StepMetrics
from tests.experience.experience_cases import group, prompt, sampled


def _flight(*responses, step=3):
    """A group from (tokens, ended, whether a stop token did it)."""
    made = [
        sampled(0, i, length=n, step=step, ended=ended) for i, (n, ended) in enumerate(responses)
    ]
    return Group(prompt(0), made)


def test_a_response_ends_once():
    before = _flight((4, True), (5, False), (0, False), (7, False))
    after = _flight((4, True), (6, True), (2, False), (9, True))
    cut = after.enriched(stopped=[True, True, False, False])
    assert accounts.newly_ended(before, cut) == [Finished(3, 6, False), Finished(3, 9, True)]
    assert accounts.newly_ended(cut, cut) == []
    assert accounts.running([before, after]) == [
        Running(3, 5), Running(3, 0), Running(3, 7), Running(3, 2)
    ]  # fmt: skip


def test_only_what_carries_gradient_is_consumed():
    taken = group(0, [1, 0], [4, 9], step=[2, 2])
    taken = taken.enriched(trained=[np.ones(4, bool), np.zeros(9, bool)])
    metrics = StepMetrics()
    state = accounts.account(
        AccountState(), LengthSettings(account_window=4), 5, ended=[Finished(2, 4, False)],
        begun=[_flight((1, False))], dropped=[], taken=[taken], metrics=metrics,
    )  # fmt: skip
    found = metrics.result()
    assert found["length/account/consumed/mean"] == 4
    assert found["length/account/consumed/age_3/mean"] == 4
    assert state.start == 5
    (batch,) = state.consumed
    assert (batch.step, batch.begun, batch.lengths) == (5, 2, (4,))


def test_what_is_given_up_is_told_apart_from_what_runs():
    metrics, running = StepMetrics(), _flight((3, False), (2, True))
    state = accounts.account(
        AccountState(), LengthSettings(account_window=4), 3, ended=[], begun=[], dropped=[running],
        taken=[group(0, [1, 0], [4, 9], step=[3, 3])], metrics=metrics,
    )  # fmt: skip
    assert [cohort.dropped for cohort in state.cohorts if cohort.begun == 3] == [(3,)]
