"""Groups and rollouts: columns of their responses, and verdicts that make groups of responses."""

import dataclasses

import numpy as np
import pytest

from luspo_jax.experience.groups import Rollouts, compared, judged
from luspo_jax.rewards.group import GroupScorer
from tests.experience.experience_cases import FAILED, Judge, prompt, sampled
from tests.experience.experience_cases import group as _group


def _rollouts():
    """Groups of two and three; one response's last token and one whole response are older."""
    groups = [
        _group(3, [2, 0], [2, 3], version=5),
        _group(9, [1, FAILED, 4], [1, 2, 4], version=5),
    ]
    versions = [
        np.array([5, 5], np.uint32),
        np.array([4, 4, 5], np.uint32),
        np.array([4], np.uint32),
        np.array([5, 5], np.uint32),
        np.array([5, 5, 5, 5], np.uint32),
    ]
    trained = [np.ones(2, bool), np.array([False, False, True]), np.zeros(1, bool)]
    trained += [np.zeros(2, bool), np.ones(4, bool)]
    return Rollouts(groups, 5).enriched(versions=versions, trained=trained)


def test_columns_are_response_by_response_over_groups_of_unequal_size():
    rollouts = _rollouts()
    assert rollouts.column("sample_id") == [0, 1, 0, 1, 2]
    assert [prompt.prompt_id for prompt in rollouts.prompts] == [3, 3, 9, 9, 9]
    assert len(rollouts.responses) == 5
    for found, expected, kind in (
        (rollouts.rewards_B, [2, 0, 1, 0, 4], np.float32),
        (rollouts.lengths_B, [2, 3, 1, 2, 4], np.int32),
        (rollouts.group_ids_B, [0, 0, 1, 1, 1], np.int32),
        (rollouts.judged_B, [1, 1, 1, 0, 1], bool),
        (rollouts.counted_B, [1, 1, 1, 0, 1], bool),
    ):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == kind


def test_a_response_is_fresh_by_all_of_its_tokens_and_trained_by_any():
    rollouts = _rollouts()
    np.testing.assert_array_equal(rollouts.fresh_B, [True, False, False, True, True])
    np.testing.assert_array_equal(rollouts.trained_B, [True, True, False, False, True])
    later = Rollouts(rollouts.groups, 6)
    assert not later.fresh_B.any()


def test_what_is_added_lands_at_its_response_and_leaves_the_rest():
    before = _rollouts()
    after = before.enriched(advantage=[0.0, 1.0, 2.0, 3.0, 4.0], text=list("abcde"))
    np.testing.assert_array_equal(after.advantages_B, np.arange(5, dtype=np.float32))
    assert after.advantages_B.dtype == np.float32
    assert [group.column("text") for group in after.groups] == [["a", "b"], ["c", "d", "e"]]
    assert after.version == before.version
    assert before.column("advantage") == [None] * 5
    for name in ("tokens", "logprobs", "versions", "trained", "reward"):
        for new, old in zip(after.column(name), before.column(name), strict=True):
            assert new is old


@pytest.mark.parametrize("values", [[0.0] * 4, [0.0] * 6])
def test_a_column_of_another_length_is_refused(values):
    with pytest.raises(ValueError, match="argument"):
        _rollouts().enriched(advantage=values)


def test_a_part_of_the_reward_is_read_by_name():
    group = _group(0, [2, 0])
    np.testing.assert_array_equal(group.values(), [2, 0])
    np.testing.assert_array_equal(group.values("right"), [1, 0])


# --- verdicts ----------------------------------------------------------------------------------


def _judged(prompts, responses, judge):
    settings = {"scorer": judge, "decode": lambda tokens: "y" * len(tokens), "max_length": 7}
    return judged(prompts, responses, **settings)


def test_verdicts_make_groups_prompt_by_prompt():
    prompts = [prompt(5), prompt(2, text="<think>")]
    responses = [sampled(p.prompt_id, s, length=1 + s) for p in prompts for s in range(2)]
    judge = Judge(lambda sample: float(sample.length))
    groups = _judged(prompts, responses, judge)
    assert [group.prompt for group in groups] == prompts
    assert [group.column("prompt_id") for group in groups] == [[5, 5], [2, 2]]
    assert [group.column("text") for group in groups] == [["y", "yy"]] * 2
    np.testing.assert_array_equal(groups[1].values(), [1, 2])
    for response in (r for group in groups for r in group.responses):
        assert response.counted is True
        size = len(response.tokens)
        np.testing.assert_array_equal(response.trained, np.ones(size, bool))
        assert response.trained.dtype == bool
    # What a verifier reads: an opening on which the prompt ends belongs to the response.
    assert [sample.response for sample in judge.samples] == ["y", "yy", "<think>y", "<think>yy"]
    assert {(s.answer, s.max_length, s.problem) for s in judge.samples} == {("!", 7, "?")}
    assert all(sample.meta == {"level": 3} for sample in judge.samples)


def test_a_response_without_a_verdict_neither_counts_nor_carries_gradient():
    responses = [sampled(0, s, length=2) for s in range(2)]
    judge = Judge(lambda sample: FAILED if len(judge.samples) == 2 else 1.0)
    (group,) = _judged([prompt(0)], responses, judge)
    np.testing.assert_array_equal(group.counted, [True, False])
    np.testing.assert_array_equal(group.judged, [True, False])
    np.testing.assert_array_equal(np.stack(group.column("trained")), [[True] * 2, [False] * 2])


def test_a_process_without_a_share_judges_nothing():
    assert _judged([], [], Judge(lambda sample: 1.0)) == []


def test_what_the_sampler_said_is_kept():
    ids = np.zeros((2, 1, 1), np.uint8)
    response = dataclasses.replace(sampled(0, 0, length=2), expert_ids=ids, prompt_expert_ids=ids)
    (group,) = _judged([prompt(0)], [response], Judge(lambda sample: 1.0))
    (found,) = group.responses
    for name in ("tokens", "logprobs", "stopped", "expert_ids", "prompt_expert_ids"):
        assert getattr(found, name) is getattr(response, name)


# --- rewards of the group ------------------------------------------------------------------------


def test_rewards_of_the_group_are_added_to_its_own():
    """Kimi, of lengths 2, 4 and 3: ½ for the first; 0 for the last, ½ − ½; none for a failure."""
    judge = Judge(lambda sample: FAILED if sample.length == 4 else 1.0)
    responses = [sampled(0, s, length=n) for s, n in enumerate((2, 4, 3))]
    (group,) = _judged([prompt(0)], responses, judge)
    scorer = GroupScorer({"kimi": 1.0}, metric="right")
    found = compared(group, scorer, max_length=7, duals={})
    np.testing.assert_array_equal(found.values(), [1.5, 0, 0.5])
    assert [reward.length for reward in found.column("reward")] == [0.5, 0, -0.5]
    assert compared(group, GroupScorer(), max_length=7, duals={}) is group


def test_a_reward_of_the_group_sees_what_a_verifier_does(tmp_path):
    """The response with the prompt's opening, the limit, the problem's data, the token ids."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def f(responses, lengths, rewards, right, max_length, metas, answers, tokens):\n"
        "    assert responses == ['<think>y', '<think>yy'] and lengths == [1, 2]\n"
        "    assert rewards == [0.25, 1.0] and right == [True, True] and max_length == 7\n"
        "    assert metas == [{'level': 3}] * 2 and answers == ['!', '!']\n"
        "    assert tokens == [[0], [0, 1]]\n"
        "    return [3, 4]\n"
    )
    judge = Judge(lambda sample: sample.length**2 / 4)
    responses = [sampled(0, s, length=1 + s) for s in range(2)]
    (group,) = _judged([prompt(0, text="<think>")], responses, judge)
    scorer = GroupScorer({"f": 1.0}, {"f": {"function": f"{path}:f"}}, metric="right")
    found = compared(group, scorer, max_length=7, duals={})
    assert [reward.parts["f"] for reward in found.column("reward")] == [3, 4]
