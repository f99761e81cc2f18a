"""The section of the data by itself: lengths that prompts ask for."""

import pytest

from luspo_jax.hosts.values import ConfigError
from luspo_jax.run.data_sections import DataSettings


@pytest.mark.parametrize("template", ["length", "{problem} in {target_length}"])
def test_targets_and_the_template_that_states_them_go_together(template):
    targets = {"length_target_low": 3, "length_target_high": 3}
    DataSettings(name="label_sums", template=template, **targets)
    with pytest.raises(ConfigError, match=r"^data\.template=.* states \{target_length\}: set"):
        DataSettings(name="label_sums", template=template)
    with pytest.raises(ConfigError, match=r"^data\.length_target_high=3 draws a length"):
        DataSettings(name="label_sums", template="chat", **targets)


@pytest.mark.parametrize("targets", [(0, 3), (4, 3), (3, 0)])
def test_targets_are_a_range(targets):
    low, high = targets
    with pytest.raises(ConfigError, match=f"length_target_low={low} and .*_high={high} must be"):
        DataSettings(
            name="label_sums", template="length", length_target_low=low, length_target_high=high
        )
