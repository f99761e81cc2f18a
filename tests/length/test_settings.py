"""Every setting of length that cannot work is refused by its name, alone and in a configuration."""

import dataclasses

import pytest

from luspo_jax.hosts.values import ConfigError
from luspo_jax.length.settings import LengthSettings
from luspo_jax.run import checks, fields

FLOATS = [field.name for field in dataclasses.fields(LengthSettings) if field.type is float]
ODD = [float("nan"), float("inf"), float("-inf")]

BAD = [
    ("every", {"every": -1}),
    ("share", {"share": 0.0}),
    ("share", {"share": 1.5}),
    ("bin_edges", {"bin_edges": "64,short"}),
    ("bin_edges", {"bin_edges": "64,1.5"}),
    ("bin_edges", {"bin_edges": "64,8"}),
    ("bin_edges", {"bin_edges": "8,8"}),
    ("bin_edges", {"bin_edges": "0,8"}),
    ("bin_edges", {"bin_edges": "-4,8"}),
    ("steer", {"steer": "length"}),
    ("steer", {"steer": "pressure", "every": 0}),
    ("target_low", {"steer": "band"}),
    ("target_low", {"steer": "band", "target_low": 20.0, "target_high": 10.0}),
    ("target_low", {"steer": "band", "target_low": 0.0, "target_high": 10.0}),
    ("alpha_low", {"alpha_low": 1.5, "alpha_high": 0.5}),
    ("alpha_low", {"alpha_low": 1.0, "alpha_high": 1.0}),
    ("alpha_low", {"alpha_low": -3.0}),
    ("alpha_high", {"alpha_high": 3.0}),
    ("alpha_rate", {"alpha_rate": 0.0}),
    ("alpha_rate", {"alpha_rate": -0.1}),
    ("smoothing", {"smoothing": 1.0}),
    ("smoothing", {"smoothing": -0.1}),
    ("window", {"window": 0}),
    ("growth", {"growth": -0.1}),
    ("fall", {"fall": -0.1}),
    ("fall", {"fall": 1.1}),
    ("mitigation", {"mitigation": "hope"}),
    ("penalty", {"penalty": -0.1}),
    ("penalty", {"mitigation": "penalty", "penalty": 0.0}),
    ("account_window", {"account_window": 1}),
    ("account_limit", {"account_limit": 0.0}),
    ("account_limit", {"account_limit": -0.1}),
]

# What only the rest of a configuration makes wrong.
BAD_TOGETHER = [
    ("objectives", {"length.objectives": "grpo,luspoo"}, "did you mean 'luspo'"),
    ("every", {"length.every": 1, "rollout.group_size": 2}, "group_size=2 must be at least 4"),
    ("every", {"length.every": 1, "rollout.group_size": 3}, "group_size=3 must be at least 4"),
    ("steer", {"length.every": 1, "length.steer": "pressure"}, "length_scale=adaptive"),
    (
        "steer",
        {"length.steer": "band", "length.target_low": 4.0, "length.target_high": 8.0},
        "length_scale=adaptive",
    ),
    ("steer", {"length.mitigation": "scale"}, 'mitigation="scale".*length_scale=adaptive'),
    (
        "alpha_low",
        {"objective.length_scale": "adaptive", "length.alpha_high": 0.5},
        "objective.length_alpha=1,",
    ),
    (
        "alpha_low",
        {"objective.length_scale": "adaptive", "objective.length_alpha": -0.5},
        "objective.length_alpha=-0.5,",
    ),
    (
        "target_low",
        {
            "objective.length_scale": "adaptive",
            "length.steer": "band",
            "length.target_low": 300.0,
            "length.target_high": 400.0,
        },
        "max_response_length=256",
    ),
]


def _config(leaves=()):
    config = fields.default_config()
    config.model.path = "embedded:label_sums"
    config.data.name = "label_sums"
    config.reward.parts = {"gsm8k": 1.0}
    fields.assign(config, dict(leaves))
    return config


def test_the_default_is_fine_and_measures_nothing():
    settings = checks.check(_config()).length
    assert settings == LengthSettings()
    assert (settings.every, settings.steer, settings.mitigation) == (0, "none", "none")


@pytest.mark.parametrize(("field", "values"), BAD, ids=str)
def test_bad_values_are_refused_by_name(field, values):
    with pytest.raises(ValueError, match=rf"{field}=|^{field}\b"):
        LengthSettings(**values)


@pytest.mark.parametrize(("field", "values"), BAD, ids=str)
def test_a_configuration_lists_bad_values(field, values):
    config = _config({f"length.{name}": value for name, value in values.items()})
    with pytest.raises(ConfigError, match=rf"(?s)cannot run.*length\..*{field}"):
        checks.check(config)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("field", FLOATS)
def test_numbers_that_are_not_finite_are_refused(field, value):
    """A comparison with NaN is false, so that range checks alone would let it pass."""
    with pytest.raises(ValueError, match=f"^{field}="):
        LengthSettings(**{field: value})
    with pytest.raises(ConfigError, match=rf"length\.{field}="):
        checks.check(_config({f"length.{field}": value}))


@pytest.mark.parametrize(("field", "leaves", "message"), BAD_TOGETHER, ids=str)
def test_values_that_do_not_go_together_are_refused(field, leaves, message):
    with pytest.raises(ConfigError, match=rf"length\.{field}.*{message}"):
        checks.check(_config(leaves))


def test_a_broken_length_section_is_listed_beside_other_problems():
    leaves = {"length.window": 0, "shaping.gfpo_keep": 99, "objective.preset": "luspoo"}
    with pytest.raises(ConfigError) as caught:
        checks.check(_config(leaves))
    for named in ("length.window=0", "shaping.gfpo_keep=99", "luspoo"):
        assert named in str(caught.value)


@pytest.mark.parametrize(
    "leaves",
    [
        {"length.every": 1, "rollout.group_size": 4},
        {"length.every": 1, "length.objectives": ""},
        {"length.mitigation": "penalty"},
        {"objective.length_scale": "adaptive", "length.mitigation": "scale"},
        {"objective.length_scale": "adaptive", "length.every": 3, "length.steer": "pressure"},
        {
            "objective.length_scale": "adaptive",
            "length.steer": "band",
            "length.target_low": 20.0,
            "length.target_high": 20.0,
        },
        # α may start at either end of its range.
        {"objective.length_scale": "adaptive", "length.alpha_high": 1.0},
        {"objective.length_scale": "adaptive", "length.alpha_low": 1.0},
    ],
    ids=str,
)
def test_values_that_go_together_are_accepted(leaves):
    checks.check(_config(leaves))


def test_bins():
    assert LengthSettings().bins(40) == (5, 10, 20)
    assert LengthSettings().bins(3) == (1,)
    assert LengthSettings(bin_edges="4, 16,").bins(40) == (4, 16)
    assert LengthSettings(objectives=" grpo ,luspo,").names == ("grpo", "luspo")
