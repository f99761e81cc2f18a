"""Decoder weights from and to a Hugging Face folder, by one table of names.

Both directions, the parameter count and every check read the same table.
"""

import dataclasses
import json
import math
import pathlib
import re
import shutil
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.models import decoder, safetensors_folder
from luspo_jax.models.decoder_config import ConfigError, DecoderConfig, decoder_config, hf_config
from luspo_jax.models.safetensors_folder import TYPES, Planned, WeightsError

_TOP = {
    "model.embed_tokens.weight": ("embedding",),
    "model.norm.weight": ("final_norm", "scale"),
    "lm_head.weight": ("head",),
}
_LAYER = {
    "input_layernorm.weight": ("attention_norm", "scale"),
    "self_attn.q_proj.weight": ("attention", "query", "kernel"),
    "self_attn.q_proj.bias": ("attention", "query", "bias"),
    "self_attn.q_norm.weight": ("attention", "query_norm", "scale"),
    "self_attn.k_proj.weight": ("attention", "key", "kernel"),
    "self_attn.k_proj.bias": ("attention", "key", "bias"),
    "self_attn.k_norm.weight": ("attention", "key_norm", "scale"),
    "self_attn.v_proj.weight": ("attention", "value", "kernel"),
    "self_attn.v_proj.bias": ("attention", "value", "bias"),
    "self_attn.o_proj.weight": ("attention", "out", "kernel"),
    "self_attn.o_proj.bias": ("attention", "out", "bias"),
    "post_attention_layernorm.weight": ("mlp_norm", "scale"),
    "mlp.gate_proj.weight": ("mlp", "gate", "kernel"),
    "mlp.up_proj.weight": ("mlp", "up", "kernel"),
    "mlp.down_proj.weight": ("mlp", "down", "kernel"),
}
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # in old checkpoints: computed, not learnt
_SHOWN = 8  # names listed of each kind in an error

COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and its place in the parameters.

    Attributes:
      path: keys of the nested dict.
      layer: index into the leading axis of that parameter; None outside the layers.
      shape: of the parameter, without the layer axis.
      hf_shape: of the tensor, which stores a matrix as [outputs, inputs], heads merged.
      transposed: whether the tensor is such a matrix.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    hf_shape: tuple[int, ...]
    transposed: bool

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        return (array.T if self.transposed else array).reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        if self.transposed:
            return array.reshape(self.hf_shape[::-1]).T
        return array.reshape(self.hf_shape)


def weight_table(config: DecoderConfig) -> dict[str, Entry]:
    """Every tensor of a checkpoint of `config`: hub name -> Entry."""
    abstract = decoder.abstract_params(config)
    table = {}
    for name, path in _TOP.items():
        if (leaf := _leaf(abstract, path)) is not None:
            table[name] = Entry(path, None, leaf.shape, leaf.shape, False)
    for suffix, path in _LAYER.items():
        path = ("layers", *path)
        if (leaf := _leaf(abstract, path)) is None:
            continue
        shape = leaf.shape[1:]
        hf_shape, transposed = (math.prod(shape),), False
        if path[-1] == "kernel":
            inputs = 2 if "out" in path else 1  # how many leading axes are contracted
            hf_shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
            transposed = True
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}.{suffix}"
            table[name] = Entry(path, layer, shape, hf_shape, transposed)
    return table


def num_params(config: DecoderConfig) -> int:
    """How many numbers the model learns; a tied head counts once."""
    return sum(math.prod(entry.shape) for entry in weight_table(config).values())


def load_params(
    folder: str | pathlib.Path,
    config: DecoderConfig,
    *,
    dtype: Any = jnp.float32,
    check_finite: bool = True,
    layout=None,
) -> dict:
    """Parameters of a checkpoint folder as NumPy arrays of `dtype`, layers stacked.

    Tensors are read one at a time into the stacks. Put the result on devices before use.

    Raises:
      WeightsError: a missing or damaged file; or all missing, surplus and misshapen tensors at
        once; or, with `check_finite`, all tensors that hold NaN or infinity.
    """
    folder = pathlib.Path(folder)
    stored = safetensors_folder.contents(folder)
    table = weight_table(config)
    _check_names(folder, stored, table)
    _check_tied_head(folder, stored, config)
    params = _empty(config, np.dtype(dtype))
    by_file = defaultdict(list)
    for name in table:
        by_file[stored[name].file].append(name)
    bad = []
    for file, names in by_file.items():
        with safetensors_folder.opened(file) as handle:
            for name in names:
                array, entry = handle.get_tensor(name), table[name]
                if check_finite and not np.isfinite(array).all():
                    bad.append(f"{name} ({file.name})")
                target = _leaf(params, entry.path)
                target[() if entry.layer is None else entry.layer] = entry.from_hf(array)
    if bad:
        raise WeightsError(
            f"{folder}: {len(bad)} tensors hold NaN or infinity: {_some(bad)}; "
            f"use an earlier checkpoint or download it again"
        )
    return params


def export(
    folder: str | pathlib.Path,
    params: dict,
    config: DecoderConfig,
    *,
    source: str | pathlib.Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `transformers` loads; it appears whole or not at all.

    Args:
      folder: must not exist yet, unless `overwrite`.
      params: as `load_params` or `init_params` make them; one tensor at a time is copied.
      config: of `params`.
      source: folder whose config, generation config and tokenizer files are taken along.
      dtype: type to store: float32, bfloat16 or float16.
      max_shard_bytes: above this, several files and an index.
      overwrite: replace an existing folder, once the new one is complete.

    Raises:
      WeightsError: the folder exists, the disk is full, or `params` or `source` do not belong
        to `config`.
    """
    dtype = np.dtype(dtype).name
    if dtype not in TYPES:
        raise WeightsError(f"dtype {dtype!r} cannot be exported; use one of {sorted(TYPES)}")
    _check_params(params, config)
    hf = _exported_config(config, source, dtype)
    tensors = [
        Planned(name, entry.hf_shape, _reader(params, entry))
        for name, entry in weight_table(config).items()
    ]
    with safetensors_folder.new_folder(pathlib.Path(folder), overwrite=overwrite) as partial:
        safetensors_folder.write_shards(
            partial, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes
        )
        _write_json(partial / "config.json", hf)
        _write_json(partial / "generation_config.json", _generation_config(config))
        for name in COPIED_FILES if source is not None else ():
            if (pathlib.Path(source) / name).is_file():
                shutil.copyfile(pathlib.Path(source) / name, partial / name)


def _leaf(tree, path):
    for key in path:
        tree = tree.get(key)
        if tree is None:
            return None
    return tree


def _reader(params, entry):
    def read():
        leaf = _leaf(params, entry.path)
        return entry.to_hf(np.asarray(leaf if entry.layer is None else leaf[entry.layer]))

    return read


def _empty(config, dtype):
    def fill(node):
        if isinstance(node, dict):
            return {key: fill(value) for key, value in node.items()}
        return np.empty(node.shape, dtype)

    return fill(decoder.abstract_params(config))


def _check_params(params, config):
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in flat}
        for flat in map(
            jax.tree_util.tree_leaves_with_path, (params, decoder.abstract_params(config))
        )
    ]
    wrong = sorted(
        key for key in {*shapes[0], *shapes[1]} if shapes[0].get(key) != shapes[1].get(key)
    )
    if wrong:
        found = [f"{key} is {shapes[0].get(key)}, not {shapes[1].get(key)}" for key in wrong]
        raise WeightsError(f"the parameters are not those of {config}: {_some(found)}")


def _check_names(folder, stored, table):
    missing = [name for name in table if name not in stored]
    surplus = [
        f"{name} ({stored[name].file.name})"
        for name in sorted(stored)
        if name not in table and name != "lm_head.weight" and not _BUFFERS.search(name)
    ]
    misshapen = [
        f"{name} is {list(stored[name].shape)}, not {list(entry.hf_shape)}"
        for name, entry in table.items()
        if name in stored and stored[name].shape != entry.hf_shape
    ]
    problems = [
        f"{len(names)} {kind}: {_some(names)}"
        for kind, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise WeightsError(
            f"the weights of {folder} do not fit its config.json: {'; '.join(problems)}. "
            f"Use the config.json that belongs to these weights, or download the folder again"
        )


def _check_tied_head(folder, stored, config):
    """A tied checkpoint may repeat its embedding as lm_head.weight; a different head is refused."""
    if not config.tie_embeddings or "lm_head.weight" not in stored:
        return
    arrays = []
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        with safetensors_folder.opened(stored[name].file) as handle:
            arrays.append(handle.get_tensor(name))
    if not np.array_equal(arrays[0], arrays[1], equal_nan=True):
        raise WeightsError(
            f"{folder}: tie_word_embeddings is true, yet lm_head.weight differs from "
            f"model.embed_tokens.weight; set it to false in config.json to use that head"
        )


def _some(names):
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _exported_config(config, source, dtype):
    if source is None:
        return hf_config(dataclasses.replace(config, dtype=dtype))
    path = pathlib.Path(source) / "config.json"
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; name the folder that the weights came from")
    hf = json.loads(path.read_text(encoding="utf-8"))
    unmatched = {"dtype": None, "eos_token_ids": (), "bos_token_id": None, "pad_token_id": None}
    try:
        same = dataclasses.replace(decoder_config(hf), **unmatched)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from None
    if same != dataclasses.replace(config, **unmatched):
        raise WeightsError(f"{path} is not the configuration of these parameters: {config}")
    for name in {"torch_dtype", "dtype"} & hf.keys() or {"torch_dtype"}:
        hf[name] = dtype
    return hf


def _generation_config(config):
    values = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {key: value for key, value in values.items() if value is not None}


def _write_json(path, values):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
