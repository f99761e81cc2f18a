"""Checkpoints with a tower: names, bytes, the round trip, other names, meshes, damage."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from luspo_jax import sharding
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import read_config
from luspo_jax.models.decoder_weights import WeightsError, export, load_params, weight_table
from luspo_jax.models.vision_weights import hub_name

FOLDER = pathlib.Path(__file__).parent / "vision_goldens" / "untied"
CONFIG = read_config(FOLDER)
STORED = load_file(FOLDER / "model.safetensors")


def _copy(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((FOLDER / "config.json").read_text())
    return folder


def _equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_names_and_bytes_are_those_of_the_hub(shared_data):
    folder = shared_data / "qwen" / "Qwen2.5-VL-7B-Instruct"
    config = read_config(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    table = weight_table(config)
    assert set(table) == set(index["weight_map"])
    assert len(table) == 729
    leaves = jax.tree.leaves(decoder.abstract_params(config, jnp.bfloat16))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 16_584_333_312
    assert index["metadata"]["total_size"] == 16_584_333_312
    assert table["visual.patch_embed.proj.weight"].hf_shape == (1280, 3, 2, 14, 14)
    assert table["visual.blocks.31.attn.qkv.weight"].hf_shape == (3840, 1280)
    assert table["visual.merger.mlp.2.weight"].hf_shape == (3584, 5120)


def test_each_parameter_is_its_tensor():
    params = load_params(FOLDER, CONFIG)
    tower = params["vision"]
    heads = CONFIG.vision.num_heads, CONFIG.vision.head_dim
    qkv = STORED["visual.blocks.2.attn.qkv.weight"].reshape(3, *heads, -1)
    np.testing.assert_array_equal(
        tower["blocks"]["attention"]["qkv"]["kernel"][2], np.moveaxis(qkv, -1, 0)
    )
    patch = STORED["visual.patch_embed.proj.weight"]
    np.testing.assert_array_equal(tower["patch"]["kernel"], np.moveaxis(patch, 0, -1))
    np.testing.assert_array_equal(
        tower["blocks"]["attention"]["out"]["kernel"][0].reshape(-1, CONFIG.vision.embed_dim),
        STORED["visual.blocks.0.attn.proj.weight"].T,
    )
    np.testing.assert_array_equal(
        tower["merger"]["out"]["kernel"], STORED["visual.merger.mlp.2.weight"].T
    )


def test_what_is_written_is_what_was_read(tmp_path):
    params = load_params(FOLDER, CONFIG)
    export(tmp_path / "out", params, CONFIG, max_shard_bytes=40_000)
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == STORED.keys()
    _equal(written, STORED)
    assert read_config(tmp_path / "out") == CONFIG
    _equal(load_params(tmp_path / "out", CONFIG), params)


def test_another_type_is_declared_at_both_levels(tmp_path):
    params = load_params(FOLDER, CONFIG)
    hf = json.loads((FOLDER / "config.json").read_text())
    hf["text_config"]["dtype"] = hf["vision_config"]["dtype"] = "float32"
    source = _copy(tmp_path / "source", STORED)
    (source / "config.json").write_text(json.dumps(hf))
    (source / "preprocessor_config.json").write_text("{}")
    export(tmp_path / "out", params, CONFIG, source=source, dtype="bfloat16")
    assert read_config(tmp_path / "out").dtype == "bfloat16"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["dtype"] == written["vision_config"]["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    loaded = load_params(tmp_path / "out", CONFIG)
    _equal(loaded, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params))


def test_names_of_the_modules_are_read_too(tmp_path):
    own = {re.sub("^model", "model.language_model", name): x for name, x in STORED.items()}
    own = {re.sub("^visual", "model.visual", name): x for name, x in own.items()}
    assert {hub_name(name) for name in own} == STORED.keys() != own.keys()
    folder = _copy(tmp_path / "own", own)
    _equal(load_params(folder, CONFIG), load_params(FOLDER, CONFIG))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_parts_on_a_mesh_are_those_of_the_whole(sizes, tmp_path):
    folder = FOLDER.parent / "tied"
    config = read_config(folder)
    layout = sharding.layout("train", sizes, jax.devices("cpu"))
    spread = load_params(folder, config, layout=layout)
    _equal(spread, load_params(folder, config))
    places = sharding.shardings(decoder.param_axes(config)["vision"], layout)
    assert jax.tree.map(lambda leaf: leaf.sharding, spread["vision"]) == places
    export(tmp_path / "out", spread, config)
    written, stored = (load_file(x / "model.safetensors") for x in (tmp_path / "out", folder))
    assert written.keys() == stored.keys()
    _equal(written, stored)


def test_random_parameters_on_a_mesh_are_those_of_one_device():
    layout = sharding.layout("train", {"fsdp": 8}, jax.devices("cpu"))
    key = jax.random.key(0)
    alone, spread = (
        decoder.init_params(key, CONFIG),
        decoder.init_params(key, CONFIG, layout=layout),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), alone, spread)
    tower = alone["vision"]
    assert 0.015 < np.std(tower["merger"]["hidden"]["kernel"]) < 0.025
    assert (tower["merger"]["norm"]["scale"] == 1).all()
    assert not tower["merger"]["out"]["bias"].any()


def test_a_mesh_that_does_not_fit_is_named():
    layout = sharding.layout("train", {"tensor": 8}, jax.devices("cpu"))
    problems = sharding.misfits(layout, decoder.cut_sizes(CONFIG))
    assert any(problem.startswith("vision_config.num_heads = 2") for problem in problems)


def test_damage_is_named(tmp_path):
    lacking = {name: x for name, x in STORED.items() if "merger.ln_q" not in name}
    with pytest.raises(WeightsError, match=r"1 missing: visual\.merger\.ln_q\.weight"):
        load_params(_copy(tmp_path / "lacking", lacking), CONFIG)
    odd = STORED | {"visual.blocks.9.norm1.weight": STORED["visual.blocks.0.norm1.weight"]}
    with pytest.raises(WeightsError, match=r"1 surplus: visual\.blocks\.9\.norm1\.weight"):
        load_params(_copy(tmp_path / "odd", odd), CONFIG)
    flat = STORED["visual.patch_embed.proj.weight"].reshape(16, -1)
    with pytest.raises(WeightsError, match=r"visual\.patch_embed\.proj\.weight is \[16, 24\]"):
        load_params(
            _copy(tmp_path / "flat", STORED | {"visual.patch_embed.proj.weight": flat}), CONFIG
        )
    broken = STORED["visual.blocks.1.attn.qkv.bias"] * np.nan
    with pytest.raises(WeightsError, match=r"hold NaN or infinity: visual\.blocks\.1\.attn\.qkv"):
        load_params(
            _copy(tmp_path / "nan", STORED | {"visual.blocks.1.attn.qkv.bias": broken}), CONFIG
        )
