"""The account of lengths, from groups: what was sampled, what ended, and what is trained on."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from luspo_jax.experience.groups import Group
from luspo_jax.length import accounting
from luspo_jax.length.accounting import Consumed, Finished, Running
from luspo_jax.length.settings import LengthSettings
from luspo_jax.length.steering import LengthState
from luspo_jax.metrics import StepMetrics


class Trace(NamedTuple):
    """What the account reads of a response, a few bytes that outlive its arrays.

    Attributes:
      begun: the step that sampled the first token of its group.
      length: its tokens, or its tokens so far.
      ended: the step that sampled its last token; None if it has not ended.
      cut: whether it was cut at the limit.
    """

    begun: int
    length: int
    ended: int | None
    cut: bool


@dataclasses.dataclass(frozen=True)
class Seen:
    """Traces of the responses that a step had to do with, whatever becomes of them.

    Of groups with some responses that have ended, all responses are here.

    Attributes:
      complete: of groups whose last response ended in this step: `Collected.traces`.
      in_flight: of groups that go on in later steps, those of all processes.
      dropped: of groups that were given up in this step before they were complete.
    """

    complete: Sequence[Trace] = ()
    in_flight: Sequence[Trace] = ()
    dropped: Sequence[Trace] = ()


def account(
    length: LengthState,
    settings: LengthSettings,
    step: int,
    seen: Seen,
    consumed: Sequence[Group],
    metrics: StepMetrics,
) -> LengthState:
    """Adds a step to the account of lengths; see `length.accounting.account`.

    For the loop to call in every step, once its batch is chosen, if `Shaping.chooses` or if
    responses may take more than one step.

    Args:
      length: the state after the step before, the step's tokens being of versions ≤ `step`.
      settings: of the run.
      step: rollout steps taken before this one.
      seen: responses of the step.
      consumed: groups of the step's batch, filters applied.
      metrics: receives `length/account/*`.
    """
    everything = [*seen.complete, *seen.in_flight, *seen.dropped]
    state, values = accounting.account(
        length.account,
        settings,
        step,
        # In a group that ends now, some responses ended, and were reported, in earlier steps.
        finished=[Finished(t.begun, t.length, t.cut) for t in everything if t.ended == step],
        running=_unfinished(seen.in_flight),
        dropped=_unfinished(seen.dropped),
        consumed=_consumed(consumed, step),
    )
    metrics.update(values)
    return dataclasses.replace(length, account=state)


def traces(groups: Sequence[Group], limit: int | None = None) -> list[Trace]:
    """Returns the trace of each response; of a group without any token, none.

    Args:
      groups: with the versions of their tokens.
      limit: tokens at which a response is cut, to tell who has ended; None if all have.
    """
    return [
        Trace(
            begun=begun,
            length=len(response.tokens),
            ended=int(response.versions[-1]) if _ended(response, limit) else None,
            cut=_ended(response, limit) and not response.stopped,
        )
        for group in groups
        if (begun := _begun(group)) is not None
        for response in group.responses
    ]


def _ended(response, limit):
    return response.stopped or limit is None or len(response.tokens) >= limit


def _begun(group):
    """Returns the step that sampled the group's first token; None if there is no token."""
    return min(
        (int(versions[0]) for versions in group.column("versions") if len(versions)), default=None
    )


def _unfinished(traced):
    return [Running(trace.begun, trace.length) for trace in traced if trace.ended is None]


def _consumed(groups, step):
    return [
        Consumed(_begun(group), len(response.tokens), step - int(response.versions[0]))
        for group in groups
        for response in group.responses
        if response.trained.any()
    ]
