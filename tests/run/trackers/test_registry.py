"""What output.trackers may say, and what a refusal says."""

import sys

import pytest

from configs.quickstart import get_config
from luspo_jax.hosts.values import ConfigError
from luspo_jax.run import checks, fields
from luspo_jax.run.trackers import registry


def _with(**values):
    config = get_config()
    for name, value in values.items():
        config.output[name] = value
    return config


def test_names_are_joined_by_commas():
    assert registry.names("") == ()
    assert registry.names(" wandb, mlflow ,") == ("wandb", "mlflow")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wandbb", r"no tracker 'wandbb': did you mean 'wandb'\? known: mlflow, trackio, wandb"),
        ("tensorboard", "TensorBoard has a field of its own, output.tensorboard"),
        ("wandb,wandb", "names wandb twice"),
    ],
)
def test_a_name_that_is_none_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        checks.check(_with(trackers=text))
    config = fields.default_sft_config()
    config.model.path, config.data.path = "embedded:label_sums", "x.jsonl"
    config.output.trackers = text
    with pytest.raises(ConfigError, match=message):
        checks.check_sft(config)


@pytest.mark.parametrize("name", registry.TRACKERS)
def test_a_tracker_that_is_not_installed_is_known_at_start(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"output\.trackers='{name}': {name} is not installed: pip install .luspo_jax\[{name}"
    with pytest.raises(ConfigError, match=message):
        checks.check(_with(trackers=name))


@pytest.mark.parametrize("field", ["project", "group", "run_name"])
def test_a_name_for_no_tracker_is_refused(field):
    with pytest.raises(ConfigError, match=rf"output\.{field}='x'.*set output\.trackers"):
        checks.check(_with(**{field: "x"}))


def test_the_old_field_names_the_new_one():
    config = get_config()
    with config.unlocked():
        config.output.wandb_project = "p"
    with pytest.raises(ConfigError, match=r"output\.wandb_project: it is output\.project now"):
        checks.check(config)
