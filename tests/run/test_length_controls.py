"""Controls of length in a configuration: what is refused by name, and what is said of the rest."""

import re

import pytest

from configs import quickstart
from luspo_jax.hosts.values import ConfigError
from luspo_jax.run import checks, fields
from luspo_jax.run.length_controls import notices


@pytest.fixture
def config():
    return quickstart.get_config()


def _set(config, **values):
    fields.assign(config, {name.replace("__", "."): value for name, value in values.items()})
    return config


def _told(config):
    return list(notices(checks.check(config)))


def test_a_group_reward_is_read_with_its_options(config):
    _set(config, reward__group__alp=0.5, reward__group_options__alp__beta=0.2)
    found = checks.check(config).reward
    assert dict(found.group) == {"alp": 0.5}
    assert found.group_options["alp"]["beta"] == 0.2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward__group__kimmi": 1.0}, r"reward\.group\.kimmi: .*did you mean 'kimi'"),
        ({"reward__group__kimi": "a"}, r"reward\.group\.kimi='a' must be a number"),
        ({"reward__group__kimi": 1e20}, r"reward\.group\.kimi=1e\+20 must be"),
        ({"reward__group__laser": 1.0}, r"reward\.group\.laser: .*'target'"),
        ({"reward__group__gsm8k": 1.0}, r"reward\.group\.gsm8k: reward\.parts has a part"),
        ({"reward__group_options__alp__beta": 1.0}, r"reward\.group_options\.alp: no reward of"),
        (
            {"reward__group__alp": 1.0, "reward__group_options__alp__bta": 1.0},
            r"reward\.group_options\.alp=\{'bta': 1.0\}: .*\(options: beta, floor\)",
        ),
        (
            {"reward__group__alp": 1.0, "reward__group_options__alp": 1.0},
            r"reward\.group_options\.alp=1.0 must be a section",
        ),
        (
            {"reward__group__l1_max": 1.0},
            r"reward\.group\.l1_max pays for the length .*data\.length_target_low.*template",
        ),
        (
            {"data__length_target_low": 5, "data__length_target_high": 9},
            r"data\.length_target_high=9 draws .* data\.template='plain' does not state it",
        ),
        (
            {"data__length_target_low": 5, "data__length_target_high": 4},
            r"data\.length_target_low=5 and data\.length_target_high=4 must be",
        ),
        (
            {"data__length_target_high": 4},
            r"data\.length_target_low=0 and data\.length_target_high=4 must be",
        ),
        (
            {"data__template": "{problem} in {target_length}"},
            r"data\.template='\{problem\} in \{target_length\}' states .*length_target_high",
        ),
        ({"shaping__gfpo_adaptive": "9,6,4,2"}, r"shaping\.gfpo_adaptive=9,6,4,2 exceeds .*=8"),
        ({"shaping__gfpo_adaptive": "9,6,4"}, r"shaping\.gfpo_adaptive='9,6,4' must be four"),
        # (8 − 1) / √8 = 2.475
        ({"shaping__dot": True}, r"shaping\.dot_deviations=3 cuts nothing: .*more than 2\.47"),
        ({"rollout__order": "shortest"}, r"rollout\.order=shortest .* rollout\.overlap=0"),
        ({"rollout__order": "longest"}, r"rollout\.order='longest' does not exist"),
        (
            {
                "objective__preset": "gdpo",
                "length__mitigation": "penalty",
                "length__penalty": 0.1,
            },
            r"length\.mitigation=penalty changes the sum .*objective\.advantage=gdpo",
        ),
        ({"reward__group__kimi": 1.0, "rollout__group_size": 1}, r"rollout\.group_size=1 must be"),
    ],
)
def test_what_cannot_run_is_refused_by_name(config, values, message):
    config.unlock()
    with pytest.raises(ConfigError, match=message):
        checks.check(_set(config, **values))


def test_targets_need_a_template_that_states_them(config):
    _set(
        config,
        reward__group__l1_exact=1.0,
        data__length_target_low=5,
        data__length_target_high=9,
        data__template="{problem} in {target_length} =",
    )
    assert checks.check(config).data.length_target_high == 9
    _set(config, shaping__dot=True, shaping__dot_deviations=2.4)
    checks.check(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward__group__gr3": 1.0}, r"length_scale=length .*group\.gr3 pays less .* opposite"),
        (
            {"reward__group__kimi": 1.0, "reward__group__linear": 1.0, "objective__preset": "gspo"},
            r"^reward\.group\.kimi and reward\.group\.linear all reward",
        ),
        (
            {
                "reward__group__cosine": 1.0,
                "reward__parts__overlong": 1.0,
                "reward__options__overlong__buffer": 8,
                "eval__metric": "gsm8k",
                "objective__preset": "gspo",
            },
            r"^reward\.parts\.overlong and reward\.group\.cosine both",
        ),
        (
            {
                "reward__group__alp": 1.0,
                "length__mitigation": "penalty",
                "objective__preset": "gspo",
            },
            r"^length\.mitigation=penalty comes on top of reward\.group\.alp",
        ),
        (
            {"reward__group__alp": 1.0, "shaping__gfpo_keep": 4, "objective__preset": "gspo"},
            r"^shaping\.gfpo_by=length keeps the shortest",
        ),
        (
            {
                "shaping__dot": True,
                "shaping__dot_deviations": 2.0,
                "shaping__overlong_filter": True,
            },
            r"^shaping\.dot cuts outliers",
        ),
    ],
)
def test_controls_that_meet_are_told_in_one_line(config, values, message):
    (told,) = _told(_set(config, **values))
    assert "\n" not in told
    assert re.search(message, told), told


def test_lie_goes_with_the_weight_of_length(config):
    targets = {"data__length_target_low": 5, "data__length_target_high": 9}
    template = "{problem} in {target_length} ="
    _set(config, reward__group__lie=1.0, **targets, data__template=template)
    (told,) = _told(config)
    assert "favour long responses: their pulls add up" in told
    _set(config, reward__group__kimi=1.0)
    assert len(_told(config)) == 3


def test_nothing_is_said_of_one_control_or_none(config):
    assert _told(config) == []
    _set(config, reward__group__kimi=1.0, objective__preset="grpo")
    assert _told(config) == []
