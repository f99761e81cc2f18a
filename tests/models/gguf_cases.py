"""Small GGUF files, written by the package gguf with its own names, as llama.cpp writes them."""

import re

import jax
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH_NAMES
from safetensors.numpy import load_file

from luspo_jax.models import decoder, decoder_weights
from luspo_jax.models.decoder_config import DecoderConfig
from tests.models.gguf_vocabularies import byte_level

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
VOCABULARY = byte_level()


def config(kind, **changes):
    """A small decoder of a family; rows of its matrices are whole blocks of every plain kind."""
    values = {
        "model_type": kind,
        "vocab_size": len(VOCABULARY["tokenizer.ggml.tokens"]),
        "num_layers": 2,
        "embed_dim": 32,
        "mlp_dim": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8 if kind in ("llama", "qwen2") else 16,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind.startswith("qwen3"),
        "tie_embeddings": False,
        "max_position": 4096,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "eos_token_ids": (2,),
        "dtype": "float32",
    }
    if kind == "qwen3_moe":
        values |= {"num_experts": 4, "experts_per_token": 2, "expert_dim": 32, "norm_topk": True}
    return DecoderConfig(**(values | changes))


def hub_tensors(config, folder, *, seed=0):
    """Random tensors by hub name, and the parameters they make up, through our own folder."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), decoder.abstract_params(config)
    )
    decoder_weights.export(folder, params, config)
    return load_file(folder / "model.safetensors"), params


def metadata(config):
    """Keys and values of a configuration, as the converter writes them."""
    arch = ARCHITECTURES[config.model_type]
    values = {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if config.head_dim != config.embed_dim // config.num_heads:
        values |= {f"attention.{x}_length": config.head_dim for x in ("key", "value")}
    if config.model_type == "llama":
        values |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    if config.num_experts:
        values |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.experts_per_token,
            "expert_feed_forward_length": config.expert_dim,
        }
    return {f"{arch}.{key}": value for key, value in values.items()}


def llama_cpp_tensors(config, tensors):
    """Tensors under llama.cpp's names and in its order of rows."""
    names = get_tensor_name_map(
        next(
            key
            for key, name in MODEL_ARCH_NAMES.items()
            if name == ARCHITECTURES[config.model_type]
        ),
        config.num_layers,
    )
    found, experts = {}, {}
    for name, values in tensors.items():
        stem, _, ending = name.rpartition(".")
        if config.model_type == "llama" and (match := re.search(r"\.([qk])_proj$", stem)):
            values = _rotated(values, config.num_heads if match[1] == "q" else config.num_kv_heads)
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", stem):
            experts.setdefault((f"{match[1]}.{match[3]}", ending), {})[int(match[2])] = values
        else:
            found[f"{names.get_name(stem)}.{ending}"] = values
    for (stem, ending), parts in experts.items():
        stacked = np.stack([parts[number] for number in range(len(parts))])
        found[f"{names.get_name(stem)}.{ending}"] = stacked
    return found


def _rotated(values, heads):
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def write(path, architecture, values, tensors, *, kind="F32", blocks=None):
    """Writes a file; matrices are quantised as `kind`, vectors never.

    Args:
      blocks: (kind, bytes) of tensors that are quantised already, by name.
    """
    writer = GGUFWriter(path, architecture)
    for key, value in values.items():
        _add(writer, key, value)
    quantised = GGMLQuantizationType[kind]
    for name, x in tensors.items():
        if blocks and name in blocks:
            theirs, made = blocks[name]
            writer.add_tensor(name, made, raw_dtype=GGMLQuantizationType[theirs])
        elif x.ndim == 1 or kind == "F32":
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, quants.quantize(x, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    adders = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
    getattr(writer, adders.get(type(value), "add_array"))(key, value)


def small_file(path, config, *, kind="F32", extra=None, drop=(), tensors=None, blocks=None):
    """Writes a file of random weights; returns (hub tensors, parameters).

    Args:
      extra: metadata to add or replace.
      drop: names of metadata or tensors to leave out.
      tensors: to add, by llama.cpp's name.
      blocks: as of `write`.
    """
    hub, params = hub_tensors(config, path.parent / f"{path.stem}-hub")
    values = metadata(config) | VOCABULARY | (extra or {})
    stored = llama_cpp_tensors(config, hub) | (tensors or {})
    write(
        path,
        ARCHITECTURES[config.model_type],
        {key: value for key, value in values.items() if key not in drop},
        {name: x for name, x in stored.items() if name not in drop},
        kind=kind,
        blocks=blocks,
    )
    return hub, params
