"""Configurations of Qwen2.5-VL: both spellings, the round trip, and what is refused."""

import copy
import dataclasses
import json
import pathlib

import pytest

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models.decoder_config import decoder_config, hf_config, read_config
from luspo_jax.models.locate import architecture
from luspo_jax.models.vision_config import VisionConfig, vision_config

GOLDENS = pathlib.Path(__file__).parent / "vision_goldens"
HUB = architecture("hub:Qwen/Qwen2.5-VL-7B-Instruct")
NESTED = json.loads((GOLDENS / "untied" / "config.json").read_text())


def test_the_hubs_file():
    config = decoder_config(HUB)
    assert config.vision == VisionConfig(
        depth=32, embed_dim=1280, mlp_dim=3420, num_heads=16, out_dim=3584,
        full_layers=(7, 15, 23, 31),
    )  # fmt: skip
    assert config.mrope_section == (16, 24, 24)
    assert (config.head_dim, config.qkv_bias, config.tie_embeddings) == (128, True, False)
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (151652, 151653)
    assert (config.vision.window_slots, config.vision.window_units) == (64, 4)
    assert decoder_config(hf_config(config)) == config


def test_it_is_a_copy_of_the_hubs(shared_data):
    original = shared_data / "qwen" / "Qwen2.5-VL-7B-Instruct" / "config.json"
    assert json.loads(original.read_text()) == HUB
    assert read_config(original.parent).eos_token_ids == (151643, 151645)


@pytest.mark.parametrize("variant", ["untied", "tied"])
def test_the_file_of_transformers_5(variant):
    config = read_config(GOLDENS / variant)
    assert "text_config" in json.loads((GOLDENS / variant / "config.json").read_text())
    assert config.tie_embeddings is (variant == "tied")
    assert config.rope_theta == (1e6 if variant == "tied" else 1e4)
    assert config.vision.out_dim == config.embed_dim == 32
    assert config.dtype == "float32"
    assert decoder_config(hf_config(config)) == config
    hash(config)


def _changed(hf, path, value):
    hf = copy.deepcopy(hf)
    *outer, last = path.split(".")
    node = hf
    for key in outer:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return hf


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("image_token_id", ..., "image_token_id is missing"),
        ("image_token_id", 151656, "must all differ"),
        ("video_token_id", 999_999, "video_token_id must be a token of the vocabulary of 152064"),
        ("vision_config", ..., "vision_config is missing"),
        ("vision_config", [1], "vision_config must be a JSON object"),
        ("vision_config.depth", ..., "vision_config: depth is missing"),
        ("vision_config.depth", 8, r"fullatt_block_indexes\) must be some of the blocks 0 to 7"),
        ("vision_config.depth", "8", "depth must be a positive integer, not '8'"),
        ("vision_config.hidden_act", "gelu", "hidden_act = 'gelu' is not implemented"),
        ("vision_config.hidden_size", 1000, "multiple of 4, for rotary positions"),
        ("vision_config.window_size", 100, "must be a multiple of patch_size 14 times spatial_m"),
        ("vision_config.spatial_patch_size", 16, "spatial_patch_size 16 must be patch_size 14"),
        ("vision_config.out_hidden_size", 4096, "must be the decoder's embed_dim"),
        ("vision_config.in_channels", 1, "contradict each other"),
        ("vision_config.model_type", "qwen2_vl", "model_type = 'qwen2_vl' is not implemented"),
        ("vision_config.embed_dim", 1280, "embed_dim = 1280 is not known to the tower"),
        ("vision_config.deepstack_visual_indexes", [8], "deepstack_visual_indexes"),
        ("vision_config.fullatt_block_indexes", "all", "must be a list of blocks"),
        ("vision_config.rope_parameters", {"rope_theta": 5.0}, r"\{'rope_theta': 5.0\} are not im"),
        ("rope_scaling", ..., "mrope_section is missing from rope_scaling"),
        ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24]}, "three positive numbers"),
        ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 25]}, "half of head_dim 128"),
        ("rope_scaling", {"type": "yarn", "mrope_section": [16, 24, 24]}, "'yarn' is not impl"),
        ("head_dim", 64, "times num_heads 28 must be embed_dim"),
        ("attention_bias", False, "not implemented for qwen2_5_vl"),
        ("use_sliding_window", True, "use_sliding_window = True is not implemented"),
        ("text_config", {"model_type": "llama"}, "text_config: model_type 'llama'"),
        ("text_config", {"hidden_size": 7}, "hidden_size is 3584 and in text_config 7"),
    ],
)
def test_bad_fields_are_named(path, value, message):
    with pytest.raises(ConfigError, match=message):
        decoder_config(_changed(HUB, path, value))


def test_a_nested_field_that_is_not_known_is_named():
    with pytest.raises(ConfigError, match="novel_norm = 1 is not known to the qwen2_5_vl decoder"):
        decoder_config(_changed(NESTED, "text_config.novel_norm", 1))


def test_text_models_have_no_vision():
    config = decoder_config(HUB)
    with pytest.raises(ConfigError, match=r"mrope_section, vision, .*: a qwen2 has no vision"):
        dataclasses.replace(config, model_type="qwen2")
    with pytest.raises(ConfigError, match="vision must be a VisionConfig, not None"):
        dataclasses.replace(config, vision=None)
    text = {"vision_config": {}, **architecture("hub:Qwen/Qwen2.5-7B-Instruct")}
    with pytest.raises(
        ConfigError, match=r"vision_config = \{\} is not known to the qwen2 decoder"
    ):
        decoder_config(text)


def test_a_tower_alone():
    config = vision_config({**HUB["vision_config"], "rope_parameters": {"rope_type": "axial"}})
    assert config == decoder_config(HUB).vision
