"""Plays partial rollouts, step after step, until steps are alike.

Hosts are played together, each with its own share of the groups, and a step ends by the rule of
`experience.rounds` over the groups of all. Hosts look at it after as many decode steps, so the
slowest decides how long each stretch between two looks takes. That is more than one host with its
own part of everything would take: what an earlier step began comes first and lies on the first
hosts, and the longest responses of all decide when a step ends.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from experiments.rehearsal import playing
from experiments.rehearsal.playing import Host, Played
from luspo_jax.experience.rounds import chosen, enough
from luspo_jax.hosts import processes
from luspo_jax.rollout import Engine, Request

_FEWEST = 8  # steps that are counted


@dataclasses.dataclass(frozen=True)
class Pace:
    """When a step ends; as in `experience.rounds.Asker`.

    Attributes:
      num_prompts: groups that a step takes.
      overlap: groups in flight beyond them.
      max_age: most steps between the one that begins a group and the one that takes it.
      hosts: that sample.
    """

    num_prompts: int
    overlap: int
    max_age: int
    hosts: int

    @property
    def first(self) -> int:
        """The first step that is counted: by then all in flight were begun among others."""
        return self.max_age + 2

    @property
    def counted(self) -> int:
        """Steps that are counted: full turns of max_age + 1, as steps that wait for what is due
        come once in so many."""
        turn = self.max_age + 1
        return -(-_FEWEST // turn) * turn


def steady(
    engine: Engine, prompt: int, lengths_of: Callable[[int], np.ndarray], pace: Pace
) -> Played:
    """Plays steps, and returns those that are counted.

    They are worth as many steps as their tokens fill: in the long run a step draws as many as it
    takes, and single steps draw more or less.

    Args:
      engine: of each host; its pool has a size.
      prompt: tokens of every prompt; no two begin with the same.
      lengths_of: n → [num_prompts, group_size], lengths of the responses to the n-th prompts.
      pace: when a step ends.
    """
    flight: list[Request] = []
    kept, ages, tokens = [], [], 0
    lengths_PG, begun = lengths_of(0), 0
    for step in range(pace.first + pace.counted):
        count = pace.num_prompts + pace.overlap - len(flight)
        flight += [playing.asked(begun + i, prompt, step) for i in range(count)]
        begun += count
        while len(lengths_PG) < begun:
            more_PG = lengths_of(len(lengths_PG) // pace.num_prompts)
            lengths_PG = np.concatenate([lengths_PG, more_PG])
        shares = [flight[processes.share(len(flight), i, pace.hosts)] for i in range(pace.hosts)]
        hosts = [Host(engine, share, prompt, lengths_PG) for share in shares]
        stretches = _until_enough(hosts, [step - request.step for request in flight], pace)
        flight = processes.merged([_left(*pair) for pair in zip(hosts, shares, strict=True)])
        ended = [all(response.ended for response in request.begun) for request in flight]
        taken = chosen(ended, [request.step for request in flight], pace.num_prompts)
        if step >= pace.first:
            own = zip(hosts, zip(*stretches, strict=True), strict=True)
            kept.append([host.played(parts) for host, parts in own])
            tokens += sum(host.loop.generated for host in hosts)
            ages += [step - r.step for r, take in zip(flight, taken, strict=True) if take]
        flight = [request for request, take in zip(flight, taken, strict=True) if not take]
    in_a_step = pace.num_prompts * float(lengths_PG[:begun].sum(axis=1).mean())
    return playing.joined(kept, tokens / in_a_step, float(np.mean(ages)))


def _until_enough(hosts, ages, pace):
    """Plays the hosts; returns what each does between looks, [looks][hosts]."""
    found = []
    for looks in zip(*(host.loop.looks(None) for host in hosts), strict=True):
        found.append([host.stretch() for host in hosts])
        parts = [host.whole(look) for host, look in zip(hosts, looks, strict=True)]
        ended = processes.merged(parts)
        if enough(ended, ages, num_groups=pace.num_prompts, max_age=pace.max_age):
            break
    for host in hosts:
        host.loop.leave()
    return found


def _left(host, requests):
    """Returns a host's requests with their responses so far."""
    responses = host.loop.responses
    size = len(responses) // max(1, len(requests))
    return [
        dataclasses.replace(request, begun=tuple(responses[i * size : (i + 1) * size]))
        for i, request in enumerate(requests)
    ]
