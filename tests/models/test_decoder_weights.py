"""Checkpoint folders read and written, and every way in which one can be wrong."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from luspo_jax.hosts.files import PlaceError
from luspo_jax.models import safetensors_folder
from luspo_jax.models.decoder import abstract_params, cast, head_kernel
from luspo_jax.models.decoder_config import DecoderConfig, decoder_config, hf_config, read_config
from luspo_jax.models.decoder_weights import export, load_params, num_params, weight_table
from luspo_jax.models.safetensors_folder import WeightsError, listed

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CONFIG = DecoderConfig(
    model_type="qwen3",
    vocab_size=11,
    num_layers=2,
    embed_dim=6,
    mlp_dim=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    out_bias=True,
    qk_norm=True,
    tie_embeddings=False,
    max_position=64,
    eos_token_ids=(1, 3),
    pad_token_id=0,
    dtype="float32",
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
EXPERTS = dataclasses.replace(
    CONFIG,
    model_type="qwen3_moe",
    num_layers=4,
    num_experts=5,
    experts_per_token=2,
    expert_dim=7,
    norm_topk=True,
)
MIXED = dataclasses.replace(EXPERTS, dense_layers=(2,), tie_embeddings=True)


_abstract = functools.cache(abstract_params)  # the model is traced for it


def _params(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), _abstract(config)
    )


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint of CONFIG in one file."""
    export(tmp_path / "model", _params(), CONFIG)
    return tmp_path / "model"


def _rewrite(folder, change):
    """Applies `change` to the dict of tensors and writes them back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 900, 1])
@pytest.mark.parametrize("config", [CONFIG, TIED, EXPERTS, MIXED])
def test_export_and_load_are_inverse(tmp_path, config, max_shard_bytes):
    params = _params(config)
    export(tmp_path / "out", params, config, max_shard_bytes=max_shard_bytes)
    assert read_config(tmp_path / "out") == config
    _assert_equal(load_params(tmp_path / "out", config), params)
    sharded = max_shard_bytes < 5_000_000_000
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == sharded
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_more_of_a_file_is_mapped_than_is_allowed(folder, monkeypatch):
    """Pages of a map stay in memory as long as it does."""
    stored = safetensors_folder.contents(folder)
    read, live = Counter(), set()
    opened, read_slice = safetensors_folder.opened, safetensors_folder.read_slice

    @contextlib.contextmanager
    def counted(file):
        with opened(file) as handle:
            live.add(id(handle))
            read[id(handle)] = 0
            yield handle
            live.remove(id(handle))

    def sliced(handle, name, slices):
        assert read[id(handle)] <= limit
        array = read_slice(handle, name, slices)
        read[id(handle)] += array.nbytes
        assert live == {id(handle)}
        return array

    expected = load_params(folder, CONFIG)
    limit = 3000
    monkeypatch.setattr(safetensors_folder, "_MAPPED_BYTES", limit)
    monkeypatch.setattr(safetensors_folder, "opened", counted)
    monkeypatch.setattr(safetensors_folder, "read_slice", sliced)
    with safetensors_folder.reader(stored) as read_one:
        for name, tensor in stored.items():
            assert read_one(name, tuple(slice(0, n) for n in tensor.shape)).shape == tensor.shape
    assert not live
    jax.tree.map(np.testing.assert_array_equal, load_params(folder, CONFIG), expected)


def test_shards_keep_to_their_size_and_the_index_tells_the_total(tmp_path):
    export(tmp_path / "out", _params(), CONFIG, max_shard_bytes=900)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in shards]
    for path in shards:
        tensors = load_file(path)  # the library reads what this package writes
        assert sum(x.nbytes for x in tensors.values()) <= 900 or len(tensors) == 1
        assert all(index["weight_map"][name] == path.name for name in tensors)
    assert index["metadata"]["total_size"] == 4 * num_params(CONFIG)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", [CONFIG, MIXED])
def test_types_are_converted_both_ways(tmp_path, dtype, config):
    export(tmp_path / "out", _params(config), config, dtype=dtype)
    assert read_config(tmp_path / "out").dtype == dtype
    rounded = cast(jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), _params(config)), dtype)
    _assert_equal(load_params(tmp_path / "out", config, dtype=dtype), rounded)
    wide = load_params(tmp_path / "out", config, dtype=jnp.float32)
    _assert_equal(wide, jax.tree.map(lambda x: x.astype(np.float32), rounded))
    with pytest.raises(WeightsError, match="'int8' cannot be exported"):
        export(tmp_path / "other", _params(), CONFIG, dtype="int8")


def test_jax_arrays_export_like_numpy_ones(tmp_path, folder):
    export(tmp_path / "out", jax.tree.map(jnp.asarray, _params()), CONFIG)
    _assert_equal(load_params(tmp_path / "out", CONFIG), load_params(folder, CONFIG))


def test_jax_arrays_of_experts_export_like_numpy_ones(tmp_path):
    params = _params(MIXED)
    export(tmp_path / "a", params, MIXED)
    export(tmp_path / "b", jax.tree.map(jnp.asarray, params), MIXED)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_every_expert_has_its_own_tensors(tmp_path):
    """Names, shapes and transposes of the hub's, written here by hand."""
    params = _params(MIXED)
    export(tmp_path / "out", params, MIXED)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stacks = {0: ("layers_000", 0), 1: ("layers_000", 1), 3: ("layers_003", 0)}
    for layer, (name, row) in stacks.items():
        mlp, prefix = params[name]["mlp"], f"model.layers.{layer}.mlp"
        router_DE = mlp["router"]["kernel"][row]
        np.testing.assert_array_equal(stored.pop(f"{prefix}.gate.weight"), router_DE.T)
        for expert in range(5):
            for ours, theirs in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
                tensor = stored.pop(f"{prefix}.experts.{expert}.{theirs}.weight")
                assert tensor.shape == ((6, 7) if ours == "down" else (7, 6))
                np.testing.assert_array_equal(tensor, mlp[ours]["kernel"][row, expert].T)
    for ours in ("gate", "up", "down"):
        tensor = stored.pop(f"model.layers.2.mlp.{ours}_proj.weight")
        np.testing.assert_array_equal(tensor, params["layers_002"]["mlp"][ours]["kernel"][0].T)
    assert not [name for name in stored if ".mlp." in name]
    assert len(stored) == 4 * (2 + 4 + 4 + 2) + 2  # norms, matrices and biases of attention; ends


def test_source_files_are_taken_along(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "qwen2_bfloat16_shards", source)
    (source / "tokenizer.json").write_text('{"a": "ü"}')
    (source / "generation_config.json").write_text('{"eos_token_id": [4, 2], "top_k": 20}')
    config = read_config(source)
    export(tmp_path / "out", load_params(source, config), config, source=source)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out")
    )
    assert after == before | {"dtype": "float32"}
    assert read_config(tmp_path / "out") == dataclasses.replace(config, dtype="float32")
    with pytest.raises(WeightsError, match="not the configuration of these parameters"):
        export(tmp_path / "other", _params(), CONFIG, source=source)


def test_an_existing_folder_is_kept_unless_asked(tmp_path, folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(PlaceError, match="exists already"):
        export(folder, _params(seed=1), CONFIG)
    assert (folder / "model.safetensors").read_bytes() == before
    (folder / "notes").touch()
    export(folder, _params(seed=1), CONFIG, overwrite=True)
    _assert_equal(load_params(folder, CONFIG), _params(seed=1))
    assert (folder / "notes").exists()  # a user's own
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, folder, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_folder.os, "fsync", full)
    for target in (tmp_path / "new", folder):
        with pytest.raises(PlaceError, match="free some space"):
            export(target, _params(seed=1), CONFIG, overwrite=True)
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(safetensors_folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WeightsError, match="100 bytes free"):
        export(tmp_path / "new", _params(), CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    _assert_equal(load_params(folder, CONFIG), _params())


def test_parameters_of_another_configuration_are_not_written(tmp_path):
    params = _params()
    del params["layers"]["mlp"]["down"]
    params["embedding"] = params["embedding"][:, :5]
    with pytest.raises(WeightsError, match=r"\['embedding'\] is \(11, 5\), not \(11, 6\)") as error:
        export(tmp_path / "new", params, CONFIG)
    assert "['mlp']['down']['kernel'] is None, not (2, 10, 6)" in str(error.value)
    with pytest.raises(WeightsError, match=r"config\.json does not exist"):
        export(tmp_path / "new", _params(), CONFIG, source=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_folder.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "new", _params(), CONFIG)
    assert not list(tmp_path.iterdir())


def test_all_wrong_names_come_in_one_error(folder):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((10, 6), np.float32)
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 5), np.float32)

    _rewrite(folder, change)
    with pytest.raises(WeightsError) as error:
        load_params(folder, CONFIG)
    for part in [
        str(folder),
        "2 missing: model.norm.weight, model.layers.1.mlp.up_proj.weight",
        "1 surplus: model.layers.2.mlp.up_proj.weight (model.safetensors)",
        "1 misshapen: model.layers.0.self_attn.q_proj.weight is [16, 5], not [16, 6]",
        "Use the config.json that belongs to these weights",
    ]:
        assert part in str(error.value)


@pytest.fixture
def experts_folder(tmp_path):
    """A whole checkpoint of EXPERTS in one file."""
    export(tmp_path / "experts", _params(EXPERTS), EXPERTS)
    return tmp_path / "experts"


def test_missing_experts_are_named_together(experts_folder):
    def change(tensors):
        for name in list(tensors):
            if ".experts.3." in name or ".1.mlp.experts.0." in name:
                del tensors[name]
        del tensors["model.layers.2.mlp.experts.1.up_proj.weight"]
        del tensors["model.layers.2.mlp.gate.weight"]

    _rewrite(experts_folder, change)
    with pytest.raises(WeightsError) as error:
        load_params(experts_folder, EXPERTS)
    for part in [
        "17 missing: model.layers.2.mlp.gate.weight, ",
        "model.layers.[0,2-3].mlp.experts.3.gate_proj.weight, ",
        "model.layers.1.mlp.experts.[0,3].gate_proj.weight, ",
        "model.layers.2.mlp.experts.[1,3].up_proj.weight, ",
        "model.layers.[0,2-3].mlp.experts.3.down_proj.weight",
        "Use the config.json that belongs to these weights",
    ]:
        assert part in str(error.value)
    assert "surplus" not in str(error.value)


def test_a_configuration_with_other_experts_is_refused(experts_folder):
    fewer = dataclasses.replace(EXPERTS, num_experts=3)
    with pytest.raises(WeightsError, match="24 surplus") as error:
        load_params(experts_folder, fewer)
    message = str(error.value)
    assert "model.layers.[0-3].mlp.experts.[3-4].down_proj.weight (model.safetensors)" in message
    assert "4 misshapen: model.layers.0.mlp.gate.weight is [5, 6], not [3, 6]" in message
    more = dataclasses.replace(EXPERTS, num_experts=300)
    with pytest.raises(WeightsError, match="3540 missing") as error:
        load_params(experts_folder, more)
    assert "model.layers.[0-3].mlp.experts.[5-299].up_proj.weight" in str(error.value)
    assert len(str(error.value)) < 1000
    wider = dataclasses.replace(EXPERTS, expert_dim=8)
    with pytest.raises(WeightsError, match="60 misshapen") as error:
        load_params(experts_folder, wider)
    assert "[0-3].mlp.experts.[0-4].down_proj.weight is [6, 7], not [6, 8]" in str(error.value)
    dense = dataclasses.replace(EXPERTS, dense_layers=(1,))
    with pytest.raises(WeightsError, match=r"3 missing: model\.layers\.1\.mlp\.gate_proj") as error:
        load_params(experts_folder, dense)
    assert "16 surplus: model.layers.1.mlp.gate.weight" in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.layers.0.mlp.experts.gate_up_proj",
            "Its experts are stored fused, as transformers 5",
        ),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", "Shared experts are not implemented"),
        ("model.layers.1.mlp.shared_expert_gate.weight", "Shared experts are not implemented"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "correction of the scores is not"),
    ],
)
def test_tensors_of_other_mixtures_are_refused_by_name(experts_folder, name, message):
    _rewrite(experts_folder, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    with pytest.raises(WeightsError, match=f"1 surplus: {name}.*{message}"):
        load_params(experts_folder, EXPERTS)


def test_names_of_experts_are_listed_by_ranges():
    def name(layer, expert, tail="up_proj.weight"):
        return f"model.layers.{layer}.mlp.experts.{expert}.{tail}"

    assert listed(["a", "b"]) == "a, b"
    assert listed([name(3, 12)]) == name(3, 12)
    several = [name(layer, expert) for layer in (0, 1, 5) for expert in (9, 0, 1, 2)]
    assert listed(several) == name("[0-1,5]", "[0-2,9]")
    assert listed([*several[1:], "z"]) == f"z, {name(0, '[0-2]')}, {name('[1,5]', '[0-2,9]')}"
    many = [name(layer, layer) for layer in range(20)]
    assert (
        listed([*many[:3], *"abcdefg", *many[3:]]) == f"a, b, c, d, e, f, g, {many[0]} and 19 more"
    )


def test_another_architecture_is_refused_in_a_short_message(folder):
    other = dataclasses.replace(CONFIG, num_layers=40, model_type="qwen2", qk_norm=False)
    with pytest.raises(WeightsError, match=r"do not fit its config\.json") as error:
        load_params(folder, other)
    assert "surplus: model.layers.0.self_attn.k_norm.weight" in str(error.value)
    assert len(str(error.value)) < 2000


def test_a_tied_checkpoint_may_repeat_its_head(folder):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    with pytest.raises(WeightsError, match="tie_word_embeddings is true"):
        load_params(folder, TIED)
    _rewrite(folder, repeat)
    params = load_params(folder, TIED)
    assert "head" not in params
    assert head_kernel(params) is params["embedding"]


def test_old_rotary_buffers_are_skipped(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _rewrite(folder, lambda tensors: tensors.update({name: np.ones(2, np.float32)}))
    _assert_equal(load_params(folder, CONFIG), _params())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_named(folder, value, dtype):
    def change(tensors):
        for name in ("lm_head.weight", "model.layers.1.self_attn.k_norm.weight"):
            tensors[name] = tensors[name].astype(dtype)
            tensors[name][..., 1] = value

    _rewrite(folder, change)
    with pytest.raises(WeightsError, match="2 tensors hold NaN or infinity") as error:
        load_params(folder, CONFIG)
    assert "lm_head.weight (model.safetensors)" in str(error.value)
    loaded = load_params(folder, CONFIG, check_finite=False)
    assert not np.isfinite(loaded["head"]).all()


def test_experts_that_are_not_finite_are_named(experts_folder):
    def change(tensors):
        for expert in (1, 4):
            tensors[f"model.layers.2.mlp.experts.{expert}.up_proj.weight"][0, 0] = np.nan

    _rewrite(experts_folder, change)
    with pytest.raises(WeightsError, match="2 tensors hold NaN or infinity") as error:
        load_params(experts_folder, EXPERTS)
    assert "model.layers.2.mlp.experts.[1,4].up_proj.weight (model.safe" in str(error.value)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_named(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.safetensors is not a whole safetensors file"):
        load_params(folder, CONFIG)


def test_a_quantised_file_is_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    _rewrite(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    with pytest.raises(WeightsError, match=f"{name} is stored as I8"):
        load_params(folder, CONFIG)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(WeightsError, match="is not a folder"):
        load_params(tmp_path / "nowhere", CONFIG)
    with pytest.raises(WeightsError, match="holds neither"):
        load_params(tmp_path, CONFIG)
    export(tmp_path / "out", _params(), CONFIG, max_shard_bytes=900)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    os.remove(shards[1])
    os.remove(shards[3])
    with pytest.raises(WeightsError, match=rf"lacks 2 .*{shards[1].name}, {shards[3].name}"):
        load_params(tmp_path / "out", CONFIG)
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(WeightsError, match="is not a shard index"):
        load_params(tmp_path / "out", CONFIG)
    index.unlink()
    with pytest.raises(WeightsError, match=r"but no model\.safetensors\.index\.json"):
        load_params(tmp_path / "out", CONFIG)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    export(tmp_path / "out", _params(), CONFIG, max_shard_bytes=900)
    first, second = sorted((tmp_path / "out").glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(WeightsError, match="is in both"):
        load_params(tmp_path / "out", CONFIG)


def test_names_and_shapes_are_those_of_the_hub(shared_data):
    configs = shared_data / "qwen" / "configs"
    config = decoder_config(json.loads((configs / "Qwen3-0.6B.config.json").read_text()))
    hub = json.loads((configs / "Qwen3-0.6B.weight_shapes.json").read_text())
    table = {name: list(entry.hf_shape) for name, entry in weight_table(config).items()}
    assert hub.pop("lm_head.weight") == table["model.embed_tokens.weight"]  # tied, yet stored
    assert table == hub


def test_parameter_bytes_are_those_of_the_hub(shared_data):
    folder = shared_data / "qwen" / "Qwen3-1.7B"
    config = read_config(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert 2 * num_params(config) == index["metadata"]["total_size"]
    assert set(weight_table(config)) == set(index["weight_map"])


def test_names_and_shapes_of_experts_are_those_of_the_hub(shared_data):
    configs = shared_data / "qwen" / "configs"
    config = decoder_config(json.loads((configs / "Qwen3-30B-A3B.config.json").read_text()))
    table = weight_table(config)
    assert len(table) == 48 * (9 + 3 * 128) + 3
    hub = json.loads((configs / "Qwen3-30B-A3B.weight_shapes_excerpt.json").read_text())
    assert {name: list(table[name].hf_shape) for name in hub} == hub
    # As the hub's index of the model has it: its total_size, of bfloat16.
    assert 2 * num_params(config) == 61_064_245_248


def test_written_config_suits_both_spellings():
    hf = hf_config(CONFIG)
    assert (hf["rope_theta"], hf["torch_dtype"]) == (1e4, "float32")
    assert decoder_config(hf) == CONFIG
