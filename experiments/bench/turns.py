"""Schedules the sides' steps and times them."""

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

PAUSE = 0.3  # seconds between steps: spinning threads of the last one go to sleep
OURS = "luspo_jax"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One step of one side; rounds before 0 are warm-up."""

    round: int
    side: str


@dataclasses.dataclass(frozen=True)
class Timed:
    """A completed turn.

    Attributes:
      round, side: which turn.
      seconds: wall time.
      cores: this process's CPU seconds per second, all threads: well under the machine's cores if
        others used them, or if threads waited.
      phases: wall seconds of the named parts.
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


def take(
    turns: Sequence[Turn],
    step: Callable[[], dict[str, float]],
    taken: Callable[[Timed], None],
    *,
    pause: float = PAUSE,
) -> Generator[None, dict[str, float], None]:
    """Runs our steps, and yields at another side's turn.

    The other side sends the phases of its step as soon as it is done. So its own training loop
    stays in charge: it is timed as its users run it, from one step's end to the next.

    Args:
      turns: in order.
      step: takes one step of ours and returns its phases.
      taken: called with every step as it is done.
      pause: seconds of rest before each step.
    """
    for turn in turns:
        rest(pause)
        used, started = time.process_time(), time.perf_counter()
        phases = step() if turn.side == OURS else (yield)
        seconds = time.perf_counter() - started
        cores = (time.process_time() - used) / seconds
        taken(Timed(turn.round, turn.side, seconds, cores, phases))
