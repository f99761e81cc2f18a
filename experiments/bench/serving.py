"""A library's end of a turn: what runs in a process of its own, in any environment's python.

Only the standard library is imported. The process answers one line of JSON to each line it is
asked, and sleeps between them; whatever the library prints goes to stderr.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def spec(path: str) -> dict[str, Any]:
    """Reads what the process is to do."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def rewards(texts: Sequence[str]) -> list[float]:
    """Returns 1 for each text whose last e or o is an e, as our side's pattern decides."""
    return [float(re.findall("[eo]", text)[-1:] == ["e"]) for text in texts]


class Channel:
    """Questions from stdin, answers to what was stdout."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries print to stdout

    def answer(self, **values) -> None:
        """Sends one answer."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def question(self) -> str:
        """Waits for the next line; returns "" after the last."""
        return sys.stdin.readline()


@dataclasses.dataclass
class Clock:
    """Wall and CPU time since it was started, all threads of the process."""

    wall: float = 0.0
    cpu: float = 0.0

    def start(self) -> None:
        """Starts anew."""
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Returns seconds since the start, and CPU seconds a second."""
        seconds = time.perf_counter() - self.wall
        return {"seconds": seconds, "cores": (time.process_time() - self.cpu) / seconds}


class Steps:
    """Turns of a training loop that stays in charge: it asks for leave before each of its steps.

    So it is timed as its users run it, from the beginning of one step to that of the next.
    """

    def __init__(self, **ready):
        self._channel, self._clock, self._ready = Channel(), Clock(), ready

    def begin(self, **checks) -> bool:
        """Answers that the side is ready, with its versions; returns whether a step is wanted."""
        self._channel.answer(ready=self._ready, **checks)
        return self._wait()

    def end(
        self, phases: dict[str, float], lengths: Sequence[int], moved: Callable[[], bool]
    ) -> bool:
        """Answers for the step that ends now; returns whether another is wanted.

        Args:
          phases: seconds of its parts.
          lengths: tokens of its responses.
          moved: tells whether the weights are others than in the beginning; it is not timed.
        """
        took = self._clock.read()
        self._channel.answer(**took, phases=phases, lengths=list(lengths), moved=moved())
        return self._wait()

    def _wait(self):
        wanted = bool(self._channel.question())
        self._clock.start()
        return wanted
