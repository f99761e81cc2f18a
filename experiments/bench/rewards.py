"""Measures how many answers per second the verifiers judge.

    python -m experiments.bench.rewards --data=../shared/data/math_eval/math500/test.jsonl

There are two figures: whole MATH solutions by `boxed_math`, judged in worker processes by
Math-Verify and sympy if the cheap rules do not decide, and answers by `dapo_math`, judged in this
process. Half of the golds are another problem's, since wrong answers cost most. Without `--data`
the solutions are made up. Each worker parses every formula anew, as in a run: a warm-up batch has
other answers. On a busy machine the figures are lower bounds.
"""

import json
import os
import pathlib
import time

from absl import app, flags

from luspo_jax.rewards import Sample, Scorer

_DATA = flags.DEFINE_string("data", None, "a jsonl of solutions: fields solution, answer")
_WORKERS = flags.DEFINE_integer("workers", 2, "worker processes", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 4, "times that the DAPO answers are judged")
_LEAST = {"boxed_math": 90, "dapo_math": 1_000}  # per second, on two free cores


def solutions(path: str | None) -> list[tuple[str, str]]:
    """Returns (solution, answer) of each line of a file, or made-up ones."""
    if path is not None:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        return [(row["solution"], row["answer"]) for row in map(json.loads, lines)]
    forms = (
        r"\frac{%d}{7}",
        r"%d\sqrt{3}",
        "x^2+%dx",
        "(%d,2)",
        r"[1,%d)",
        "%d",
        r"\frac{%d\pi}{9}",
    )
    answers = [forms[n % len(forms)] % (n + 2) for n in range(700)]
    return [("Since $a = b$, we add. " * 40 + rf"So it is $\boxed{{{a}}}$.", a) for a in answers]


def pairs(rows: list[tuple[str, str]]) -> list[Sample]:
    """Pairs solutions with their own gold or, every other one, with the next one's gold."""
    golds = [answer for _, answer in rows]
    moved = golds[1:] + golds[:1]
    return [
        Sample(solution, moved[n] if n % 2 else golds[n]) for n, (solution, _) in enumerate(rows)
    ]


def rate(name: str, samples: list[Sample], workers: int) -> tuple[float, int, dict[str, int]]:
    """Returns (verdicts per second, number right, statuses)."""
    with Scorer({name: 1.0}, workers=workers, max_failure_rate=1.0) as scorer:
        scorer.score_batch([Sample(r"Answer: \boxed{1}", "1")] * 8 * workers)
        start = time.perf_counter()
        rewards = scorer.score_batch(samples)
        seconds = time.perf_counter() - start
    statuses = [reward.status for reward in rewards]
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    return len(samples) / seconds, sum(reward.value > 0 for reward in rewards), counts


def main(argv) -> None:
    """Prints how many verifications a second the workers manage."""
    del argv
    rows = solutions(_DATA.value)
    dapo = [(f"{solution}\nAnswer: ${answer}$", answer) for solution, answer in rows]
    work = {"boxed_math": pairs(rows), "dapo_math": pairs(dapo) * _REPEATS.value}
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {_WORKERS.value} workers")
    for name, samples in work.items():
        speed, right, statuses = rate(name, samples, _WORKERS.value)
        print(
            f"{name}: {speed:.0f} a second (asked for: {_LEAST[name]}), {right} of {len(samples)} "
            f"right, {statuses}"
        )


if __name__ == "__main__":
    app.run(main)
