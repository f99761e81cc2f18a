"""Streams prompts in a shuffled order that all processes and restarts share."""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from luspo_jax.datasets import DataError, Example, Mixture
from luspo_jax.prompts.renderer import (
    PromptRecord,
    Refusal,
    Renderer,
    agreed,
    outcomes,
    with_images,
)

_AT_ONCE = 256  # problems whose prompts and images are in memory at once during a survey


@dataclasses.dataclass(frozen=True)
class Survey:
    """Outcomes of a sample of problems, spread evenly over a dataset.

    Attributes:
      total: problems of the dataset.
      looked_at: problems of the sample; all of a small dataset.
      refused: reason → number of these that cannot become prompts.
    """

    total: int
    looked_at: int
    refused: Mapping[str, int]

    def __str__(self) -> str:
        of = "" if self.looked_at == self.total else f" of {self.looked_at:,} looked at"
        others = [f", {n:,} {why}" for why, n in self.refused.items() if why != "too_long"]
        return f"{self.refused.get('too_long', 0):,}{of} too long" + "".join(others)


class PromptStream:
    """An endless, shuffled, resumable stream of prompts; each occurs once in every epoch.

    grain draws one order from the seed. A step takes the next prompts that are short enough and
    deals them out to the processes one by one, so that every number of processes sees the same
    prompts, and every process has the same state. The sources of a mixture are interleaved by
    weight, each with its own order and epochs.

    Args:
      examples: the problems, by random access, ids unique; or a Mixture.
      renderer: turns a problem into a prompt.
      max_length: longest prompt, in tokens; longer ones are dropped and counted.
      seed: decides the order.
      shuffle: whether to shuffle, anew in every epoch; otherwise the order of the examples.
      process_index: this process.
      process_count: number of processes that share the stream.
      gather: returns the values of all processes (`processes.gather`). Needed for images with
        several processes: files or time limits may fail on one process only, and all then refuse
        what one refuses.

    Attributes:
      dropped: number of prompts skipped so far because they were too long.
      refused: reason → number of problems skipped for another reason, all of them about images.
      refusals: the latest of these.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        renderer: Renderer,
        *,
        max_length: int,
        seed: int,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        gather: Callable[[Any], list[Any]] | None = None,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}")
        if not len(examples):
            raise DataError("no prompts: the dataset is empty")
        self._examples, self._renderer, self._max_length = examples, renderer, max_length
        self._process_index, self._process_count = process_index, process_count
        mixed = isinstance(examples, Mixture)
        sizes, weights = (examples.sizes, examples.weights) if mixed else ((len(examples),), (1.0,))
        self._order = draw_order(sizes, weights, seed, shuffle)
        self._position = 0
        self._gather = gather
        self.dropped = 0
        self.refused: collections.Counter[str] = collections.Counter()
        self.refusals: collections.deque[Refusal] = collections.deque(maxlen=100)
        self._identity = {
            "seed": seed,
            "shuffle": shuffle,
            "max_prompt_length": max_length,
            "template_hash": renderer.hash,
            "num_examples": len(examples),
            "examples_hash": _fingerprint(examples),
            "mixture": [list(pair) for pair in zip(sizes, weights, strict=True)],
        }

    def __len__(self) -> int:
        """Returns the examples in an epoch, including those that are too long."""
        return len(self._examples)

    @property
    def epoch(self) -> float:
        """Epochs completed, with fraction: 1.5 is halfway through the second; a mixture's mean."""
        return self._position / len(self._examples)

    @property
    def metrics(self) -> dict[str, float]:
        """Returns the stream's metrics: epochs, and prompts skipped so far, by reason."""
        return {
            "training/epoch": self.epoch,
            "prompts/dropped": self.dropped,
            **{f"prompts/refused/{why}": n for why, n in self.refused.items()},
        }

    def next_prompts(self, count: int) -> list[PromptRecord]:
        """Returns the next `count` prompts of this process.

        Raises:
          DataError: every prompt of a whole epoch is too long or refused.
        """
        wanted, found, looked_at = count * self._process_count, [], 0
        while len(found) < wanted:
            missing = wanted - len(found)
            span = range(self._position, self._position + missing)
            examples = [self._examples[int(self._order[position])] for position in span]
            for outcome in self._outcomes(examples):
                if isinstance(outcome, PromptRecord):
                    found.append(outcome)
                else:
                    self._count(outcome)
            self._position += missing
            looked_at += missing
            if not found and looked_at >= len(self._examples):
                raise DataError(self._no_prompts(looked_at))
        return found[self._process_index :: self._process_count]

    def pictured(self, records: Sequence[PromptRecord]) -> list[PromptRecord]:
        """Restores the images of prompts of this stream; see `with_images`."""
        return with_images(records, self._renderer)

    def survey(self, limit: int, seconds: float = math.inf) -> Survey:
        """Surveys up to `limit` problems, or as many as fit in the time, without moving the stream.

        The problems of some generated tasks take long to draw. Places are looked at in a random
        order, so that those of a survey that ends early are spread evenly too.
        """
        total = len(self._examples)
        places = np.linspace(0, total, min(limit, total), endpoint=False).astype(int)
        places = np.random.default_rng(0).permutation(places)
        refused: collections.Counter[str] = collections.Counter()
        looked_at, end = 0, time.monotonic() + seconds
        starts = range(0, len(places), _AT_ONCE)
        for start in tqdm(starts, "prompts", disable=None, delay=1, unit=" batches"):
            examples = [self._examples[int(place)] for place in places[start : start + _AT_ONCE]]
            found = outcomes(examples, self._renderer, max_length=self._max_length)
            refused.update(x.reason for x in found if isinstance(x, Refusal))
            looked_at += len(examples)
            if time.monotonic() > end:
                break
        return Survey(total, looked_at, refused)

    def _outcomes(self, examples) -> list[PromptRecord | Refusal]:
        own = outcomes(examples, self._renderer, max_length=self._max_length)
        if self._gather is None or self._renderer.images is None:
            return own
        return agreed(own, self._gather)

    def _count(self, refusal: Refusal) -> None:
        if refusal.reason == "too_long":
            self.dropped += 1
            return
        self.refused[refusal.reason] += 1
        self.refusals.append(refusal)

    def _no_prompts(self, looked_at: int) -> str:
        text = f"longer than max_prompt_length={self._max_length} tokens"
        if not self.refused:
            return f"no prompts: all {looked_at} are {text}"
        reasons = "; ".join(f"{n} × {reason}" for reason, n in self.refused.most_common())
        last = list(itertools.islice(reversed(self.refusals), 3))
        return (
            f"no prompts: of {looked_at}, {self.dropped} are {text}, the others are refused "
            f"({reasons}), for example " + "; ".join(refusal.detail for refusal in last)
        )

    def get_state(self) -> dict[str, Any]:
        """Returns JSON-serialisable state: the stream's position, and what identifies it."""
        refused = {} if self._renderer.images is None else {"refused": dict(self.refused)}
        return {"position": self._position, "dropped": self.dropped, **refused, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to the position of another stream.

        Raises:
          ValueError: the state is that of a different stream; the message names the difference.
        """
        differences = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"the prompts are not those of the checkpoint: {'; '.join(differences)}"
            )
        self._position, self.dropped = int(state["position"]), int(state["dropped"])
        self.refused = collections.Counter(state.get("refused", {}))


def draw_order(sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool):
    """Returns the endless sequence of places in the dataset, with random access."""
    import grain  # here, as code that only renders prompts need not wait for it

    orders, start = [], 0
    for source, size in enumerate(sizes):
        order = grain.MapDataset.range(start, start + size)
        if shuffle:
            order = order.shuffle(seed=(seed + source) % (1 << 32))
        orders.append(order.repeat())
        start += size
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)


def _fingerprint(examples: Sequence[Example]) -> str:
    """Hashes up to 256 examples spread over the dataset: all of a large one takes seconds."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(examples) - 1, 256).astype(int)):
        example = examples[int(index)]
        digest.update(json.dumps([example.id, example.problem, example.answer]).encode())
    return digest.hexdigest()[:16]
