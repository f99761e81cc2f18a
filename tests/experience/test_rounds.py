"""Rounds of sampling: prompts, noise and verdicts of each, without a model."""

import dataclasses
import itertools

import numpy as np
import pytest

from luspo_jax.experience.rounds import Asker, rounds
from luspo_jax.experience.shaping import Shaping
from luspo_jax.metrics import StepMetrics
from tests.experience.experience_cases import FAILED, Judge, Sampler, prompt


@dataclasses.dataclass
class Stream:
    """Prompts of a data set that is as long as `ids`, over and over."""

    ids: tuple
    taken: int = 0

    def next_prompts(self, count):
        found = [prompt(self.ids[(self.taken + i) % len(self.ids)]) for i in range(count)]
        self.taken += count
        return found


def _asker(ids=(3, 5, 8, 9), judge=None, num_prompts=2):
    return Asker(
        stream=Stream(ids),
        sampler=Sampler(lambda prompt_id, sample: 1 + (prompt_id + sample) % 3),
        scorer=judge or Judge(lambda sample: float(sample.length > 1)),
        decode=lambda tokens: "y" * len(tokens),
        num_prompts=num_prompts,
        group_size=2,
        seed=17,
        shaping=Shaping(),
        metric="right",
    )


def _rounds(asker, count, metrics=None, step=4):
    return list(itertools.islice(rounds(asker, "weights", step, metrics or StepMetrics()), count))


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
    found = rounds(asker, "weights", 0, StepMetrics())
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
