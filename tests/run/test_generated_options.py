"""Options of generated tasks in a configuration: what reaches the dataset, and what is refused."""

import pytest

from configs import quickstart
from luspo_jax.hosts.values import ConfigError
from luspo_jax.run import checks
from luspo_jax.run.data import held_out_options
from luspo_jax.run.fields import assign, default_config, flat

SUMS = {"task": "chain_sum", "max_terms": 3}


@pytest.fixture
def gym():
    pytest.importorskip("reasoning_gym", reason="needs the extra [tasks]")


def _config(options=SUMS, parts=None, **data):
    config = quickstart.get_config()
    config.data.name, config.data.options = "reasoning_gym", options
    config.reward.parts = parts or {"reasoning_gym": 1.0}
    for field, value in data.items():
        config.data[field] = value
    return config


def test_options_are_accepted_and_come_back_from_a_flat_configuration(gym):
    options = {"tasks": {"a": {"task": "gcd", "weight": 2.0}, "lcm": {"level": 1}}, "size": 50}
    config = _config(options, eval_options={"task": "gcd"})
    settings = checks.check(config)
    assert settings.data.options == options
    again = default_config()
    assign(again, flat(config))
    assert again.data.options.to_dict() == options
    assert again.data.eval_options.to_dict() == {"task": "gcd"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, SUMS),
        ({"eval_options": {"task": "gcd"}}, {"task": "gcd"}),
        ({"eval_name": "label_sums"}, {}),
        ({"eval_name": "label_sums", "eval_options": {"num_terms": 4}}, {"num_terms": 4}),
    ],
)
def test_the_held_out_set_has_its_own_options_or_those_of_the_same_dataset(data, expected):
    assert dict(held_out_options(_config(**data).data)) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_config({}), r"data\.options\.task is empty: name a task"),
        (_config({"task": "chain_sums"}), r"data\.options\.task='chain_sums'.*'chain_sum'\?"),
        (_config({**SUMS, "min_term": 1}), r"data\.options\.min_term: task 'chain_sum' has no"),
        (_config({**SUMS, "min_terms": 9}), r"data\.options: task 'chain_sum' refuses these"),
        (_config({**SUMS, "level": 99}), r"data\.options\.level=99 must be at least 0 and at most"),
        (
            _config({"tasks": {"gcd": {"weight": -1.0}}}),
            r"data\.options\.tasks\.gcd\.weight=-1\.0 must be a positive number",
        ),
        (
            _config(eval_options={"task": "gdc"}),
            r"data\.eval_options\.task='gdc' does not exist: did you mean 'gcd'",
        ),
        (
            _config(eval_name="label_sums", parts={"gsm8k": 1.0}, eval_options={"num_term": 4}),
            r"data\.eval_options\.num_term: label_sums has no such option",
        ),
        (
            _config(eval_name="gsm8k", parts={"gsm8k": 1.0}, eval_options={"num_term": 4}),
            r"data\.eval_options=.*only a generated held-out set has options",
        ),
        (_config(split="dev"), r"data\.split='dev', data\.options: split 'dev' does not exist"),
        (
            _config(eval_name="label_sums"),
            r"reward\.parts\.reasoning_gym: .*data\.name=reasoning_gym alone.*eval_name='label_su",
        ),
        (
            _config(mixture={"a": {"name": "label_sums"}}, options={}),
            r"reward\.parts\.reasoning_gym: .*data\.mixture\.a\.name='label_sums'",
        ),
        (
            _config(mixture={"a": {"name": "reasoning_gym"}}, options={}),
            r"data\.mixture\.a\.name=reasoning_gym: .*data\.options\.tasks",
        ),
    ],
)
def test_mistakes_are_named_by_field(gym, config, message):
    with pytest.raises(ConfigError, match=message):
        checks.check(config)


def test_an_extraction_that_does_not_exist_is_refused(gym):
    config = _config()
    config.reward.options = {"reasoning_gym": {"extract": "tag"}}
    with pytest.raises(ConfigError, match=r"reward\.options\.reasoning_gym=.*unknown extraction"):
        checks.check(config)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("luspo_jax.rewards.gym_tasks.PACKAGE", "no-such-package")
    with pytest.raises(ConfigError, match=r"reward\.parts\.reasoning_gym: .*luspo_jax\[tasks\]"):
        checks.check(_config())
    with pytest.raises(ConfigError, match=r"data\.name=reasoning_gym: .*luspo_jax\[tasks\]"):
        checks.check(_config(parts={"gsm8k": 1.0}))
