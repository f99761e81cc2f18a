"""The sections of a supervised configuration check themselves, field by field."""

import dataclasses
import math

import pytest

from configs import quickstart, sft_label_sums
from luspo_jax.hosts.values import ConfigError, Number
from luspo_jax.run import checks, fields
from luspo_jax.run.settings import Settings, kind_of, rules
from luspo_jax.run.sft.sections import SftSettings

SENSELESS = (
    *(None, "nonsense", b"x", True, -1, -0.5, 10**12, 1e300, math.nan, math.inf, {}, {"a": 1}),
    *([], [1], object()),
)
FIELDS = fields.flat(sft_label_sums.get_config())


def test_settings_read_as_the_configuration_does():
    config = sft_label_sums.get_config()
    ours = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in vars(checks.check_sft(config)).items()
    }
    assert ours == config.to_dict()


def test_the_kind_of_a_configuration_is_known_by_its_fields():
    for config, kind in (
        (quickstart.get_config(), Settings),
        (sft_label_sums.get_config(), SftSettings),
    ):
        assert kind_of(config) is kind
        assert kind_of(fields.flat(config)) is kind
        assert fields.changes(fields.flat(config), config) == {}


def test_every_number_has_a_rule():
    ruled = rules(SftSettings)
    for name, value in FIELDS.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert isinstance(ruled.get(name), Number), name
    assert set(ruled) <= set(FIELDS)


def _refusal(config):
    """The message of a refusal; None where there is none."""
    try:
        checks.check_sft(config)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("field", FIELDS)
def test_a_senseless_value_is_refused_in_one_line_that_names_the_field(field):
    *sections, last = field.split(".")
    refused = 0
    for value in SENSELESS:
        config = sft_label_sums.get_config()
        section = config[sections[0]] if sections else config
        with section.ignore_type(), section.unlocked():
            section[last] = value
        line = _refusal(config)
        if line is not None:
            refused += 1
            assert field in line, (value, line)
            assert "\n" not in line
    assert refused >= 6
