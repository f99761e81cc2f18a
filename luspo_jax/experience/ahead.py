"""One step off: the next step's responses are sampled while this step trains.

The policy that starts a step samples for the next one, on devices of its own. Nothing that decides
a number depends on which of the two is faster: the prompts, the weights and the noise of a batch
are fixed before it is begun, and a step ends when both are done. What was sampled is then part of
what the step hands on, so it is in the checkpoint.

The devices are some of this process's, which a thread keeps busy, or those of processes of their
own (`hosts.roles`).
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable

from luspo_jax.experience.groups import Rollouts, Waiting
from luspo_jax.experience.rounds import Asker, Policy, collect
from luspo_jax.metrics import StepMetrics


def batch(asker: Asker, policy: Policy, waiting: Waiting, step: int) -> Waiting:
    """Samples and rewards the batch of `step`; returns it as what waits."""
    metrics = StepMetrics()
    rollouts, rest = collect(asker, policy, waiting, step, metrics)
    return dataclasses.replace(rest, batch=rollouts.groups, metrics=metrics.values)


def begun(asker: Asker, policy: Policy, waiting: Waiting, step: int) -> Callable[[], Waiting]:
    """Samples the batch of `step` in the processes that sample; returns what waits for it.

    Processes that only train come back at once. All meet in what is returned, and then have the
    batch, and the prompt stream where it is; images are not sent, but read again.
    """
    found = []

    def work():
        found.append(batch(asker, policy, waiting, step))
        return found[0].without_images(), asker.stream.get_state()

    told = asker.roles.begin(work, "batch")

    def wait() -> Waiting:
        waits, state = told()
        if asker.roles.samples:
            return found[0]
        asker.stream.set_state(state)
        return waits.with_images(asker.stream.pictured)

    return wait


def take(
    asker: Asker, policy: Policy, waiting: Waiting, step: int, metrics: StepMetrics
) -> tuple[Rollouts, Waiting]:
    """Returns the batch that waits for this step, or a new one if none does."""
    if not waiting.batch:
        waiting = begun(asker, policy, waiting, step)()
    metrics.merge(waiting.metrics)
    rest = dataclasses.replace(waiting, batch=(), metrics={})
    return Rollouts(waiting.batch, version=step), rest


class Beside:
    """Samples beside training: in a thread, or in processes of their own; a context manager."""

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
        if asker.roles.split:
            return begun(asker, policy, waiting, step + 1)
        return self._thread.submit(batch, asker, policy, waiting, step + 1).result
