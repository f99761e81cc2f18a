"""Generated problems of the package reasoning-gym: any of its tasks, or several by weight.

The package draws an item from a seed plus an index, so that neighbouring seeds share items. Here a
hash of seed, place and attempt gives an item's number, and a hash of its question decides its
split, one in four for the test: train and test never ask the same question, under any seeds and
options, even where a task has few questions.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from luspo_jax.datasets.example import DataError, Example
from luspo_jax.datasets.label_sums import check_split
from luspo_jax.hosts.values import SEED, Number, refusal
from luspo_jax.rewards import gym_tasks

TEST_FRACTION = 4  # one question in this many is a test question
_ATTEMPTS = 64  # draws for one place; (1 - 1/4)^64 = 1e-8

_SIZE = Number(1, 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Source:
    """One task with its options.

    Attributes:
      name: the user's name for it.
      task: a task of the package.
      options: its options, as JSON text.
      weight: its share of the problems, up to a common factor.
    """

    name: str
    task: str
    options: str = "{}"
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class ReasoningGym(Sequence):
    """One split: a random-access sequence of `Example`, the same on every machine.

    Attributes:
      split: "train" or "test".
      sources: the tasks.
      size: number of problems.
      seed: decides which items are drawn, not their split.
      version: of the package.
    """

    split: str
    sources: tuple[Source, ...]
    size: int
    seed: int
    version: str

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"example {index} of {self.size}")
        return self._example(int(index) % self.size)

    @property
    def origin(self) -> str:
        """Returns what the problems are drawn by, with its version and the split."""
        return f"{gym_tasks.PACKAGE} {self.version} ({self.split})"

    def _example(self, index: int) -> Example:
        source, failure = self._source(index), None
        options = json.loads(source.options)
        for attempt in range(_ATTEMPTS):
            number = 1 + _hash(f"{self.seed}/{index}/{attempt}") % gym_tasks.NUMBERS
            try:
                entry = gym_tasks.item(source.task, options, number)
            except Exception as error:  # some tasks give up on a draw
                failure = error
                continue
            if split_of(entry["question"]) == self.split:
                meta = {"task": source.task, "number": number, "options": options}
                meta |= {"source": source.name}
                return Example(index, entry["question"], str(entry["answer"]), meta)
        raise DataError(self._too_few(source, failure))

    def _source(self, index: int) -> Source:
        if len(self.sources) == 1:
            return self.sources[0]
        ends = list(itertools.accumulate(source.weight for source in self.sources))
        drawn = _hash(f"{self.seed}/{index}") / 2**64 * ends[-1]
        return self.sources[min(bisect.bisect_right(ends, drawn), len(ends) - 1)]

    def _too_few(self, source: Source, failure: Exception | None) -> str:
        text = (
            f"task {source.task!r} with options {source.options}: {_ATTEMPTS} draws gave no "
            f"question of the split {self.split!r}"
        )
        if failure is not None:
            return f"{text}; the last draw that failed: {type(failure).__name__}: {failure}"
        return f"{text}: it has too few different questions; choose options that allow more"


def split_of(question: str) -> str:
    """Returns the split of a question: by a hash of its text alone."""
    return "test" if _hash(question) % TEST_FRACTION == 0 else "train"


def reasoning_gym(
    split: str,
    task: str = "",
    tasks: Any = None,
    size: int = 100_000,
    seed: int = 0,
    **options,
) -> ReasoningGym:
    """Returns a split of one task, or of several.

    Args:
      split: "train" or "test".
      task: one task; every other option is then its own, besides size and seed.
      tasks: name → {weight, task, and the task's options}, in place of `task`; task is the name
        unless it is given, and weight 1.
      size: number of problems; they are drawn when they are asked for.
      seed: decides which items are drawn; splits of all seeds are disjoint.
      **options: of the task: its own, and `level`, `levels`, `level_mode` of its curriculum.

    Raises:
      DataError: names the option and the remedy; or the package is not installed.
    """
    check_split(split)
    problems = (
        refusal("options.size", size, int, _SIZE),
        refusal("options.seed", seed, int, SEED),
        refusal("options.task", task, str),
    )
    if any(problems):
        raise DataError("; ".join(filter(None, problems)))
    try:
        version = gym_tasks.version()
    except ValueError as error:
        raise DataError(f"data.name=reasoning_gym: {error}") from None
    if task:
        if tasks is not None:  # an option of calendar_arithmetic
            options["tasks"] = tasks
        sources = (_checked("options", task, task, options),)
    else:
        if options:
            raise DataError(f"options.{next(iter(options))}: of which task? Name it: options.task")
        sources = _sources(tasks)
    return ReasoningGym(split, sources, size, seed, version)


def _sources(tasks: Any) -> tuple[Source, ...]:
    if not isinstance(tasks, Mapping) or not tasks:
        raise DataError(
            "options.task is empty: name a task, as {'task': 'chain_sum'}, or several with their "
            "weights, as {'tasks': {'chain_sum': {'weight': 2.0}, 'gcd': {}}}"
        )
    sources = []
    for name, entry in tasks.items():
        place = f"options.tasks.{name}"
        if not isinstance(entry, Mapping):
            raise DataError(f"{place}={entry!r} must be a section: {{'weight': 1.0, …}}")
        options = dict(entry)
        weight, task = options.pop("weight", 1.0), options.pop("task", name)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise DataError(f"{place}.weight={weight!r} must be a positive number")
        sources.append(_checked(place, name, task, options, float(weight)))
    return tuple(sources)


def _checked(
    place: str, name: str, task: str, options: Mapping[str, Any], weight: float = 1.0
) -> Source:
    """Returns a source whose task and options are usable; `place` is the field that holds them."""
    try:
        gym_tasks.check(task, options)
        return Source(name, task, gym_tasks.as_text(options), weight)
    except gym_tasks.TaskError as error:
        raise DataError(f"{place}{error}") from error


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
