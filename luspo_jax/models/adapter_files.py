"""Low-rank adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

A tensor is named after the module of the weight that it adapts, and is stored as torch's linear
layers are: lora_A [r, in] and lora_B [out, r] (https://huggingface.co/docs/peft). Of a
vision-language model, modules are those that `transformers` has in memory, not the hub's.
"""

import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from luspo_jax.hosts import files, processes
from luspo_jax.models import decoder, decoder_weights, low_rank, safetensors_folder, vision_weights
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.models.low_rank import Adapter
from luspo_jax.models.safetensors_folder import Planned, Stored, WeightsError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"lora_A": "a", "lora_B": "b"}
# Variants whose tensors mean something else than A and B; as they must be.
_PLAIN = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
}


def write(
    folder: str | pathlib.Path,
    trained: Mapping[str, Any],
    config: DecoderConfig,
    adapter: Adapter,
    *,
    base: str = "",
    overwrite: bool | Literal["own"] | None = None,
) -> None:
    """Writes an adapter, float32, as a folder that `peft` loads; it appears whole or not at all.

    Process 0 writes; all must call.

    Args:
      folder: must not exist yet or be empty, unless `overwrite`.
      trained: A and B, as from `low_rank.begun`.
      config: of the model.
      adapter: of `trained`.
      base: name of the model, for whoever loads the adapter.
      overwrite: as in `files.new_folder`.
    """
    table = tensor_table(config, adapter)
    tensors = [
        Planned(name, shape, _reader(trained, path, place, shape))
        for name, (path, place, shape) in table.items()
    ]
    if processes.is_writer():
        with files.new_folder(folder, overwrite=overwrite) as partial:
            safetensors_folder.write_file(partial / WEIGHTS, tensors, "float32")
            files.write_json(partial / CONFIG, peft_config(config, adapter, base))
    else:
        for tensor in tensors:
            tensor.read()
    processes.barrier("adapter")


def tensor_table(
    config: DecoderConfig, adapter: Adapter
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, int]]]:
    """Returns PEFT's name of each tensor → (path of A or B, layer and expert, stored shape)."""
    places = low_rank.places(decoder.param_axes(config), adapter)
    table = {}
    for name, entry in decoder_weights.weight_table(config).items():
        if entry.path not in places:
            continue
        module = _PREFIX + _in_memory(name.removesuffix(".weight"), config)
        outputs, inputs = entry.hf_shape
        shapes = {"lora_A": (adapter.rank, inputs), "lora_B": (outputs, adapter.rank)}
        for part, shape in shapes.items():
            path = (*entry.path, _PARTS[part])
            table[f"{module}.{part}.weight"] = (path, entry.place, shape)
    return table


def peft_config(config: DecoderConfig, adapter: Adapter, base: str = "") -> dict[str, Any]:
    """Returns what adapter_config.json holds."""
    targets = sorted(adapter.targets)
    if config.num_experts or config.vision:  # a bare name could also be a module without adapter
        names = tensor_table(config, adapter)
        modules = {name.removeprefix(_PREFIX).rsplit(".", 2)[0] for name in names}
        targets = sorted(modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rslora,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read(folder: str | pathlib.Path, config: DecoderConfig, adapter: Adapter) -> dict[str, Any]:
    """Reads an adapter of PEFT's format: A and B as NumPy arrays, float32, layers stacked.

    Args:
      folder: with both files.
      config: of the model that it is to adapt.
      adapter: what it must be: rank, scale and matrices.

    Raises:
      WeightsError: it is of another kind, scale or base: all missing, surplus and misshapen tensors
        at once.
    """
    folder = pathlib.Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder} holds no {name}: name a folder in PEFT's format")
    _check_config(folder, json.loads((folder / CONFIG).read_text()), adapter)
    table = tensor_table(config, adapter)
    by_path: dict[tuple[str, ...], dict[tuple[int, ...], np.ndarray]] = defaultdict(dict)
    with safetensors_folder.opened(folder / WEIGHTS) as handle:
        stored = {}
        for name in handle.keys():  # noqa: SIM118  (a handle is no mapping)
            own = _PREFIX + _in_memory(vision_weights.hub_name(name.removeprefix(_PREFIX)), config)
            part = handle.get_slice(name)
            stored[own] = Stored(folder / WEIGHTS, name, tuple(part.get_shape()), part.get_dtype())
        shapes = {name: shape for name, (_, _, shape) in table.items()}
        problems = safetensors_folder.misfits(stored, shapes, set())
        if problems:
            raise WeightsError(
                f"the adapter of {folder} is not of this model and lora.targets: "
                f"{'; '.join(problems)}"
            )
        for name, (path, place, _) in table.items():
            array = handle.get_tensor(stored[name].name).astype(np.float32)
            by_path[path][place] = array.T
    abstract = decoder.abstract_trained(Forward(config, adapter=adapter))

    def stacked(keys, like):
        found = by_path[tuple(key.key for key in keys)]
        return np.stack([found[place] for place in sorted(found)]).reshape(like.shape)

    return jax.tree_util.tree_map_with_path(stacked, abstract)


def _check_config(folder, stored, adapter):
    if stored.get("peft_type") != "LORA":
        raise WeightsError(f"{folder} is a {stored.get('peft_type')} adapter; LORA is read")
    other = [
        f"{name}={stored[name]!r}"
        for name, plain in _PLAIN.items()
        if name in stored and stored[name] not in plain
    ]
    if other:
        raise WeightsError(f"{folder}: {', '.join(other)} is not implemented")
    theirs = Adapter(
        rank=stored["r"], alpha=stored["lora_alpha"], rslora=stored.get("use_rslora", False)
    )
    if (theirs.rank, theirs.scale) != (adapter.rank, adapter.scale):
        raise WeightsError(
            f"{folder} has rank {theirs.rank} and alpha {theirs.alpha:g} (use_rslora "
            f"{theirs.rslora}), and lora.rank={adapter.rank} lora.alpha={adapter.alpha:g} "
            f"lora.rslora={adapter.rslora} are asked for: set these"
        )


def _in_memory(name, config):
    """Returns the module of a hub name, as `transformers` has it in memory."""
    if config.vision is None:
        return name
    return re.sub(r"^(?:model\.(?=layers)|(?=visual\.))", _renamed, name)


def _renamed(match):
    return "model.language_model." if match[0] else "model."


def _reader(trained, path, place, shape):
    def tensor():
        array = decoder_weights.on_host(low_rank.at(trained, path), place)
        return np.asarray(array).reshape(shape[::-1]).T

    return tensor
