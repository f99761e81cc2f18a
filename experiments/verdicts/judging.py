"""Verdicts of the project's verifier and of Math-Verify on pairs of gold and answer."""

import sys
from collections.abc import Iterable, Mapping

from tqdm import tqdm

from luspo_jax.rewards import Reward, Sample, Scorer

# Column → reward. Judges are named by module, since worker processes import them.
VERIFIERS = {"ours": "boxed_math", "math_verify": "experiments.verdicts.plain_math_verify:response"}
_BATCH = 256


def boxed(gold: str, answer: str) -> Sample:
    """Returns a response that states an answer in a box."""
    return Sample(rf"\boxed{{{answer}}}", gold)


def judged(
    reward: str,
    samples: Iterable[Sample],
    *,
    workers: int | None = None,
    options: Mapping | None = None,
    time_limit: float = 5.0,
) -> list[Reward]:
    """Returns a reward's verdict on each sample, from processes that are killed at their limit."""
    samples, rewards = list(samples), []
    with (
        Scorer(
            {reward: 1.0},
            options={reward: options} if options else None,
            workers=workers,
            max_failure_rate=1.0,
            time_limit=time_limit,
        ) as scorer,
        tqdm(total=len(samples), unit="verdict", leave=False, disable=None, file=sys.stderr) as bar,
    ):
        for start in range(0, len(samples), _BATCH):
            batch = samples[start : start + _BATCH]
            rewards += scorer.score_batch(batch)
            bar.update(len(batch))
    return rewards
