"""Who takes a step when, and how long it took."""

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence

PAUSE = 0.3  # seconds between steps: threads of the last one that still spin go to sleep
OURS = "luspo_jax"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One step of one side; rounds before 0 are warm-up."""

    round: int
    side: str


@dataclasses.dataclass(frozen=True)
class Timed:
    """A turn that was taken.

    Attributes:
      round, side: when and whose.
      seconds: wall time.
      cores: this process's CPU seconds a second, all threads: well under the machine's cores where
        others used them, or where threads waited.
      phases: wall seconds of the named parts.
    """

    round: int
    side: str
    seconds: float
    cores: float
    phases: dict[str, float]


def order(sides: Sequence[str], *, warmup: int, steps: int) -> list[Turn]:
    """Every side once a round, the order turned round in every other one."""
    turns = []
    for number in range(-warmup, steps):
        turns += [Turn(number, side) for side in (sides if number % 2 == 0 else sides[::-1])]
    return turns


def take(
    turns: Sequence[Turn],
    step: Callable[[], dict[str, float]],
    taken: Callable[[Timed], None],
    *,
    pause: float = PAUSE,
) -> Generator[None, dict[str, float], None]:
    """Runs our steps, and yields where it is another side's turn.

    The other side sends the phases of its step as soon as that is done. This way its own training
    loop stays in charge: it is timed as its users run it, from one step's end to the next.

    Args:
      turns: in order.
      step: takes one step of ours and gives its phases.
      taken: receives every step as it is done.
      pause: seconds of rest before each step.
    """
    for turn in turns:
        time.sleep(pause)
        used, started = time.process_time(), time.perf_counter()
        phases = step() if turn.side == OURS else (yield)
        seconds = time.perf_counter() - started
        cores = (time.process_time() - used) / seconds
        taken(Timed(turn.round, turn.side, seconds, cores, phases))
