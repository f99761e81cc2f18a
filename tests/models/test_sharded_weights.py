"""Parameters made on a mesh: the bits of one device, from no more bytes than its parts have."""

import dataclasses
import functools
import math
import pathlib
import re
import shutil
import tracemalloc
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from luspo_jax import sharding
from luspo_jax.models import decoder, decoder_weights, safetensors_folder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.decoder_weights import export, load_params
from luspo_jax.models.safetensors_folder import WeightsError

CONFIG = DecoderConfig(
    model_type="qwen3",
    vocab_size=24,
    num_layers=3,
    embed_dim=16,
    mlp_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    out_bias=True,
    qk_norm=True,
    tie_embeddings=False,
    max_position=64,
    eos_token_ids=(1,),
    pad_token_id=0,
    dtype="float32",
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
MESHES = [
    {"fsdp": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"data": 4, "tensor": 2},
    {"data": 8},
]
EXPERTS = dataclasses.replace(
    CONFIG,
    model_type="qwen3_moe",
    num_experts=8,
    experts_per_token=2,
    expert_dim=24,
    dense_layers=(1,),
)
EXPERT_MESHES = [
    {"expert": 8},
    {"expert": 4, "fsdp": 2},
    {"expert": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "expert": 4},
    {"fsdp": 8},
]
CASES = [(CONFIG, sizes) for sizes in MESHES] + [(EXPERTS, sizes) for sizes in EXPERT_MESHES]


def _layout(sizes):
    return sharding.layout("train", sizes, jax.devices())


_abstract = functools.cache(decoder.abstract_params)  # the model is traced for it


def _params(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        _abstract(config),
    )


def _assert_same(spread, whole, layout, config=CONFIG, rtol=0.0):
    places = sharding.shardings(decoder.param_axes(config), layout)

    def check(x, y, place):
        assert isinstance(x, jax.Array)
        assert x.sharding == place
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=rtol, atol=0)

    jax.tree.map(check, spread, whole, places)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each configuration, only to be read."""
    made = {config: tmp_path_factory.mktemp("folders") / "model" for config in (CONFIG, EXPERTS)}
    for config, folder in made.items():
        export(folder, _params(config), config, max_shard_bytes=9000 * (1 + config.num_experts))
    return made


@pytest.fixture
def folder(tmp_path, folders):
    """A checkpoint of CONFIG to change."""
    return pathlib.Path(shutil.copytree(folders[CONFIG], tmp_path / "model"))


@pytest.fixture
def bytes_read(monkeypatch):
    """Bytes of every tensor that were read, counted where all reading passes."""
    counter, read = Counter(), safetensors_folder.read_slice

    def counted(handle, name, slices):
        array = read(handle, name, slices)
        counter[name] += array.nbytes
        return array

    monkeypatch.setattr(safetensors_folder, "read_slice", counted)
    return counter


@pytest.mark.parametrize(
    ("config", "sizes", "dtype"),
    [(*case, np.float32) for case in CASES] + [(*case, jnp.bfloat16) for case in CASES[1::5]],
)
def test_loaded_parts_are_those_of_the_whole(folders, config, sizes, dtype):
    layout = _layout(sizes)
    loaded = load_params(folders[config], config, dtype=dtype, layout=layout)
    _assert_same(loaded, load_params(folders[config], config, dtype=dtype), layout, config)


@pytest.mark.parametrize("config", [CONFIG, EXPERTS])
def test_any_part_is_cut_from_the_whole(folders, config):
    """Also parts that no table makes, inside a head or of some layers and experts."""
    whole = _params(config)
    rng = np.random.default_rng(1)

    def check(path, leaf):
        for _ in range(5):
            bounds = [sorted(rng.choice(size + 1, 2, replace=False)) for size in leaf.shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            np.testing.assert_array_equal(weights.part(path, index), leaf[index])

    folder = folders[config]
    with decoder_weights.opened(folder, config, dtype="float32", check_finite=True) as weights:
        jax.tree_util.tree_map_with_path(lambda p, x: check(tuple(k.key for k in p), x), whole)


@pytest.mark.parametrize(("config", "sizes"), CASES)
def test_weights_are_read_once(folders, bytes_read, config, sizes):
    """What several devices of a process hold is read once: one copy of every tensor."""
    load_params(folders[config], config, layout=_layout(sizes))
    table = decoder_weights.weight_table(config)
    assert bytes_read == {name: 4 * math.prod(entry.shape) for name, entry in table.items()}


def _read_by(devices, folder, config, sizes):
    """Reads what a process of these devices would."""
    places = sharding.shardings(decoder.param_axes(config), _layout(sizes))
    with decoder_weights.opened(folder, config, dtype="float32", check_finite=True) as weights:

        def read(path, leaf, place):
            for index, _ in decoder_weights.parts_on(leaf.shape, place, devices):
                weights.part(tuple(key.key for key in path), index)

        jax.tree_util.tree_map_with_path(read, decoder.abstract_params(config), places)


@pytest.mark.parametrize(
    ("config", "sizes", "shares"),
    [
        (CONFIG, {"fsdp": 8}, 1.0),
        (CONFIG, {"fsdp": 4, "tensor": 2}, 1.0),
        (CONFIG, {"data": 8}, 2.0),
        (EXPERTS, {"expert": 8}, 1.0),
        (EXPERTS, {"fsdp": 2, "expert": 4}, 1.0),
        (EXPERTS, {"data": 2, "expert": 4}, 2.0),
    ],
)
def test_a_process_reads_its_own_parts(folders, bytes_read, config, sizes, shares):
    """Two processes of four devices: half each where nothing is held twice, all where all is."""
    total = 4 * decoder_weights.num_params(config)
    flat = jax.tree_util.tree_leaves_with_path(_params(config))
    # Norms and biases are few, and some are held by both.
    small = 4 * sum(x.size for path, x in flat if path[-1].key in ("scale", "bias"))
    devices = jax.devices()
    for own in (devices[:4], devices[4:]):
        bytes_read.clear()
        _read_by(own, folders[config], config, sizes)
        most = min(total, shares / 2 * total + small / 2)
        assert shares / 2 * total <= sum(bytes_read.values()) <= most


def test_a_device_reads_the_tensors_of_its_own_experts_alone(folders, bytes_read):
    """And all of each: matrices of experts are not cut where experts are."""
    table = decoder_weights.weight_table(EXPERTS)
    experts = {name: entry.place[1] for name, entry in table.items() if ".experts." in name}
    assert len(experts) == 2 * 8 * 3
    for sizes, per_device in (({"expert": 8}, 1), ({"data": 2, "expert": 4}, 2)):
        for number in (0, 3, 6):
            bytes_read.clear()
            _read_by([jax.devices()[number]], folders[EXPERTS], EXPERTS, sizes)
            first = number * per_device % 8
            own = [n for n, expert in experts.items() if first <= expert < first + per_device]
            assert {n: bytes_read[n] for n in experts if n in bytes_read} == {
                name: 4 * 16 * 24 for name in own
            }


@pytest.mark.parametrize(
    ("config", "changes", "sizes"),
    [
        (CONFIG, {"mlp_dim": 2048, "num_layers": 6}, {"fsdp": 4, "tensor": 2}),
        (EXPERTS, {"expert_dim": 512, "num_layers": 6}, {"expert": 4, "fsdp": 2}),
    ],
)
def test_the_host_holds_one_part_at_a_time(tmp_path, config, changes, sizes):
    """NumPy's peak is one device's part of the largest parameter, a tensor's part, and change."""
    wide = dataclasses.replace(config, embed_dim=512, vocab_size=4096, **changes)
    export(tmp_path / "model", jax.tree.map(np.zeros_like, _params(wide)), wide)
    total = 4 * decoder_weights.num_params(wide)
    layout = _layout(sizes)
    tracemalloc.start()
    loaded = load_params(tmp_path / "model", wide, layout=layout)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    parts = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(loaded)]
    assert total > 80e6
    # On this backend the array on the device *is* the host's array, which all stay.
    assert peak < total + 3 * max(parts)


def test_not_finite_tensors_are_named_on_a_mesh(folder):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in {"lm_head.weight", "model.layers.1.self_attn.k_norm.weight"} & tensors.keys():
            tensors[name][..., 1] = np.nan
        save_file(tensors, file)
    for layout in (None, _layout({"fsdp": 4, "tensor": 2})):
        with pytest.raises(WeightsError, match="2 tensors hold NaN or infinity") as error:
            load_params(folder, CONFIG, layout=layout)
        assert "lm_head.weight (model-" in str(error.value)
        loaded = load_params(folder, CONFIG, check_finite=False, layout=layout)
        assert np.isnan(np.asarray(loaded["head"])).sum() == CONFIG.vocab_size


def test_a_tied_head_is_compared_part_by_part(tmp_path, bytes_read):
    layout = _layout({"fsdp": 4, "tensor": 2})
    export(tmp_path / "model", _params(TIED), TIED)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    _assert_same(load_params(tmp_path / "model", TIED, layout=layout), _params(TIED), layout, TIED)
    assert bytes_read["lm_head.weight"] == bytes_read["model.embed_tokens.weight"]
    other = tensors["model.embed_tokens.weight"].copy()
    other[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": other}, file)
    for where in (layout, None):
        with pytest.raises(WeightsError, match="tie_word_embeddings is true"):
            load_params(tmp_path / "model", TIED, layout=where)


def test_all_wrong_names_come_in_one_error_on_a_mesh(folder):
    other = dataclasses.replace(CONFIG, num_layers=4, mlp_dim=64, qk_norm=False)
    messages = []
    for layout in (None, _layout({"fsdp": 8})):
        with pytest.raises(WeightsError, match=r"missing.*surplus.*misshapen") as error:
            load_params(folder, other, layout=layout)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("sizes", MESHES[1:4:2])
def test_random_parameters_are_those_of_one_device(sizes):
    layout, key = _layout(sizes), jax.random.key(5)
    spread = decoder.init_params(key, CONFIG, layout=layout)
    # Bit for bit with jax 0.10; another program may round the same formula by two units, and with
    # 0.11 does.
    rtol = 0.0 if jax.__version_info__ < (0, 11) else 5e-7
    _assert_same(spread, decoder.init_params(key, CONFIG), layout, rtol=rtol)


def test_random_parameters_of_another_type_and_tied_head():
    layout, key = _layout({"data": 2, "fsdp": 2, "context": 2}), jax.random.key(5)
    spread = decoder.init_params(key, TIED, jnp.bfloat16, layout)
    _assert_same(spread, decoder.init_params(key, TIED, jnp.bfloat16), layout, TIED)


def test_random_parameters_take_a_parts_memory():
    """No device makes more than its part of a matrix: temporaries do not grow with the layers."""
    layout = _layout({"fsdp": 4, "tensor": 2})
    shape, axes = (16, 256, 512), ("layers", "embed", "mlp")
    with jax.enable_x64(True):
        compiled = decoder._normal_part.lower(
            jax.random.key(0), np.uint64(0), shape, axes, layout
        ).compile()
    memory = compiled.memory_analysis()
    whole = 4 * math.prod(shape)
    assert memory.output_size_in_bytes == whole // 8
    assert memory.temp_size_in_bytes < 2 * whole // 8


def _spread(config, sizes):
    places = sharding.shardings(decoder.param_axes(config), _layout(sizes))
    return jax.tree.map(jax.device_put, _params(config), places)


@pytest.mark.parametrize(
    ("config", "sizes", "dtype"),
    [*((*case, "float32") for case in CASES), (CONFIG, MESHES[1], "bfloat16")],
)
def test_spread_parameters_export_to_the_same_bytes(tmp_path, config, sizes, dtype):
    export(tmp_path / "whole", _params(config), config, dtype=dtype)
    export(tmp_path / "spread", _spread(config, sizes), config, dtype=dtype)
    files = [tmp_path / kind / "model.safetensors" for kind in ("whole", "spread")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(CONFIG, {"fsdp": 8}), (EXPERTS, {"expert": 8}), (EXPERTS, {"fsdp": 2, "expert": 4})],
)
def test_export_brings_one_tensor_at_a_time_to_the_host(tmp_path, monkeypatch, config, sizes):
    """Never a whole stack: what is asked for on the host is one tensor of the folder."""
    spread, asked, fetched = _spread(config, sizes), [], np.asarray

    def counted(x, *args, **kwargs):
        if isinstance(x, jax.Array):
            asked.append(x.size)
        return fetched(x, *args, **kwargs)

    monkeypatch.setattr(decoder_weights.np, "asarray", counted)
    monkeypatch.setattr(jax, "device_get", lambda _: pytest.fail("the whole tree was fetched"))
    export(tmp_path / "out", spread, config)
    table = decoder_weights.weight_table(config)
    assert asked == [math.prod(entry.shape) for entry in table.values()]


@pytest.mark.parametrize("sizes", EXPERT_MESHES[:4])
def test_no_stack_of_experts_is_gathered_for_one(sizes):
    """Each device gives the one of its part alone, and these come together in a second program."""
    leaf_LEDF, layout = _spread(EXPERTS, sizes)["layers_002"]["mlp"]["up"]["kernel"], _layout(sizes)
    size = 8 // layout.size("experts")
    compiled = decoder_weights._one_of_each_part.lower(leaf_LEDF, 0, 1 % size, size).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes == 0
    assert memory.output_size_in_bytes == leaf_LEDF.addressable_shards[0].data[0, 0].nbytes
    assert not re.search("all-|collective|permute", compiled.as_text())
    for expert in range(8):
        found = decoder_weights.on_host(leaf_LEDF, (0, expert))
        np.testing.assert_array_equal(found, np.asarray(leaf_LEDF)[0, expert])
