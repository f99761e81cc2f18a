"""A safetensors folder: reads tensors lazily by name; writes them as a stream, all or nothing.

It is one file `model.safetensors`, or shards listed in `model.safetensors.index.json`. The format:
8 bytes of little-endian header length, a JSON header of types, shapes and offsets, then the bytes
(https://github.com/huggingface/safetensors#format). ml_dtypes adds bfloat16 to NumPy.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator

import ml_dtypes
import numpy as np
import safetensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
}
_READABLE = {code for code, _ in TYPES.values()} | {"F64"}


_SHOWN = 8  # names listed of each kind in an error
# Read from memory maps of files before they are dropped. Pages that were read count as memory of
# this process while their map lives, so that one map would make a model take twice its size.
_MAPPED_BYTES = 64 * 2**20
_EXPERT = re.compile(r"(.*\.layers)\.(\d+)(\..*experts)\.(\d+)(\..*)")


class WeightsError(ValueError):
    """A checkpoint cannot be read or written; the message names the file and a remedy."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored tensor: its file, its name there, its shape, and the format's code of its type."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    code: str


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to write: `read()` creates it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def contents(folder: pathlib.Path) -> dict[str, Stored]:
    """Lists every tensor of a folder by name, from the headers only.

    Raises WeightsError on a missing or truncated file or shard, a missing index, a tensor that two
    shards hold, or a type that is not a plain float.
    """
    found: dict[str, Stored] = {}
    for file in _files(folder):
        with opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in found:
                    raise WeightsError(
                        f"{name} is in both {found[name].file.name} and {file.name} of {folder}; "
                        f"download the folder again"
                    )
                piece = handle.get_slice(name)
                found[name] = Stored(file, name, tuple(piece.get_shape()), piece.get_dtype())
    odd = sorted(name for name, stored in found.items() if stored.code not in _READABLE)
    if odd:
        raise WeightsError(
            f"{found[odd[0]].file}: {odd[0]} is stored as {found[odd[0]].code} ({len(odd)} such "
            f"tensors); quantised weights are not implemented, use {sorted(TYPES)}"
        )
    return found


def misfits(
    stored: dict[str, Stored], shapes: dict[str, tuple[int, ...]], ignored: Collection[str] = ()
) -> list[str]:
    """Describes missing, surplus and misshapen tensors of a folder.

    Args:
      stored: as from `contents`.
      shapes: required tensors.
      ignored: names allowed besides.
    """
    missing = [name for name in shapes if name not in stored]
    surplus = [
        f"{name} ({stored[name].file.name})"
        for name in sorted(stored)
        if name not in shapes and name not in ignored
    ]
    misshapen = [
        f"{name} is {list(stored[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in stored and stored[name].shape != shape
    ]
    return [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen))
        if names
    ]


def listed(names: list[str]) -> str:
    """Formats names for an error, abbreviated.

    Expert tensors that differ only in numbers become one:
    `model.layers.[0-47].mlp.experts.[3,120-127].up_proj.weight`.
    """
    experts = defaultdict(set)  # by name and layer
    for name in names:
        if match := _EXPERT.fullmatch(name):
            head, layer, middle, expert, tail = match.groups()
            experts[head, middle, tail, int(layer)].add(int(expert))
    layers = defaultdict(set)  # by name and experts
    for (*name, layer), numbers in experts.items():
        layers[(*name, _ranges(numbers))].add(layer)
    groups = [(name, 1) for name in names if not _EXPERT.fullmatch(name)]
    for (head, middle, tail, numbers), of in layers.items():
        count = sum(len(experts[head, middle, tail, layer]) for layer in of)
        groups.append((f"{head}.{_ranges(of)}{middle}.{numbers}{tail}", count))
    more = sum(count for _, count in groups[_SHOWN:])
    return ", ".join(name for name, _ in groups[:_SHOWN]) + (f" and {more} more" if more else "")


def _ranges(numbers):
    """Formats one number as `7`, several as `[0-3,7]`."""
    runs = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)
    return text if len(numbers) == 1 else f"[{text}]"


@contextlib.contextmanager
def opened(file: pathlib.Path):
    """Opens a safetensors handle that reads NumPy arrays lazily."""
    try:
        handle = safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{file} is not a whole safetensors file ({error}); download it again"
        ) from None
    with handle as open_handle:
        yield open_handle


@contextlib.contextmanager
def reader(stored: dict[str, Stored]) -> Iterator[Callable[..., np.ndarray]]:
    """Yields a function (name, a slice of each dimension) -> array, for the tensors of a folder.

    `name` is a key of `stored`, which may differ from the name in the file. Files are memory-mapped
    until the block ends, anew after every 64 MiB.
    """
    with contextlib.ExitStack() as stack:
        handles, mapped = {}, 0

        def read(name: str, slices: tuple[slice, ...]) -> np.ndarray:
            nonlocal mapped
            if mapped > _MAPPED_BYTES:
                stack.close()
                handles.clear()
                mapped = 0
            file, name = stored[name].file, stored[name].name
            if file not in handles:
                handles[file] = stack.enter_context(opened(file))
            array = read_slice(handles[file], name, slices)
            mapped += array.nbytes
            return array

        yield read


def read_slice(handle, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    """Copies one part of a tensor; all reads of weights go through here."""
    return handle.get_slice(name)[slices]


def _files(folder):
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder; give one that holds a checkpoint")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        shards = sorted(folder.glob("*.safetensors"))
        if shards:
            raise WeightsError(
                f"{folder} holds {len(shards)} safetensors files but no {INDEX}; download it too"
            )
        raise WeightsError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; download the weights, or convert "
            f"other formats to safetensors"
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{folder / INDEX} is not a shard index ({error!r}); download it again"
        ) from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"{folder} lacks {len(missing)} of the {len(names)} shards that {INDEX} lists: "
            f"{', '.join(missing)}; download them"
        )
    return [folder / name for name in names]


def write_shards(
    folder: pathlib.Path, tensors: list[Planned], *, dtype: str, max_shard_bytes: int
) -> None:
    """Writes the tensors in order, one in memory at a time; an index if one file is not enough."""
    itemsize = TYPES[dtype][1].itemsize
    sizes = [int(np.prod(tensor.shape)) * itemsize for tensor in tensors]
    free = shutil.disk_usage(folder).free
    if sum(sizes) > free:
        raise WeightsError(
            f"{folder.parent} has {free:,} bytes free and the weights take {sum(sizes):,}; "
            f"free some space or export elsewhere"
        )
    shards = _shards(tensors, sizes, max_shard_bytes)
    if len(shards) == 1:
        write_file(folder / WEIGHTS, shards[0], dtype)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, dtype)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors, sizes, max_shard_bytes):
    shards, filled = [[]], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def write_file(file: pathlib.Path, tensors: list[Planned], dtype: str) -> None:
    """Writes one file of tensors in order, one in memory at a time."""
    code, numpy_dtype = TYPES[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        end = offset + int(np.prod(tensor.shape)) * numpy_dtype.itemsize
        header[tensor.name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts 8-byte aligned
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read().astype(numpy_dtype, copy=False))
            stream.write(array.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
