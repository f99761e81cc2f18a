"""Held-out problems: what is asked, what is kept, and accuracies by hand."""

import dataclasses
import math

import numpy as np
import pytest

from luspo_jax.experience import held_out
from luspo_jax.hosts import processes
from luspo_jax.metrics import declared
from tests.experience.experience_cases import FAILED, LATE, Judge, Sampler, prompt
from tests.experience.experience_cases import group as _group

# Rewards 2, 1 and none; 0, none and none; 3, 3, 3: six judged of nine, two groups to compare.
GROUPS = [
    _group(0, [2, 1, FAILED], [2, 4, 100]),
    _group(1, [0, LATE, FAILED], [8, 100, 100]),
    _group(2, [3] * 3, [1, 3, 5]),
]


def test_accuracy_is_the_mean_over_problems_of_the_judged_share():
    measured = held_out.summarize(GROUPS, metric="right")
    assert measured.accuracy == pytest.approx((2 / 2 + 0 / 1 + 3 / 3) / 3)
    assert measured.accuracy_ci95[0] < measured.accuracy <= measured.accuracy_ci95[1]
    assert (measured.unjudged, measured.num_problems) == (3, 3)
    assert "3 responses without a verdict" in str(measured)
    # Judged ones by length: {2, 4}, {8} and {1, 3, 5}: shortest 2, 8, 1; middle 4, 3; longest 5.
    assert measured.accuracy_by_third == pytest.approx((2 / 3, 1.0, 1.0))


def test_a_problem_without_any_verdict_is_left_out_of_the_accuracy():
    groups = [GROUPS[0], _group(1, [FAILED] * 3, [1] * 3)]
    assert held_out.summarize(groups, metric="right").accuracy == 1.0
    nothing = held_out.summarize(groups[1:], metric="right")
    assert math.isnan(nothing.accuracy)
    assert nothing.unjudged == 3


def test_values_go_by_the_last_part_of_their_metric():
    groups = [_group(0, [1, 0], [2, 6], stopped=[True, False]), _group(1, [1, 1], [4, 4])]
    measured = held_out.summarize(groups, metric="right")
    low, high = measured.accuracy_ci95
    assert measured.metrics == {
        "acc/mean@2": 0.75,
        "acc/ci95_low": low,
        "acc/ci95_high": high,
        "response_length/mean": 4.0,
        "response_length/clip_ratio": 0.25,
        "unjudged": 0,
        "completed": 0.75,
        "tokens_per_right": 16 / 3,
    }


def test_completed_and_tokens_per_right_are_of_judged_responses():
    groups = [
        _group(0, [1, 1, FAILED], [2, 6, 100], stopped=[True, False, False]),
        _group(1, [0, LATE, FAILED], [8, 100, 100]),
        _group(2, [3, 3, 0], [1, 3, 5]),
    ]
    measured = held_out.summarize(groups, metric="right")
    assert measured.completed == pytest.approx((1 / 2 + 0 / 1 + 2 / 3) / 3)
    assert measured.tokens_per_right == pytest.approx((2 + 6 + 8 + 1 + 3 + 5) / 4)
    nothing = held_out.summarize([_group(1, [0, FAILED], [8, 9])], metric="right")
    assert (nothing.completed, nothing.tokens_per_right) == (0.0, math.inf)


# --- budgets -----------------------------------------------------------------------------------


def _under(groups, budgets, judge):
    decode = {"decode": lambda tokens: "x" * len(tokens)}
    return held_out.under_budgets(groups, budgets, judge, max_length=100, metric="right", **decode)


def test_longer_responses_are_judged_again_under_a_budget():
    """Here a cut is right from three tokens on. Without a verdict it does not count."""

    def verdict(sample):
        return FAILED if sample.length == 6 else float(len(sample.response) >= 3)

    judge = Judge(verdict)
    groups = [_group(0, [1, FAILED, 1], [2, 9, 7]), _group(1, [0, 0, 0], [1, 8, 4])]
    got = _under(groups, (2, 3, 6, 9), judge)
    assert got == {
        "budget/2/acc": (1 / 3 + 0) / 2,
        "budget/3/acc": (3 / 3 + 2 / 3) / 2,
        "budget/6/acc": (1 / 1 + 0 / 2) / 2,
        "budget/9/acc": (2 / 2 + 0) / 2,
        "budget/area": pytest.approx(
            np.trapezoid([1 / 6, 5 / 6, 0.5, 0.5], np.log2([2, 3, 6, 9])) / np.log2(4.5)
        ),
    }
    assert got["budget/9/acc"] == held_out.summarize(groups, metric="right").accuracy
    assert all(declared(f"val-aux/toy/{name}").reducer == "last" for name in got)
    asked = sorted((s.length, s.max_length, s.answer, s.problem) for s in judge.samples)
    assert asked == [(b, 100, "!", "?") for b in (2, 2, 2, 2, 3, 3, 3, 3, 6, 6, 6)]
    assert {tuple(s.meta.items()) for s in judge.samples} == {(("level", 3),)}


def test_processes_judge_their_shares(monkeypatch):
    """Put together, the cuts that two processes judge are those that one judges."""
    groups = [_group(i, [1, 0, 1], [2 + i, 9, 5]) for i in range(5)]

    def verdict(sample):
        return float((sample.length + len(sample.response)) % 3 == 0)

    whole = _under(groups, (3, 4, 8), Judge(verdict))
    monkeypatch.setattr(processes, "members", lambda: (0, 1))
    parts, judges = [], [Judge(verdict), Judge(verdict)]
    for index, judge in enumerate(judges):
        monkeypatch.setattr(processes.jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(processes, "gather", lambda value: parts.append(value) or [value])
        _under(groups, (3, 4, 8), judge)
    assert [len(part) for part in parts] == [3, 2]
    assert all(judge.samples for judge in judges)
    monkeypatch.setattr(processes, "gather", lambda value: parts)
    assert _under(groups, (3, 4, 8), Judge(verdict)) == whole


def test_without_budgets_nothing_is_judged_again():
    assert _under(GROUPS, (), None) == {}
    assert held_out.summarize(GROUPS, metric="right").under_budgets == {}


def test_the_opening_of_a_prompt_is_judged_with_the_cut():
    judge, group = Judge(lambda sample: 0.0), _group(0, [1, 1], [4, 2])
    asked = dataclasses.replace(group.prompt, text="why? <think>")
    _under([dataclasses.replace(group, prompt=asked)], (3,), judge)
    assert [s.response for s in judge.samples] == ["<think>xxx"]


# --- asking ------------------------------------------------------------------------------------


def _ask(sampler, prompts, judge, **options):
    settings = {"decode": lambda tokens: "y" * len(tokens), "num_samples": 3, "seed": 8}
    return held_out.ask(sampler, "weights", prompts, judge, **settings, **options)


def test_the_noise_is_of_the_seed_the_prompt_and_the_sample_only():
    """Two policies face the same draws, at whatever step each is asked."""
    prompts, sampler = [prompt(4), prompt(1)], Sampler(lambda prompt_id, sample: 1 + sample)
    groups = _ask(sampler, prompts, Judge(lambda sample: float(sample.length > 2)))
    (call,) = sampler.calls
    assert (call.params, call.group_size, call.seed, call.step) == ("weights", 3, 8, 0)
    assert [request.prompt_id for request in call.requests] == [4, 1]
    assert [group.prompt for group in groups] == prompts
    assert [group.column("sample_id") for group in groups] == [[0, 1, 2]] * 2
    np.testing.assert_array_equal(groups[0].values(), [0, 0, 1])


def test_progress_is_told_and_the_longest_length_is_the_samplers():
    told, judge = [], Judge(lambda sample: 1.0)
    sampler = Sampler(lambda prompt_id, sample: 2)
    _ask(sampler, [prompt(0)], judge, progress=lambda *counts: told.append(counts))
    assert told == [(3, 3)]
    assert {sample.max_length for sample in judge.samples} == {sampler.sampling.max_response_length}


def test_without_a_prompt_nothing_is_sampled():
    sampler = Sampler(lambda prompt_id, sample: 1)
    assert _ask(sampler, [], Judge(lambda sample: 1.0)) == []
    assert sampler.calls == []


def test_every_response_is_kept_with_its_verdict():
    groups = [_group(4, [2, FAILED], [2, 3], stopped=[True, False]), _group(6, [0, 1], [1, 1])]
    found = held_out.kept(groups, "sums", ["right@1"])
    assert [(r.problem_id, r.sample_id) for r in found] == [(4, 0), (4, 1), (6, 0), (6, 1)]
    assert [r.verdict for r in found] == [r.reward for g in groups for r in g.responses]
    assert [r.response for r in found] == ["xx", "xxx", "x", "x"]
    assert [r.tokens for r in found][:2] == [[0, 1], [0, 1, 2]]
    assert [r.length for r in found] == [2, 3, 1, 1]
    assert [r.truncated for r in found] == [False, True, False, False]
    for record in found:
        assert (record.benchmark, record.scorers) == ("sums", ["right@1"])
        assert (record.prompt, record.problem, record.answer) == ("?", "?", "!")
        assert record.meta == {"level": 3}
