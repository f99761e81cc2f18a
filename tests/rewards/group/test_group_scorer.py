"""Group rewards are added to those of responses, and leave out what has no verdict."""

import pytest

from luspo_jax.rewards import Reward, Sample
from luspo_jax.rewards.group import GroupRewardError, GroupScorer


def _samples(lengths):
    return [Sample("x", "!", n, 100) for n in lengths]


def _reward(value, status="ok"):
    return Reward(2.0 * value, status, {"right": float(value)})


def test_their_weighted_sum_is_added_and_kept_apart():
    """Kimi: ½ and −½, weight 2; linear: −0.25 · 1 · L / 30, weight −1."""
    scorer = GroupScorer({"kimi": 2.0, "linear": -1.0}, metric="right")
    found = scorer.add(_samples((10, 30)), [_reward(1), _reward(1)], [[1], [2]], {})
    assert [reward.parts["kimi"] for reward in found] == [0.5, -0.5]
    assert [reward.parts["linear"] for reward in found] == pytest.approx([-0.25 / 3, -0.25])
    lengths = [2 * 0.5 + 0.25 / 3, -2 * 0.5 + 0.25]
    assert [reward.length for reward in found] == pytest.approx(lengths, abs=1e-12)
    assert [reward.value for reward in found] == pytest.approx(
        [2 + each for each in lengths], abs=1e-12
    )
    assert [reward.value - reward.length for reward in found] == pytest.approx([2, 2])
    assert scorer.labels == {"group/kimi": "kimi@1", "group/linear": "linear@1"}


@pytest.mark.parametrize("status", ["timeout", "error"])
def test_responses_without_a_verdict_take_no_part(status):
    """Neither their length nor their being wrong changes the others' rewards."""
    scorer = GroupScorer({"kimi": 1.0, "linear": 1.0, "grlc": 1.0}, metric="right")
    judged = [_reward(1), _reward(0), _reward(1)]
    tokens = [[0]] * 5
    alone = scorer.add(_samples((10, 20, 30)), judged, tokens[:3], {})
    with_others = scorer.add(
        _samples((1, 10, 20, 99, 30)),
        [_reward(0, status), *judged[:2], _reward(0, status), judged[2]],
        tokens,
        {},
    )
    assert [with_others[i] for i in (1, 2, 4)] == alone
    for place in (0, 3):
        assert with_others[place].parts == {"right": 0.0, "kimi": 0.0, "linear": 0.0, "grlc": 0.0}
        assert (with_others[place].value, with_others[place].length) == (0.0, 0.0)
    nobody = scorer.add(_samples((1, 2)), [_reward(0, status)] * 2, tokens[:2], {})
    assert [reward.value for reward in nobody] == [0.0, 0.0]


def test_an_unparsed_response_is_wrong_and_takes_part():
    scorer = GroupScorer({"kimi": 1.0}, metric="right")
    found = scorer.add(_samples((10, 30)), [_reward(1), _reward(0, "unparsed")], [[1], [2]], {})
    assert [reward.parts["kimi"] for reward in found] == [0.5, -0.5]


def test_dual_variables_start_and_step_with_their_reward():
    options = {"leash": {"target": 50, "initial": 0.25, "rate": 1.0}}
    scorer = GroupScorer({"kimi": 1.0, "leash": 1.0}, options, metric="right")
    assert scorer.duals == {"leash": 0.25}
    assert scorer.stepped({"leash": 0.25}, [40, 80]) == {"leash": pytest.approx(0.45)}
    found = scorer.add(_samples((75, 75)), [_reward(1)] * 2, [[1], [2]], {"leash": 0.5})
    assert [reward.parts["leash"] for reward in found] == [-0.25, -0.25]  # 0.5 · (75 / 50 − 1)
    assert not GroupScorer()
    assert GroupScorer().duals == {}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("lengths[1:]", r"'mine' \(.*mine\.py:f@\w+\) gives 1 numbers for 2 judged responses"),
        ("[1.0, float('nan')]", r"'mine' .* gives nan, which is not finite"),
        ("['a', 1]", r"mine\.py:f' failed: ValueError"),
    ],
)
def test_wrong_numbers_name_the_function(tmp_path, body, message):
    path = tmp_path / "mine.py"
    path.write_text(f"def f(responses, lengths, rewards, right):\n    return {body}\n")
    scorer = GroupScorer({"mine": 1.0}, {"mine": {"function": f"{path}:f"}}, metric="right")
    with pytest.raises(GroupRewardError, match=message):
        scorer.add(_samples((1, 2)), [_reward(1), _reward(0)], [[1], [2]], {})
