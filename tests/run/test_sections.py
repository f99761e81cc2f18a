"""Sections are declared once, check themselves, and read as the configuration does."""

import dataclasses

import pytest

from configs import quickstart, quickstart_moe, quickstart_vl
from luspo_jax.hosts.values import ConfigError
from luspo_jax.run import checks, fields
from luspo_jax.run.sections import EvalSettings, ModelSettings, RolloutSettings, TrainSettings
from luspo_jax.run.settings import SECTIONS, Settings, section


@pytest.mark.parametrize("module", [quickstart, quickstart_moe, quickstart_vl])
def test_settings_read_as_the_configuration_does(module):
    config = module.get_config()
    settings = checks.check(config)
    ours = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in vars(settings).items()
    }
    theirs = config.to_dict()
    objective = {k: v for k, v in theirs.pop("objective").items() if v is not None}
    del objective["preset"]
    assert objective.items() <= ours.pop("objective").items()
    assert ours == theirs


def test_every_section_of_the_configuration_is_a_class():
    config = fields.default_config()
    assert sorted(SECTIONS) == sorted(name for name in config if hasattr(config[name], "keys"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        checks.check(quickstart.get_config()).rollout.group_size = 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RolloutSettings(group_size=1), r"^rollout\.group_size=1 must be at least 2"),
        (lambda: RolloutSettings(group_size="8"), r"^rollout\.group_size='8' must be a whole"),
        (lambda: RolloutSettings(top_p=0.0, top_k=-1), r"rollout\.top_p=0.*\nrollout\.top_k=-1"),
        (lambda: TrainSettings(pack_length=9), r"^train\.pack_length=9 is of packed rows"),
        (lambda: EvalSettings(temperature=0.0), r"^eval\.num_samples=4 must be 1"),
        (lambda: ModelSettings(), r"^model\.path is empty"),
        (lambda: ModelSettings("a", rollout_dtype="int4"), r"^model\.rollout_dtype='int4'.*int8"),
        (lambda: ModelSettings("a", dtype="int8"), r"^model\.dtype='int8' .*float32"),
    ],
)
def test_a_section_by_itself_names_the_field(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("text", ["long", "8,4", "0", "9999999"])
def test_budgets_lie_within_the_longest_response(text):
    config = quickstart.get_config()
    config.eval.budgets = text
    longest = config.rollout.max_response_length
    with pytest.raises(ConfigError, match=rf'eval\.budgets="{text}" must be "auto".*\({longest}\)'):
        checks.check(config)
    config.eval.budgets = "auto"
    assert checks.check(config).eval.budgets == "auto"


def test_settings_of_a_configuration_name_the_problems_of_all_sections():
    config = quickstart.get_config()
    config.seed, config.train.pack_length, config.length.window = -1, 9, 0
    with pytest.raises(ConfigError) as refused:
        Settings.of(config)
    assert [str(line).partition("=")[0] for line in refused.value.args] == [
        "seed", "train.pack_length", "length.window",
    ]  # fmt: skip
    assert section(config, "rollout").group_size == config.rollout.group_size


def test_ids_that_end_a_response():
    assert ModelSettings(path="x", stop_token_ids="2, 0").own_stop_ids == (2, 0)
    assert ModelSettings(path="x", stop_token_ids="none").own_stop_ids == ()
