"""What the benchmark of partial rollouts plays: lengths, prompts, and steps at a pace.

N in shape suffixes: lengths 1 … longest; K: kinds of prompts.
"""

import collections
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.stats

from luspo_jax.datasets import Example
from luspo_jax.experience.groups import Waiting
from luspo_jax.experience.rounds import Asker, Policy, collect
from luspo_jax.experience.shaping import Shaping
from luspo_jax.hosts.values import ConfigError
from luspo_jax.length.settings import LengthSettings
from luspo_jax.metrics import StepMetrics
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward

PROMPT_LENGTH = 16  # tokens
_KINDS = 16


@dataclasses.dataclass(frozen=True)
class Law:
    """Lengths of responses in tokens: lognormal, rounded, longer ones cut.

    Attributes:
      median: before they are cut.
      sigma: standard deviation of the logarithm.
      longest: where they are cut.
      shared: share of the logarithm's variance that is the prompt's; the rest is a response's own.
    """

    median: float
    sigma: float
    longest: int
    shared: float = 0.5

    def __post_init__(self):
        if not (self.median > 0 and self.sigma > 0 and 0 <= self.shared < 1 < self.longest):
            raise ConfigError(f"no law of lengths: {self}")

    @functools.cached_property
    def table_KN(self) -> np.ndarray:
        """P(length | kind of prompt); kinds are equally likely, their medians lognormal too."""
        z_K = scipy.stats.norm.ppf((np.arange(_KINDS) + 0.5) / _KINDS)
        centres_K = math.log(self.median) + self.sigma * math.sqrt(self.shared) * z_K / z_K.std()
        edges_N = np.log(np.arange(1, self.longest) + 0.5)
        below_KN = scipy.stats.norm.cdf(
            edges_N, centres_K[:, None], self.sigma * math.sqrt(1 - self.shared)
        )
        return np.diff(below_KN, prepend=0.0, append=1.0, axis=1)

    @property
    def mean(self) -> float:
        """Mean length of the cut lengths."""
        return float(self.table_KN.mean(0) @ np.arange(1, self.longest + 1))

    def kind(self, prompt_id: int, seed: int) -> int:
        """Returns the kind of a prompt."""
        return int(np.random.default_rng((seed, prompt_id)).integers(_KINDS))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Prompts of a step and responses to each, slots, decode steps between two looks; steps that
    count, and steps before them."""

    prompts: int
    group: int
    slots: int
    chunk: int
    steps: int
    warmup: int


@dataclasses.dataclass(frozen=True)
class Pace:
    """`rollout.overlap`, `rollout.max_age` and `rollout.late` of a run."""

    overlap: int
    max_age: int
    late: str = "wait"

    def __str__(self) -> str:
        if not self.overlap:
            return "synchronous"
        return f"overlap {self.overlap}, " + (
            "drop" if self.late == "drop" else f"max_age {self.max_age}"
        )


def paces(prompts: int) -> list[Pace]:
    """Returns the paces that are compared, the synchronous one first."""
    overlaps = (prompts // 2, prompts, 2 * prompts)
    waiting = [Pace(overlap, 1 + overlap // prompts) for overlap in overlaps]
    return [Pace(0, 1), *waiting, *(Pace(overlap, 0, "drop") for overlap in overlaps)]


class Prompts:
    """An endless stream of prompts, as a PromptStream; all that a prompt says is its kind.

    The token that says so comes after those of lengths, as `pace_sides.model_of` reads it.
    """

    def __init__(self, law: Law, seed: int):
        self.metrics: dict[str, float] = {}
        self._law, self._seed, self._taken = law, seed, 0

    def next_prompts(self, count: int) -> list[PromptRecord]:
        """Returns the next prompts."""
        ids = range(self._taken, self._taken + count)
        self._taken += count
        return [self._prompt(prompt_id) for prompt_id in ids]

    def _prompt(self, prompt_id):
        token = self._law.longest + self._law.kind(prompt_id, self._seed)
        tokens = np.full(PROMPT_LENGTH, token, np.int32)
        return PromptRecord(prompt_id, tokens, "", Example(prompt_id, "", ""))


class _Content:
    """Finds every response right."""

    def score_batch(self, samples):
        return [Reward(1.0, "ok", {"right": 1.0}) for _ in samples]


class _Watched:
    """A sampler that keeps its statistics."""

    def __init__(self, sampler):
        self._sampler, self.sampling, self.stats = sampler, sampler.sampling, []

    def generate(self, *arguments, **named):
        responses, stats = self._sampler.generate(*arguments, **named)
        self.stats.append(stats)
        return responses, stats


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step took.

    Attributes:
      decode_steps, generated, continued: as in RolloutStats.
      seconds: of sampling, without compiling.
      dropped: tokens of responses that were given up.
      lengths: of the responses that it trains on.
      ages: of their groups, in steps.
      difference: the account's mean length trained on over that sampled, − 1; NaN without account.
    """

    decode_steps: int
    generated: int
    continued: int
    seconds: float
    dropped: int
    lengths: tuple[int, ...]
    ages: tuple[int, ...]
    difference: float


def play(
    sampler: Any, law: Law, sizes: Sizes, pace: Pace, *, seed: int, params: Any = None
) -> Iterator[Step]:
    """Plays steps as a run samples them, one each time it is asked, warm-up included.

    Args:
      sampler: an Engine, or what stands for one.
      law: of the lengths.
      sizes: of a step, and how many.
      pace: of the steps.
      seed: of the prompts and of the noise.
      params: of the sampler.
    """
    watched = _Watched(sampler)
    asker = Asker(
        stream=Prompts(law, seed),
        sampler=watched,
        scorer=_Content(),
        decode=lambda tokens: "",
        num_prompts=sizes.prompts,
        group_size=sizes.group,
        seed=seed,
        shaping=Shaping(),
        metric="right",
        overlap=pace.overlap,
        max_age=pace.max_age,
        late=pace.late,
        length=LengthSettings(account_window=sizes.steps),
    )
    waiting = Waiting()
    for step in range(sizes.warmup + sizes.steps):
        watched.stats.clear()
        metrics = StepMetrics()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of lengths that part: the table tells of them
            rollouts, waiting = collect(asker, Policy(params, step), waiting, step, metrics)
        yield _step(watched.stats, rollouts, metrics.result())


def _step(stats, rollouts, metrics):
    return Step(
        decode_steps=sum(s.decode_steps for s in stats),
        generated=sum(s.generated_tokens for s in stats),
        continued=sum(s.continued_tokens for s in stats),
        seconds=sum(s.seconds for s in stats),
        dropped=int(metrics.get("rollout/dropped/tokens", 0)),
        lengths=tuple(map(int, rollouts.lengths_B)),
        ages=tuple(rollouts.version - group.step for group in rollouts.groups),
        difference=metrics.get("length/account/window/relative_difference", math.nan),
    )


def summary(steps: Sequence[Step], slots: int) -> dict[str, float]:
    """Returns the numbers of some steps.

    A slot-step is a slot at a decode step, whether or not it has a response.

    Args:
      steps: in order.
      slots: of the sampler.

    Returns:
      `busy`, tokens made a slot-step; `used`, tokens trained on a slot-step; `decode steps` and
      `seconds` a step; `age`, mean and `oldest`, in steps; `read again` and `given up`, tokens over
      those made; `length`, mean of those trained on; `account`, see Step.difference.
    """
    total = collections.Counter()
    for step in steps:
        total.update(
            decode_steps=step.decode_steps,
            generated=step.generated,
            continued=step.continued,
            dropped=step.dropped,
            trained=sum(step.lengths),
        )
    slot_steps = slots * total["decode_steps"]
    lengths = [length for step in steps for length in step.lengths]
    ages = [age for step in steps for age in step.ages]
    return {
        "busy": total["generated"] / slot_steps,
        "used": total["trained"] / slot_steps,
        "decode steps": total["decode_steps"] / len(steps),
        "seconds": sum(step.seconds for step in steps) / len(steps),
        "age": float(np.mean(ages)),
        "oldest": max(ages),
        "read again": total["continued"] / total["generated"],
        "given up": total["dropped"] / total["generated"],
        "length": float(np.mean(lengths)),
        "account": steps[-1].difference,
    }
