"""Fields read from the declarations as text are those of the configuration that a run gets."""

import ast

import pytest

from luspo import fields
from luspo_jax.run.fields import OPEN_SECTIONS, default_config, default_sft_config, flat

KINDS = [("Settings", default_config), ("SftSettings", default_sft_config)]


@pytest.mark.parametrize(("kind", "made"), KINDS)
def test_fields_and_defaults_are_those_of_the_configuration(kind, made):
    config, found = made(), {f.name: f for s in fields.sections(kind) for f in s.fields}
    opened = {name.rstrip(".") for name in OPEN_SECTIONS} & set(found)
    assert set(found) == set(flat(config)) | opened
    for name, default in flat(config).items():
        said = found[name].default
        if default is None:
            assert said == "unset", name
        elif isinstance(default, bool | str) or said.replace(".", "").isdigit():
            assert ast.literal_eval(said) == default, name
        else:
            assert eval(said, {}) == default, name
        if default is not None:
            assert found[name].type == type(default).__name__, name


@pytest.mark.parametrize(("kind", "made"), KINDS)
def test_every_field_is_explained(kind, made):
    assert [f.name for s in fields.sections(kind) for f in s.fields if not f.about] == []
    assert all(section.about for section in fields.sections(kind))


def test_a_comment_is_read_from_above_from_the_end_and_from_the_docstring():
    found = {f.name: f for s in fields.sections("Settings") for f in s.fields}
    assert found["num_steps"].about == "Rollout steps."
    path = found["model.path"].about
    assert path.startswith('A folder in Hugging Face format, "embedded:NAME" for a model')
    assert path.endswith('"hub:OWNER/NAME" to download one.')
    dot = found["shaping.gfpo_by"].about
    assert dot == '"length" keeps the shortest, "reward_per_token" those with the highest.'
    assert found["objective.clip_low"].default == "unset"
    assert found["objective.preset"].default == "'luspo'"


def test_listing_keeps_to_the_prefix_and_the_width():
    said = fields.listing("Settings", "train.b")
    assert [line.split("=")[0] for line in said.split("\n") if line.startswith("  --")] == [
        "  --config.train.b1",
        "  --config.train.b2",
    ]
    assert said.startswith("train: The optimizer steps of a rollout step.")
    assert max(map(len, fields.listing("Settings").split("\n"))) <= 100
    assert fields.listing("Settings", "nothing") == ""
