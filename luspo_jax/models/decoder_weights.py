"""Reads and writes decoder weights in a Hugging Face folder, by one table of names.

Both directions, the parameter count and every check read the same table. On a mesh, parameters are
created part by part in place and written tensor by tensor: no host ever holds them all.
"""

import contextlib
import dataclasses
import functools
import json
import math
import operator
import pathlib
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from luspo_jax import sharding
from luspo_jax.hosts import files, processes
from luspo_jax.models import decoder, low_rank, safetensors_folder, vision_config, vision_weights
from luspo_jax.models.decoder_config import ConfigError, DecoderConfig, decoder_config, hf_config
from luspo_jax.models.safetensors_folder import TYPES, Planned, WeightsError, listed

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
}
_MLP = {
    "mlp.gate_proj.weight": ("mlp", "gate", "kernel"),
    "mlp.up_proj.weight": ("mlp", "up", "kernel"),
    "mlp.down_proj.weight": ("mlp", "down", "kernel"),
}
_EXPERTS = {
    "mlp.gate.weight": ("mlp", "router", "kernel"),
    "mlp.experts.{expert}.gate_proj.weight": ("mlp", "gate", "kernel"),
    "mlp.experts.{expert}.up_proj.weight": ("mlp", "up", "kernel"),
    "mlp.experts.{expert}.down_proj.weight": ("mlp", "down", "kernel"),
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # in old checkpoints; computed, not learnt
# What a surplus tensor indicates about a checkpoint, by a part of its name.
_FOREIGN = {
    ".mlp.experts.gate_up_proj": "Its experts are stored fused, as transformers 5 has them in "
    "memory; copy its state_dict() into a model made by from_config and call save_pretrained of "
    "that, which writes one tensor an expert",
    ".shared_expert": "Shared experts are not implemented",
    ".e_score_correction_bias": "Routing with a correction of the scores is not implemented",
}

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
    *vision_weights.COPIED_FILES,
)


Index = tuple[slice, ...]  # part of an array: start and stop in every dimension


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and its place in the parameters.

    Attributes:
      path: keys of the nested dict.
      place: index into the leading axes of that parameter: none, a layer of its stack, or also an
        expert of that layer.
      shape: of the parameter, without these axes.
      hf_shape: of the tensor, which stores a matrix as [outputs, inputs], heads merged.
      transposed: whether the tensor is such a matrix, the parameter's last axes first.
      merged: (from, to) axes of the parameter merged into each dimension of the tensor.
    """

    path: tuple[str, ...]
    place: tuple[int, ...]
    shape: tuple[int, ...]
    hf_shape: tuple[int, ...]
    transposed: bool
    merged: tuple[tuple[int, int], ...]

    def hf_index(self, index: Index) -> Index:
        """Returns the tensor's smallest range, per dimension, that covers a parameter's part.

        If only the first of merged axes is sharded (heads, not their insides), it is exact.
        """
        inner = [math.prod(self.shape[first + 1 : last]) for first, last in self.merged]
        outer = [index[first] for first, _ in self.merged]
        return tuple(slice(s.start * n, s.stop * n) for s, n in zip(outer, inner, strict=True))

    def from_hf(self, array: np.ndarray, index: Index) -> np.ndarray:
        """Returns part `index` of the parameter, from part `hf_index(index)` of the tensor."""
        outer = {first for first, _ in self.merged}
        shape = [
            s.stop - s.start if axis in outer else size
            for axis, (s, size) in enumerate(zip(index, self.shape, strict=True))
        ]
        rest = tuple(slice(None) if axis in outer else s for axis, s in enumerate(index))
        array = array.reshape(len(array), -1).T if self.transposed else array
        return array.reshape(shape)[rest]

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Returns the tensor, from the whole parameter."""
        if self.transposed:
            return array.reshape(-1, self.hf_shape[0]).T.reshape(self.hf_shape)
        return array.reshape(self.hf_shape)


def weight_table(config: DecoderConfig) -> dict[str, Entry]:
    """Maps hub names to Entries, for every tensor of a checkpoint of `config`."""
    abstract = _abstract(config)
    table = {}
    for name, path in _TOP.items():
        if (leaf := _leaf(abstract, path)) is not None:
            own = tuple((axis, axis + 1) for axis in range(len(leaf.shape)))
            table[name] = Entry(path, (), leaf.shape, leaf.shape, False, own)
    for stack in config.stacks:
        for suffix, path in (_LAYER | (_EXPERTS if stack.experts else _MLP)).items():
            path = (stack.name, *path)
            if (leaf := _leaf(abstract, path)) is None:
                continue
            leading = 2 if "{expert}" in suffix else 1
            first = _entry(path, leaf.shape[leading:])
            for place in np.ndindex(leaf.shape[:leading]):
                tail = suffix.format(expert=place[-1])
                name = f"model.layers.{stack.start + place[0]}.{tail}"
                table[name] = dataclasses.replace(first, place=place)
    return table | vision_weights.weight_table(config.vision, Entry)


def _entry(path, shape):
    """Returns the Entry of a parameter's first layer and expert; `shape` excludes both axes."""
    merged, transposed = ((0, len(shape)),), path[-1] == "kernel"
    if transposed:
        inputs = 2 if "out" in path else 1  # number of contracted leading axes
        merged = ((inputs, len(shape)), (0, inputs))
    hf_shape = tuple(math.prod(shape[first:last]) for first, last in merged)
    return Entry(path, (), shape, hf_shape, transposed, merged)


def num_params(config: DecoderConfig) -> int:
    """Counts the learnt numbers of the model; a tied head counts once."""
    return sum(math.prod(entry.shape) for entry in weight_table(config).values())


def load_params(
    folder: str | pathlib.Path,
    config: DecoderConfig,
    *,
    dtype: Any = jnp.float32,
    check_finite: bool = True,
    layout: sharding.Layout | None = None,
) -> dict:
    """Loads the parameters of a checkpoint folder, layers stacked.

    Without a layout: NumPy arrays of `dtype`; put the result on devices before use. With one:
    global arrays of `dtype`, sharded by `decoder.param_axes`. Each process then reads only its own
    devices' parts, one device's part of one parameter at a time, so the host holds only that part
    and the tensor being read; a part that several devices hold is read once. (A part sharded along
    the tensor's last dimension is scattered over the file: only its bytes are copied, yet the disk
    reads whole pages.) Routers are float32 in either case, as in `decoder.abstract_params`.

    Raises:
      WeightsError: a missing or damaged file; or all missing, surplus and misshapen tensors at
        once; or, with `check_finite`, all tensors that hold NaN or infinity. With several
        processes, one whose own parts are sound reports that another's are not.
    """
    with opened(folder, config, dtype=dtype, check_finite=check_finite) as weights:
        abstract = _abstract(config)
        if layout is None:
            params = _map_paths(lambda path, x: weights.part(path, _whole(x.shape)), abstract)
        else:
            places = sharding.shardings(decoder.param_axes(config), layout)
            params = _map_paths(
                lambda path, x, place: _assembled(x.shape, place, path, weights), abstract, places
            )
        _raise_together(weights.problem(), layout)
    return params


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint folder with verified names and shapes, open to be read part by part.

    Attributes:
      folder: its path.
      read: reads a range of each dimension of a named tensor.
      files: the file of each tensor.
      tensors: (name, Entry) of each parameter's tensors, by path and place.
      dtypes: of the parts created, by the parameter's path.
      check_finite: whether parts are checked for NaN and infinity.
      tied_head: whether a head is stored that must equal the embedding.
      faults: names of the faulty tensors.
    """

    folder: pathlib.Path
    read: Callable[[str, Index], np.ndarray]
    files: dict[str, pathlib.Path]
    tensors: dict[tuple[str, ...], dict[tuple[int, ...], tuple[str, Entry]]]
    dtypes: dict[tuple[str, ...], np.dtype]
    check_finite: bool
    tied_head: bool
    faults: set[str] = dataclasses.field(default_factory=set)

    def part(self, path: tuple[str, ...], index: Index) -> np.ndarray:
        """Reads one part of the parameter at `path` and nothing else."""
        made = np.empty([s.stop - s.start for s in index], self.dtypes[path])
        tensors = self.tensors[path]
        leading = len(next(iter(tensors)))
        starts = [s.start for s in index[:leading]]
        for at in np.ndindex(made.shape[:leading]):
            place = tuple(map(operator.add, starts, at))
            made[at] = self._tensor_part(*tensors[place], index[leading:])
        return made

    def problem(self) -> str | None:
        """Describes the faults in the parts read so far; None without faults."""
        if _HEAD in self.faults and self.tied_head:
            return (
                f"{self.folder}: tie_word_embeddings is true, yet {_HEAD} differs from "
                f"{_EMBEDDING}; set it to false in config.json to use that head"
            )
        if self.faults:
            named = [f"{name} ({self.files[name].name})" for name in sorted(self.faults)]
            return (
                f"{self.folder}: {len(named)} tensors hold NaN or infinity: {listed(named)}; "
                f"use an earlier checkpoint or download it again"
            )
        return None

    def _tensor_part(self, name, entry, index):
        hf_index = entry.hf_index(index)
        array = self.read(name, hf_index)
        if self.check_finite and not np.isfinite(array).all():
            self.faults.add(name)
        compared = self.tied_head and name == _EMBEDDING
        if compared and not np.array_equal(self.read(_HEAD, hf_index), array, equal_nan=True):
            self.faults.add(_HEAD)
        return entry.from_hf(array, index)


@contextlib.contextmanager
def opened(
    folder: str | pathlib.Path, config: DecoderConfig, *, dtype: Any, check_finite: bool
) -> Iterator[Source]:
    """Opens a checkpoint folder of `config`.

    Raises:
      WeightsError: a missing or damaged file; or all missing, surplus and misshapen tensors.
    """
    folder = pathlib.Path(folder)
    stored = vision_weights.by_hub_names(safetensors_folder.contents(folder), config.vision)
    table = weight_table(config)
    _check_names(folder, stored, table)
    tensors = defaultdict(dict)
    for name, entry in table.items():
        tensors[entry.path][entry.place] = (name, entry)
    abstract = _abstract(config, dtype)
    dtypes = {path: np.dtype(_leaf(abstract, path).dtype) for path in tensors}
    tied_head = config.tie_embeddings and _HEAD in stored
    with safetensors_folder.reader(stored) as read:
        files = {name: tensor.file for name, tensor in stored.items()}
        yield Source(folder, read, files, tensors, dtypes, check_finite, tied_head)


def parts_on(
    shape: tuple[int, ...], place: jax.sharding.Sharding, devices: Collection[jax.Device]
) -> list[tuple[Index, list[jax.Device]]]:
    """Returns the distinct parts of an array on `devices`, each with the devices that hold it."""
    holders = defaultdict(list)
    for device, index in place.devices_indices_map(shape).items():
        if device in devices:
            ranges = (s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
            holders[tuple(ranges)].append(device)
    return [(tuple(slice(*r) for r in ranges), held) for ranges, held in holders.items()]


def export(
    folder: str | pathlib.Path,
    params: dict,
    config: DecoderConfig,
    *,
    source: str | pathlib.Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool | Literal["own"] | None = None,
    finish: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes a folder that `transformers` loads; it appears whole or not at all.

    One tensor at a time is copied to the host. If `params` are sharded over several processes, all
    call this with the same arguments: each tensor is gathered by all, process 0 writes, and all
    return once the folder exists. If process 0 fails, its exit ends the others' wait.

    Args:
      folder: must not exist yet or be empty, unless `overwrite`.
      params: as from `load_params` or `init_params`, on the host or on devices; adapters in them
        are merged, a tensor at a time.
      config: of `params`.
      source: folder whose config, generation config and tokenizer files are copied.
      dtype: type to store: float32, bfloat16 or float16.
      max_shard_bytes: above this, several files and an index are written.
      overwrite: as in `files.new_folder`.
      finish: called with the folder before it takes its name, to add files.

    Raises:
      PlaceError: the folder is not empty, or cannot be written.
      WeightsError: `params` or `source` do not belong to `config`.
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
    if processes.is_writer():
        with files.new_folder(folder, overwrite=overwrite) as partial:
            safetensors_folder.write_shards(
                partial, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes
            )
            files.write_json(partial / "config.json", hf)
            files.write_json(partial / "generation_config.json", _generation_config(config))
            for name in COPIED_FILES if source is not None else ():
                if (pathlib.Path(source) / name).is_file():
                    shutil.copyfile(pathlib.Path(source) / name, partial / name)
            if finish is not None:
                finish(partial)
    else:
        for tensor in tensors:
            tensor.read()
    processes.barrier("export")


@functools.cache  # tracing the model is slow
def _abstract(config, dtype=jnp.float32):
    return decoder.abstract_params(config, dtype)


def _leaf(tree, path):
    for key in path:
        tree = tree.get(key)
        if tree is None:
            return None
    return tree


def _map_paths(function, *trees):
    """Applies `function` to path and leaves, over nested dicts."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(tuple(key.key for key in path), *leaves), *trees
    )


def _whole(shape):
    return tuple(slice(0, size) for size in shape)


def _assembled(shape, place, path, weights):
    """Builds a global array; this process creates its own devices' parts, one after another."""
    arrays = []
    for index, devices in parts_on(shape, place, place.addressable_devices):
        part = weights.part(path, index)
        copies = [jax.device_put(part, device) for device in devices]
        arrays += jax.block_until_ready(copies)  # before the next part uses memory
    return jax.make_array_from_single_device_arrays(shape, place, arrays)


def _raise_together(problem, layout):
    """Raises if any process has a problem: one that went on alone would wait for the others."""
    anywhere = layout is not None and any(processes.gather(problem is not None))
    if problem is not None:
        raise WeightsError(problem)
    if anywhere:
        raise WeightsError("another process found these weights damaged; its message says where")


def _reader(params, entry):
    def tensor():
        parts = jax.tree.map(lambda x: on_host(x, entry.place), _leaf(params, entry.path))
        return entry.to_hf(np.asarray(low_rank.whole_kernel(entry.path, parts)))

    return tensor


def on_host(leaf, place):
    """Returns an array, or one layer or expert of it, whole on each host."""
    part = _picked(leaf, place)
    if part is leaf and isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        part = jnp.copy(leaf)  # a sharded array keeps its host copy
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        return multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


def _picked(leaf, place):
    """Returns `leaf[place]` via one expert per shard; direct indexing would gather the stack."""
    if not place:
        return leaf
    if len(place) == 2 and isinstance(leaf, jax.Array):
        layer, expert = place
        size = leaf.sharding.shard_shape(leaf.shape)[1]
        if size < leaf.shape[1]:
            return _one_of_each_part(leaf, layer, expert % size, size)[expert // size]
    return leaf[place]


@functools.partial(jax.jit, static_argnames="size")
def _one_of_each_part(leaf, layer, number, size):
    """Returns expert `number` of every part of `size` experts, of one layer: [parts, ...]."""
    count, experts, *rest = leaf.shape
    return leaf.reshape(count, experts // size, size, *rest)[layer, :, number]


def _check_params(params, config):
    shapes = [
        {"".join(f"[{name!r}]" for name in path): x.shape for path, x in low_rank.flat(tree)}
        for tree in (params, _abstract(config))
    ]
    wrong = sorted(
        key for key in {*shapes[0], *shapes[1]} if shapes[0].get(key) != shapes[1].get(key)
    )
    if wrong:
        found = [f"{key} is {shapes[0].get(key)}, not {shapes[1].get(key)}" for key in wrong]
        raise WeightsError(f"the parameters are not those of {config}: {listed(found)}")


def _check_names(folder, stored, table):
    shapes = {name: entry.hf_shape for name, entry in table.items()}
    inert = {name for name in stored if name == _HEAD or _BUFFERS.search(name)}
    problems = safetensors_folder.misfits(stored, shapes, inert)
    if problems:
        told = [text for part, text in _FOREIGN.items() if any(part in name for name in stored)]
        told += ["Use the config.json that belongs to these weights, or download the folder again"]
        raise WeightsError(
            f"the weights of {folder} do not fit its config.json: {'; '.join(problems)}. "
            f"{'. '.join(told)}"
        )


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
    return vision_config.with_dtype(hf, dtype)


def _generation_config(config):
    values = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {key: value for key, value in values.items() if value is not None}
