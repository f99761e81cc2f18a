"""A user's own group reward."""

import pytest

from luspo_jax.rewards.group import GroupRewardError, group_reward
from tests.rewards.group.group_cases import peers

_SOURCE = """
def ranks(responses, lengths, rewards, right, max_length, metas):
    assert responses == ["x" * n for n in lengths] and metas == [{"target_length": 9}] * 3
    return [-sum(n > m for m in lengths) + 10 * ok + value + max_length for n, ok, value in
            zip(lengths, right, rewards)]

def plain(responses, lengths, rewards, right):
    return lengths

def too_few(responses, lengths, rewards, right):
    return lengths[1:]

def fails(responses, lengths, rewards, right):
    raise KeyError("colour")

def other(responses, widths):
    return widths
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(_SOURCE)
    return path


def test_it_gets_what_it_names_and_is_known_by_its_source(file):
    made = group_reward("mine", {"function": f"{file}:ranks"})
    found = made.score(peers((5, 9, 7), (1, 0, 0), [1.0, 0.5, 0.0], target=9))
    assert found == [0 + 10 + 1 + 100, -2 + 0.5 + 100, -1 + 100]
    assert made.score is not group_reward(f"{file}:plain").score
    assert len(made.version) == 12
    file.write_text(_SOURCE + "\n")
    assert group_reward(f"{file}:ranks").version != made.version


def test_what_it_raises_names_it(file):
    made = group_reward("mine", {"function": f"{file}:fails"})
    with pytest.raises(GroupRewardError, match=r"mine\.py:fails' failed: KeyError: 'colour'"):
        made.score(peers((5,), (1,)))


def test_a_function_that_cannot_be_called_so_is_refused(file):
    with pytest.raises(ValueError, match=r"takes \(responses, widths\) and is called with"):
        group_reward("mine", {"function": f"{file}:other"})
