"""One step off: the next step's responses are sampled while this step trains.

The policy that starts a step samples for the next one, on devices of its own. Nothing that decides
a number depends on which of the two is faster: the prompts, the weights and the noise of a batch
are fixed before it is begun, and a step ends when both are done. What was sampled is then part of
what the step hands on, so it is in the checkpoint.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable

from luspo_jax.experience.groups import Rollouts, Waiting
from luspo_jax.experience.rounds import Asker, Policy, collect
from luspo_jax.metrics import StepMetrics


def next_batch(asker: Asker, policy: Policy, waiting: Waiting, step: int) -> Waiting:
    """Samples and rewards the batch of the step after `step`; returns it as what waits."""
    metrics = StepMetrics()
    rollouts, rest = collect(asker, policy, waiting, step + 1, metrics)
    return dataclasses.replace(rest, batch=rollouts.groups, metrics=metrics.values)


def take(
    asker: Asker, policy: Policy, waiting: Waiting, step: int, metrics: StepMetrics
) -> tuple[Rollouts, Waiting]:
    """Returns the batch that waits for this step, or a new one if none does."""
    if not waiting.batch:
        return collect(asker, policy, waiting, step, metrics)
    metrics.merge(waiting.metrics)
    rest = dataclasses.replace(waiting, batch=(), metrics={})
    return Rollouts(waiting.batch, version=step), rest


class Beside:
    """Runs `next_batch` in a thread beside training; a context manager."""

    def __init__(self):
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "rollout")

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, *error) -> None:
        """Waits for what was begun, as it holds the devices."""
        self._thread.shutdown(cancel_futures=True)

    def begin(
        self, asker: Asker, policy: Policy, waiting: Waiting, step: int
    ) -> Callable[[], Waiting]:
        """Begins to sample the batch after `step`; returns what waits for it and returns it."""
        return self._thread.submit(next_batch, asker, policy, waiting, step).result
