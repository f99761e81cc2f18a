"""What each process of a run does: all train and sample in turn, or some only sample.

Processes of two roles work at the same time and meet where one needs what the other has: weights,
responses, what a checkpoint contained. A program over the devices of one role is called by its
processes alone, so neither waits for the other in between.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from luspo_jax.hosts import guard, processes

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Roles:
    """The processes that train and those that sample: the same ones, or two parts of all.

    Attributes:
      train, rollout: indices of the processes; process 0, which writes, trains.
    """

    train: tuple[int, ...] = (0,)
    rollout: tuple[int, ...] = (0,)

    @property
    def split(self) -> bool:
        """Whether no process does both."""
        return self.train != self.rollout

    @property
    def trains(self) -> bool:
        """Whether this process trains."""
        return not self.split or jax.process_index() in self.train

    @property
    def samples(self) -> bool:
        """Whether this process samples."""
        return not self.split or jax.process_index() in self.rollout

    def begin(self, work: Callable[[], T], label: str) -> Callable[[], T]:
        """Does `work` where responses are sampled; returns what waits for it and returns its value.

        Processes that train come back at once, and get the value of the first that samples, which
        must pickle. All must call what is returned.
        """
        if not self.split:
            value = work()
            return lambda: value
        value = self._done(work, self.rollout)
        return lambda: self._told(value, label, self.rollout)

    def sampled(self, work: Callable[[], T], label: str) -> T:
        """Returns, everywhere, the value of `work` done where responses are sampled."""
        return self.begin(work, label)()

    def trained(self, work: Callable[[], T], label: str) -> T:
        """Returns, everywhere, the value of `work` done where the policy is trained."""
        if not self.split:
            return work()
        return self._told(self._done(work, self.train), label, self.train)

    def _done(self, work, members):
        if jax.process_index() not in members:
            return None
        with processes.among(members):
            return work()

    def _told(self, value: Any, label: str, source: tuple[int, ...]):
        """Meets the others; returns the own value in the source, else that of its first process."""
        processes.barrier(label, guard.MEETING)
        own = jax.process_index() in source
        told = processes.gather(value if jax.process_index() == source[0] else None)[source[0]]
        return value if own else told
