"""Rounds of sampling: prompts, noise and verdicts of each, without a model."""

import dataclasses
import itertools
import warnings

import numpy as np
import pytest

from luspo_jax.experience.groups import Waiting
from luspo_jax.experience.rounds import (
    Asker,
    Flight,
    Policy,
    chosen,
    collect,
    enough,
    rounds,
)
from luspo_jax.experience.shaping import Shaping
from luspo_jax.metrics import StepMetrics
from luspo_jax.rewards.group import GroupScorer
from tests.experience.experience_cases import FAILED, Judge, Sampler, prompt


@dataclasses.dataclass
class Stream:
    """Prompts of a data set that is as long as `ids`, over and over."""

    ids: tuple
    taken: int = 0
    metrics: dict = dataclasses.field(default_factory=dict)

    def next_prompts(self, count):
        found = [prompt(self.ids[(self.taken + i) % len(self.ids)]) for i in range(count)]
        self.taken += count
        return found


def _asker(ids=(3, 5, 8, 9), judge=None, num_prompts=2, length=None, **pace):
    return Asker(
        stream=Stream(ids),
        sampler=Sampler(length or (lambda prompt_id, sample: 1 + (prompt_id + sample) % 3)),
        scorer=judge or Judge(lambda sample: float(sample.length > 1)),
        decode=lambda tokens: "y" * len(tokens),
        num_prompts=num_prompts,
        group_size=2,
        seed=17,
        shaping=Shaping(),
        metric="right",
        **pace,
    )


def _rounds(asker, count, metrics=None, step=4):
    found = rounds(asker, Policy("weights", step), Flight([]), step, metrics or StepMetrics())
    return list(itertools.islice(found, count))


def test_each_round_brings_new_prompts_with_judged_responses():
    asker = _asker()
    first, second = _rounds(asker, 2)
    assert [group.prompt.prompt_id for group in first + second] == [3, 5, 8, 9]
    for group in first + second:
        assert group.column("sample_id") == [0, 1]
        lengths = 1 + (group.prompt.prompt_id + np.arange(2)) % 3
        np.testing.assert_array_equal(group.lengths, lengths)
        np.testing.assert_array_equal(group.values(), lengths > 1)
        for response in group.responses:
            np.testing.assert_array_equal(response.versions, np.full(len(response.tokens), 4))
            assert response.trained.all()
            assert response.text == "y" * len(response.tokens)
    for call in asker.sampler.calls:
        assert (call.params, call.group_size, call.seed, call.step) == ("weights", 2, 17, 4)


def test_nothing_is_sampled_before_it_is_asked_for():
    """A round costs a rollout: a generator that is not read takes no prompt."""
    asker = _asker()
    found = rounds(asker, Policy("weights", 0), Flight([]), 0, StepMetrics())
    assert (asker.stream.taken, asker.sampler.calls) == (0, [])
    next(found)
    assert (asker.stream.taken, len(asker.sampler.calls)) == (2, 1)


def test_a_prompt_that_comes_twice_in_a_step_has_other_noise():
    """In one round and over rounds; the group is still the prompt's own."""
    asker = _asker(ids=(3, 7, 3), num_prompts=3)
    groups = [group for found in _rounds(asker, 2) for group in found]
    asked = [request.prompt_id for call in asker.sampler.calls for request in call.requests]
    assert asked[:3] == [3, 7, 3 + 8]
    assert len(set(asked)) == len(asked)
    assert [group.prompt.prompt_id for group in groups] == [3, 7, 3] * 2
    # The next step starts anew: its noise differs by the step.
    _rounds(asker, 1, step=5)
    assert [request.prompt_id for request in asker.sampler.calls[-1].requests] == asked[:3]


def test_a_failed_verdict_comes_through():
    judge = Judge(lambda sample: FAILED if sample.length == 1 else 1.0)
    for group in _rounds(_asker(judge=judge), 2)[1]:
        np.testing.assert_array_equal(group.counted, group.lengths > 1)
        assert [mask.all() for mask in group.column("trained")] == group.counted.tolist()


def test_what_sampling_cost_adds_up_over_rounds():
    metrics = StepMetrics()
    groups = [group for found in _rounds(_asker(), 3, metrics) for group in found]
    found = metrics.result()
    tokens = sum(int(group.lengths.sum()) for group in groups)
    assert found["rollout/generated_tokens"] == tokens
    assert found["rollout/decode_steps"] == 3 * 10
    assert found["rollout/slot_utilisation"] == pytest.approx(0.5)
    assert {"timing_s/gen", "timing_s/reward"} <= found.keys()


# --- responses that go on in later steps ---------------------------------------------------------


def _steps(asker, count):
    """The batches of some steps with their metrics, and what waits after the last."""
    waiting, batches = Waiting(), []
    for step in range(count):
        metrics = StepMetrics()
        rollouts, waiting = collect(asker, Policy(f"weights {step}", step), waiting, step, metrics)
        batches.append((rollouts.groups, metrics.result()))
    return batches, waiting


def _tails(seed):
    """Most responses are short, some are very long."""
    rng = np.random.default_rng(seed)
    lengths = np.ceil(5 * np.exp(1.2 * rng.normal(size=(1000, 2)))).astype(int)
    return lambda prompt_id, sample: int(lengths[prompt_id % 1000, sample])


@pytest.mark.parametrize(("overlap", "max_age"), [(1, 1), (3, 1), (3, 2), (6, 2), (5, 7)])
def test_every_batch_is_full_no_group_is_old_and_none_is_lost(overlap, max_age):
    pace = {"overlap": overlap, "max_age": max_age}
    asker = _asker(range(1000), num_prompts=3, length=_tails(overlap), **pace)
    batches, waiting = _steps(asker, 60)
    taken = []
    for step, (groups, metrics) in enumerate(batches):
        assert len(groups) == 3
        ages = [step - group.step for group in groups]
        assert max(ages) <= max_age
        assert metrics["rollout/age/max"] == max(ages)
        assert metrics["rollout/in_flight/groups"] == overlap
        for group in groups:
            assert group.ended
            for response in group.responses:
                assert len(response.tokens) == asker.sampler.length(
                    response.prompt_id, response.sample_id
                )
                versions = response.versions.astype(int)
                assert (np.diff(versions) >= 0).all()
                assert group.step <= versions[0] <= versions[-1] <= step
                assert response.reward is not None
        taken += [group.prompt.prompt_id for group in groups]
    left = [group.prompt.prompt_id for group in waiting.begun]
    assert all(group.responses[0].reward is None for group in waiting.begun)
    assert sorted(taken + left) == list(range(60 * 3 + overlap))  # each once, none given up
    mixed = [len(set(r.versions)) for groups, _ in batches for g in groups for r in g.responses]
    assert max(mixed) > 1


def test_a_step_waits_for_the_longest_response_only_when_it_is_due():
    """Prompt 0 is very long: the first steps go on without it, and the step in which it is due
    does not."""
    asker = _asker(
        range(1000),
        num_prompts=2,
        length=lambda prompt_id, sample: 500 if (prompt_id, sample) == (0, 0) else 3,
        overlap=2,
        max_age=2,
    )
    batches, _ = _steps(asker, 4)
    ids = [[group.prompt.prompt_id for group in groups] for groups, _ in batches]
    assert ids == [[1, 2], [3, 4], [0, 5], [6, 7]]
    generated = [metrics["rollout/generated_tokens"] for _, metrics in batches]
    assert generated[0] < 30
    assert generated[2] > 480


def test_without_overlap_a_step_is_one_call_that_is_not_stopped():
    batches, waiting = _steps(_asker(range(9)), 3)
    assert (waiting.surplus, waiting.begun) == ([], [])
    assert [group.step for groups, _ in batches for group in groups] == [0, 0, 1, 1, 2, 2]
    for _, metrics in batches:
        assert not any(name.startswith(("rollout/age", "rollout/in_flight")) for name in metrics)


def test_a_round_ends_exactly_when_the_oldest_can_still_be_taken():
    """Against playing the later rounds, which may complete what they like, to the end."""

    def in_time(left, num_groups):
        """Whether rounds that each take the most urgent take all; `left` has steps that remain."""
        rest, now = sorted(left), 1  # the first of these rounds is one step later
        while rest:
            if rest[0] < now:
                return False
            rest, now = rest[num_groups:], now + 1
        return True

    rng, seen = np.random.default_rng(0), set()
    for _ in range(3000):
        num_groups, max_age = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        count = int(rng.integers(num_groups, num_groups * (max_age + 1) + 1))
        ages = rng.integers(0, max_age + 1, count)
        left = max_age - ages
        # Only states that earlier rounds may have left.
        if any((left <= n).sum() > (n + 1) * num_groups for n in range(max_age)):
            continue
        ended = rng.random(count) < 0.7
        found = enough(ended, ages, num_groups=num_groups, max_age=max_age)
        expected = ended.sum() >= num_groups
        if expected:
            taken = np.array(chosen(ended, (-ages).tolist(), num_groups))
            assert taken.sum() == num_groups
            assert (ended | ~taken).all()
            expected = in_time(left[~taken], num_groups)
        assert found == expected
        seen.add(bool(found))
    assert seen == {True, False}


def test_dropping_what_is_late_keeps_the_short_and_waiting_does_not():
    """The same lengths, handled both ways; the account tells of it."""
    drawn = _tails(3)
    mean = np.mean([drawn(i, sample) for i in range(120) for sample in range(2)])
    pace = {"num_prompts": 3, "length": drawn, "overlap": 3}
    means, flags = {}, {}
    for late, max_age in (("wait", 2), ("drop", 0)):
        asker = _asker(range(1000), late=late, max_age=max_age, **pace)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            batches, waiting = _steps(asker, 40)
        means[late] = np.mean([g.lengths.mean() for groups, _ in batches for g in groups])
        flags[late] = [metrics["length/account/flag"] for _, metrics in batches]
        dropped = [metrics["rollout/dropped/groups"] for _, metrics in batches]
        if late == "drop":
            assert dropped == [3] * 40
            assert waiting.begun == []
            assert all(step == g.step for step, (groups, _) in enumerate(batches) for g in groups)
            assert len(warned) == 1
        else:
            assert sum(dropped) == len(warned) == 0
    assert abs(means["wait"] / mean - 1) < 0.15
    assert means["drop"] < 0.6 * mean
    assert max(flags["wait"]) == 0
    assert flags["drop"][-1] == 1


# --- the shortest first --------------------------------------------------------------------------


def _takes(left, num_groups):
    """Whether later rounds, which may complete what they like, take all in time."""
    rest, now = sorted(left), 1
    while rest:
        if rest[0] < now:
            return False
        rest, now = rest[num_groups:], now + 1
    return True


def test_the_shortest_are_taken_of_those_that_leave_the_others_in_time():
    """Against all choices, each played out: none has a smaller sum of lengths."""
    rng, seen = np.random.default_rng(1), 0
    for _ in range(1500):
        num_groups, max_age = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        count = int(rng.integers(num_groups, num_groups * (max_age + 1) + 1))
        ages = rng.integers(0, max_age + 1, count)
        left = max_age - ages
        if any((left <= n).sum() > (n + 1) * num_groups for n in range(max_age)):
            continue
        ended = rng.random(count) < 0.8
        if not enough(ended, ages, num_groups=num_groups, max_age=max_age):
            continue
        lengths = rng.permutation(count).astype(float)
        found = chosen(
            ended.tolist(), (-ages).tolist(), num_groups, lengths=lengths, last_step=-max_age
        )
        choices = [
            set(places)
            for places in itertools.combinations(np.flatnonzero(ended).tolist(), num_groups)
            if _takes([left[i] for i in range(count) if i not in places], num_groups)
        ]
        least = min(choices, key=lambda places: sum(lengths[i] for i in places))
        assert sum(lengths[i] for i in np.flatnonzero(found)) == sum(lengths[i] for i in least)
        assert set(np.flatnonzero(found).tolist()) in choices
        seen += len(choices) > 1
    assert seen > 100


@pytest.mark.parametrize(("overlap", "max_age"), [(1, 1), (3, 2), (6, 2), (5, 7)])
def test_the_shortest_first_lets_no_group_grow_old_and_loses_none(overlap, max_age):
    taken = {}
    for order in ("begun", "shortest"):
        pace = {"overlap": overlap, "max_age": max_age, "order": order}
        asker = _asker(range(1000), num_prompts=3, length=_tails(overlap), **pace)
        batches, waiting = _steps(asker, 60)
        assert all(len(groups) == 3 for groups, _ in batches)
        assert max(metrics["rollout/age/max"] for _, metrics in batches) <= max_age
        taken[order] = [group.prompt.prompt_id for groups, _ in batches for group in groups]
        left = [group.prompt.prompt_id for group in waiting.begun]
        assert sorted(taken[order] + left) == list(range(60 * 3 + overlap))
        assert "length/account/flag" in batches[-1][1]
    # While a round waits for what is due, more than it takes become complete. There is no choice if
    # as many are in flight as can be taken in time.
    assert (taken["shortest"] == taken["begun"]) == (overlap == 3 * max_age)


def test_the_shortest_of_the_complete_are_taken_if_age_does_not_matter():
    taken = chosen([True] * 4, [0, 0, 1, 1], 2, lengths=[5.0, 3.0, 4.0, 3.0])
    assert taken == [False, True, False, True]
    # The first two are due: whatever their lengths.
    taken = chosen([True] * 4, [0, 0, 1, 1], 2, lengths=[5.0, 3.0, 4.0, 3.0], last_step=0)
    assert taken == [True, True, False, False]


# --- rewards of groups, and outliers -------------------------------------------------------------


def _leash(**options):
    return GroupScorer({"leash": 1.0}, {"leash": {"target": 2, **options}}, metric="right")


def test_a_dual_variable_is_the_same_in_a_step_and_moves_with_its_batch():
    """Every response has 3 tokens for a target of 2: excess ½, so λ rises by rate · ½ a step."""
    compare = _leash(initial=0.25, rate=0.5)
    asker = _asker(length=lambda prompt_id, sample: 3, compare=compare)
    batches, waiting = _steps(asker, 3)
    for step, (groups, metrics) in enumerate(batches):
        dual = 0.25 + 0.25 * step
        assert metrics["length/dual/leash"] == dual
        for reward in (r for g in groups for r in g.column("reward")):
            assert reward.parts == {"right": 1.0, "leash": pytest.approx(-dual / 2)}
            assert reward.value == pytest.approx(1 - dual / 2)
    assert waiting.duals == {"leash": 1.0}
    plain, waiting = _steps(_asker(), 1)
    assert waiting.duals == {}
    assert not any(name.startswith("length/dual") for name in plain[0][1])


def test_a_dual_variable_does_not_step_with_what_no_batch_takes():
    compare = _leash(initial=0.25, rate=0.5)
    pace = {"overlap": 2, "max_age": 2}
    asker = _asker(range(99), length=_tails(5), compare=compare, **pace)
    batches, waiting = _steps(asker, 4)
    dual = 0.25
    for groups, metrics in batches:
        assert metrics["length/dual/leash"] == pytest.approx(dual)
        mean = np.mean([n for group in groups for n in group.lengths])
        dual = min(1.0, max(0.0, dual + 0.5 * (mean / 2 - 1)))
    assert waiting.duals["leash"] == pytest.approx(dual)


def test_outliers_are_cut_before_anything_is_selected_and_accounted_for_as_sampled():
    """Lengths 2 and 8 of two right responses: mean 5, deviation 3, cut at ⌊5 + ½ · 3⌋ = 6."""
    judge = Judge(lambda sample: float(sample.length in (2, 8)))
    asker = dataclasses.replace(
        _asker(judge=judge, length=lambda prompt_id, sample: 2 + 6 * sample),
        shaping=Shaping(dot=True, dot_margin=2, dot_deviations=0.5),
        compare=GroupScorer({"linear": 1.0}, metric="right"),
    )
    batches, _ = _steps(asker, 2)
    for groups, metrics in batches:
        assert metrics["shaping/tokens_cut"] == 2 * 2
        for group in groups:
            assert group.lengths.tolist() == [2, 6]
            assert group.column("stopped") == [True, False]
            assert [len(mask) for mask in group.column("trained")] == [2, 6]
            np.testing.assert_array_equal(group.values("right"), [1, 0])
            # ¼ · ½ · L / 6: of the group as it is trained on.
            np.testing.assert_allclose(group.values("linear"), [-1 / 24, -1 / 8], rtol=1e-6)
        assert metrics["length/account/finished/mean"] == 5.0
        assert metrics["length/account/consumed/mean"] == 4.0
    asker = dataclasses.replace(asker, shaping=Shaping(dot=True, dot_margin=3, dot_deviations=0.5))
    (groups, metrics), *_ = _steps(asker, 1)[0]
    assert metrics["shaping/tokens_cut"] == 0
    assert [group.lengths.tolist() for group in groups] == [[2, 8]] * 2
