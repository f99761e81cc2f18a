"""Rewards by name; wrong names and options are refused with the right ones."""

import math
import subprocess
import sys

import pytest

from luspo_jax.rewards import REWARDS, Scorer, score, verifier

NEEDED = {
    "overlong": {"buffer": 10},
    "format": {"name": "boxed"},
    "user": {"function": "math:gcd"},
}


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_has_an_id_and_a_version(name):
    if name == "user":
        pytest.skip("needs a function with a source file: tests/rewards/test_user.py")
    if name.startswith("reasoning_gym"):
        pytest.importorskip("reasoning_gym", reason="needs the extra [tasks]")
    built = verifier(name, NEEDED.get(name))
    assert built.id.startswith(name)
    assert built.version
    assert built.label == f"{built.id}@{built.version}"


def test_parts_are_weighted_and_kept():
    reward = score(
        [("dapo_math", 1.0), ("format", 0.5), ("overlong", 1.0)],
        "Answer: 3",
        "3",
        length=90,
        max_length=100,
        options={"overlong": {"buffer": 20, "factor": 0.3}, "format": {"name": "answer_line"}},
    )
    assert reward.value == pytest.approx(1 + 0.5 - 0.15)
    assert reward.parts == pytest.approx({"dapo_math": 1, "format": 1, "overlong": -0.15})
    assert (reward.status, reward.prediction) == ("ok", "3")


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think>w</think> <answer> The answer is $\\boxed{5}$ </answer>", 1.5),
        ("<think>w</think> <answer> The answer is $\\boxed{6}$ </answer>", 0.5),
        ("so \\boxed{5}", 1.0),
        ("so 5", 0.0),
    ],
)
def test_the_papers_vision_language_reward(response, value):
    """arXiv:2602.05261: 0.5 for the format, 1 for the accuracy."""
    reward = score(
        {"format": 0.5, "boxed_math": 1.0}, response, "5", options={"format": {"name": "luspo_vl"}}
    )
    assert reward.value == value


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({"dapo": 1}, None, "did you mean 'dapo_math'"),
        ({"zzz": 1}, None, "boxed_math, dapo_math"),
        ({"overlong": 1}, None, "buffer"),
        ({"overlong": 1}, {"overlong": {"bufer": 3}}, r"options: buffer, factor"),
        ({"dapo_math": 1}, {"overlong": {"buffer": 3}}, "no parts of the reward"),
        ({}, None, "at least one"),
    ],
)
def test_wrong_names_and_options_are_refused(parts, options, message):
    with pytest.raises(ValueError, match=message):
        score(parts, "", "", options=options)


def test_neither_jax_nor_the_slow_libraries_are_imported():
    code = (
        "import sys; import luspo_jax.rewards.worker, luspo_jax.datasets; "
        "print([m for m in ('jax', 'sympy', 'transformers', 'tensorflow_datasets', 'pyarrow')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("weight", ["1", None, math.nan, math.inf, True, [1.0]])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(ValueError, match="the weight of reward 'gsm8k' must be a number"):
        Scorer({"exact": 1.0, "gsm8k": weight})
