"""Answers that make sympy hang, and labelled answers: what the pool is for."""

import os
import time

import psutil
import pytest

from luspo_jax.rewards import Sample, Scorer

HOSTILE = {
    "power tower": (r"\boxed{9^{9^{9^9}}}", "timeout"),
    "100 kB": (r"\boxed{" + "1+" * 50_000 + "1}", "unparsed"),
    "unbalanced": (r"\boxed{{{{" + r"\boxed{" * 20_000, "unparsed"),
    "zero width": (r"\boxed{" + "\u200b" * 50_000 + "5}", "unparsed"),
    "factorial": (r"\boxed{10000000!}", "ok"),  # compared with 42 without being computed
}
ORDINARY = [(r"so $\boxed{\frac{%d}{2}}$", "%d"), (r"thus $\boxed{x^%d+1}$", "1+x^%d")]


def _samples(count):
    pairs = (ORDINARY[n % 2] for n in range(count))
    return [Sample(r % (n % 40), g % (n % 40)) for n, (r, g) in enumerate(pairs)]


def _descendants():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def _score(scorer, samples):
    start = time.monotonic()
    rewards = scorer.score_batch(samples)
    return rewards, time.monotonic() - start


def test_hostile_answers_get_their_status():
    samples = [Sample(text, "42") for text, _ in HOSTILE.values()] + _samples(10)
    with Scorer({"boxed_math": 1.0}, workers=2, time_limit=1.0, max_failure_rate=1.0) as scorer:
        rewards, _ = _score(scorer, samples)
    statuses = [reward.status for reward in rewards]
    assert statuses == [status for _, status in HOSTILE.values()] + ["ok"] * 10
    assert [reward.value for reward in rewards[:5]] == [0.0] * 5
    assert [reward.value for reward in rewards[5:]] == [
        float(n in (0, 1, 3, 5, 7, 9)) for n in range(10)
    ]


@pytest.mark.slow
def test_a_large_batch_with_twenty_hostile_answers_is_done_in_time():
    """Needs an idle machine: limits are in processor time, the bound is by the clock."""
    workers, limit = min(2, len(os.sched_getaffinity(0))), 3.0
    before = _descendants()
    ordinary = _samples(1004)
    hostile = [Sample(text, "42") for text, _ in HOSTILE.values()] * 4
    mixed = [*ordinary[:500], *hostile, *ordinary[500:]]
    with Scorer(
        {"boxed_math": 1.0}, workers=workers, time_limit=limit, max_failure_rate=1.0
    ) as scorer:
        _score(scorer, _samples(8))
        expected, usual = _score(scorer, ordinary)
        rewards, elapsed = _score(scorer, mixed)
        started = _descendants() - before
    assert started
    assert not [pid for pid in started if psutil.pid_exists(pid)]
    assert len(rewards) == len(mixed) == 1024
    assert [r.value for r in [*rewards[:500], *rewards[520:]]] == [r.value for r in expected]
    assert [r.status for r in [*rewards[:500], *rewards[520:]]] == ["ok"] * 1004
    statuses = [status for _, status in HOSTILE.values()] * 4
    assert [reward.status for reward in rewards[500:520]] == statuses
    assert elapsed <= (-(-20 // workers) + 1) * limit + 1.5 * usual


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("gsm8k_openai", 5276),
        ("nemo_skills_pairs", 30),
        ("nemo_skills_samples", 145),
        ("math_verify_pairs", 260),
        ("olympiadbench", 36),
        ("rho_math500", 492),
    ],
)
def test_labelled_answers(shared_data, name, least):
    from experiments.score_oracles import agreement, score

    _, labels, rewards, _ = score(name, shared_data / "oracles")
    assert agreement(labels, rewards)["agree"] >= least
