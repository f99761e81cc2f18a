"""Schedules the sides' steps and times them."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PAUSE = 0.3  # seconds between steps: spinning threads of the last one go to sleep
OURS = "luspo_jax"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One step of one side; rounds before 0 are warm-up."""

    round: int
    side: str


@dataclasses.dataclass(frozen=True)
class Step:
    """What a side tells of one step.

    Attributes:
      seconds: wall time.
      cores: its process's CPU seconds per second, all threads: well under the machine's cores if
        others used them, or if threads waited.
      phases: wall seconds of the named parts.
      lengths: of the responses, prompt by prompt.
      moved: whether its steps so far have changed the weights.
    """

    seconds: float
    cores: float
    phases: dict[str, float]
    lengths: list[int]
    moved: bool = True


@dataclasses.dataclass(frozen=True)
class Timed:
    """A completed turn.

    Attributes:
      round, side: which turn.
      seconds, cores, phases: as of its Step.
    """

    round: int
    side: str
    seconds: float
    cores: float
    phases: dict[str, float]


def order(sides: Sequence[str], *, warmup: int, steps: int) -> list[Turn]:
    """Lists every side once per round, reversing the order every other round."""
    turns = []
    for number in range(-warmup, steps):
        turns += [Turn(number, side) for side in (sides if number % 2 == 0 else sides[::-1])]
    return turns


def rest(seconds: float = PAUSE) -> None:
    """Pauses between turns."""
    time.sleep(seconds)


def alternate(sides: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Returns seconds of every side, `pairs` times after two that do not count.

    The side that goes first in one round goes last in the next. A side must wait for what it
    computes.
    """
    seconds = {name: [] for name in sides}
    for turn in order(tuple(sides), warmup=2, steps=pairs):
        started = time.perf_counter()
        sides[turn.side]()
        if turn.round >= 0:
            seconds[turn.side].append(time.perf_counter() - started)
    return seconds
