"""Group rewards by name: options, labels, and what holds for all of them."""

import numpy as np
import pytest

from luspo_jax.rewards.group import GROUP_REWARDS, group_reward
from tests.rewards.group.group_cases import peers

NEEDED = {
    "laser": {"target": 40},
    "laser_d": {"easy": 30, "medium": 40, "hard": 50},
    "leash": {"target": 30},
}


@pytest.mark.parametrize("name", GROUP_REWARDS)
def test_each_has_a_label_and_says_what_it_computes(name):
    made = group_reward(name, NEEDED.get(name))
    assert made.label == f"{name}@{made.version}"
    assert GROUP_REWARDS[name].__doc__.startswith("Returns ")


@pytest.mark.parametrize("name", GROUP_REWARDS)
def test_the_order_of_responses_changes_no_bit(name):
    made = group_reward(name, NEEDED.get(name))
    rng = np.random.default_rng(len(name))
    for _ in range(20):
        lengths = rng.integers(10, 100, 7)
        values = rng.normal(size=7)
        order = rng.permutation(7)
        found, moved = (
            made.score(
                peers(
                    lengths[i].tolist(), values[i] > 0, values[i].tolist(),
                    target=60, duals={"leash": 0.3}
                )
            )
            for i in (np.arange(7), order)
        )  # fmt: skip
        assert [found[i] for i in order] == moved
        assert len(found) == 7
        assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kimmi", {}, "unknown group reward 'kimmi': did you mean 'kimi'"),
        ("kimi", {"beta": 1}, r"group reward 'kimi': .*\(options: none\)"),
        ("alp", {"bta": 1}, r"group reward 'alp': .*\(options: beta, floor\)"),
        ("alp", {"beta": -1}, "'alp': beta=-1 must be at least 0"),
        ("gr3", {"alpha": "1"}, "'gr3': alpha='1' must be a number"),
        ("grlc", {"top": 1.5}, "'grlc': top=1.5 must be at least 0 and at most 1"),
        ("laser", {}, r"'target' \(options: target, alpha\)"),
        ("laser_d", {"easy": 0, "medium": 1, "hard": 1}, "easy=0 must be at least 1"),
        ("leash", {"target": 5, "initial": 2.0}, r"initial=2.0 is more than most=1.0"),
        ("kimi", {"function": "nowhere"}, "module:function"),
        ("no_such_module_x:f", {}, "cannot be imported"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        group_reward(name, options)
