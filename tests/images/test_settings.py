"""Settings of the image processor: read in every spelling, refused by name, written."""

import dataclasses
import json

import numpy as np
import pytest

from luspo_jax.images.pixels import Patching
from luspo_jax.images.settings import read_settings, value_table, write_limits


def test_settings_of_the_real_model(shared_data):
    settings = read_settings(shared_data / "qwen" / "Qwen2.5-VL-7B-Instruct")
    assert settings.patching == Patching(min_pixels=3_136, max_pixels=12_845_056)
    assert settings.mean == (0.48145466, 0.4578275, 0.40821073)
    other = read_settings(
        *(shared_data / "qwen" / "Qwen2.5-VL-7B-Instruct",),
        max_pixels=1_003_520,
        blank=True,
        text_blank=(28, 56),
        max_source_pixels=10**6,
    )
    assert other.patching == Patching(
        min_pixels=3_136, max_pixels=1_003_520, blank=True, max_source_pixels=10**6
    )
    assert other.text_blank == (28, 56)


def test_settings_are_read_in_all_their_spellings(tmp_path):
    plain = tmp_path / "preprocessor_config.json"
    plain.write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessorFast",
                "size": {"shortest_edge": 3_136, "longest_edge": 9_408},
                "patch_size": 16,
                "do_normalize": False,
                "crop_size": None,
            }
        )
    )
    settings = read_settings(tmp_path)
    assert settings.patching == Patching(16, min_pixels=3_136, max_pixels=9_408)
    np.testing.assert_array_equal(value_table(settings)[1], np.arange(256, dtype=np.float32) / 255)
    nested = {"processor_class": "x", "image_processor": json.loads(plain.read_text())}
    plain.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_settings(tmp_path) == settings
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="needs its image processor's settings"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is not read; known"),
        ({"do_resize": False}, "do_resize=false is not supported"),
        ({"do_pad": True}, "fields that are not read: do_pad"),
        ({"size": {"height": 3}}, "fields that are not read: height"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels=9 must be positive and at most max"),
        ({"image_std": [0.5, 0.5]}, "must be of 3 colours"),
    ],
)
def test_settings_that_mean_something_else_are_refused(tmp_path, fields, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_limits_are_written_where_they_are_read(tmp_path, name):
    values = {"patch_size": 14, "size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    stored = values if name.startswith("pre") else {"image_processor": values}
    (tmp_path / name).write_text(json.dumps(stored))
    before = read_settings(tmp_path).patching
    write_limits(tmp_path)
    assert read_settings(tmp_path).patching == before
    write_limits(tmp_path, max_pixels=784_000)
    assert read_settings(tmp_path).patching == dataclasses.replace(before, max_pixels=784_000)
    text = (tmp_path / name).read_text()
    assert "12845056" not in text  # transformers reads `size`
    assert [path.name for path in tmp_path.iterdir()] == [name]
