"""The account of lengths, from groups: what was sampled, what ended, and what is trained on."""

from collections.abc import Iterable, Sequence

from luspo_jax.experience.groups import Group
from luspo_jax.length import accounting
from luspo_jax.length.accounting import AccountState, Consumed, Finished, Running
from luspo_jax.length.settings import LengthSettings
from luspo_jax.metrics import StepMetrics


def newly_ended(before: Group, after: Group) -> list[Finished]:
    """Returns the responses of a group that ended between the two."""
    pairs = zip(before.responses, after.responses, strict=True)
    return [
        Finished(after.step, len(new.tokens), not new.stopped)
        for old, new in pairs
        if new.ended and not old.ended
    ]


def running(groups: Iterable[Group]) -> list[Running]:
    """Returns the responses that have not ended."""
    return [
        Running(group.step, len(response.tokens))
        for group in groups
        for response in group.responses
        if not response.ended
    ]


def account(
    state: AccountState,
    settings: LengthSettings,
    step: int,
    *,
    ended: Sequence[Finished],
    begun: Sequence[Group],
    dropped: Sequence[Group],
    taken: Sequence[Group],
    metrics: StepMetrics,
) -> AccountState:
    """Adds a step to the account of lengths; see `length.accounting.account`.

    Args:
      state: after the step before.
      settings: of the run.
      step: the step that trains on the batch.
      ended: responses that ended for this step.
      begun: groups that go on.
      dropped: groups that were given up.
      taken: groups of the batch, filters applied.
      metrics: receives `length/account/*`.
    """
    state, values = accounting.account(
        state,
        settings,
        step,
        finished=ended,
        running=running(begun),
        dropped=running(dropped),
        consumed=[
            Consumed(group.step, len(response.tokens), step - group.step)
            for group in taken
            for response in group.responses
            if response.trained.any()
        ],
    )
    metrics.update(values)
    return state
