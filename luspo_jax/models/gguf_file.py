"""A GGUF file, the format of llama.cpp: its metadata, and its tensors out of their blocks.

The package `gguf` of the same project reads and dequantises. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from luspo_jax.models.safetensors_folder import WeightsError

_MAGIC = b"GGUF"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the file, not yet dequantised.

    Attributes:
      shape: outermost dimension first, as in NumPy.
      kind: how it is stored: F32, Q4_1, ….
      data: its blocks, in the memory map of the file.
    """

    shape: tuple[int, ...]
    kind: str
    data: np.ndarray

    def values(self, part: int | None = None) -> np.ndarray:
        """Returns the numbers in float32, or those of one part along the first dimension."""
        return _dequantised(self.data if part is None else self.data[part], self.kind)

    def check_kind(self) -> None:
        """Dequantises one row.

        Raises:
          NotImplementedError: the package has no rule for this kind.
        """
        _dequantised(self.data.reshape(-1, self.data.shape[-1])[:1], self.kind)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The contents of a GGUF file.

    Attributes:
      path: of the file.
      metadata: values by key.
      tensors: by name, in the file's order.
    """

    path: pathlib.Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        """Returns llama.cpp's name of the model family."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def kinds(self) -> dict[str, int]:
        """Counts the tensors of each kind."""
        return dict(Counter(tensor.kind for tensor in self.tensors.values()))


def read(path: pathlib.Path) -> GgufFile:
    """Reads metadata and places of the tensors; their numbers stay in the file.

    Raises:
      FileNotFoundError: there is no such file.
      WeightsError: it is no GGUF file, damaged, one part of several, an adapter, or quantised in a
        way that the package `gguf` does not undo; or that package is not installed.
    """
    _check_magic(path)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise WeightsError(
            f"{path} needs the package gguf: pip install -e '.[gguf]' (or pip install gguf)"
        ) from None
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {
            found.name: Tensor(
                tuple(int(size) for size in reversed(found.shape)),
                found.tensor_type.name,
                found.data,
            )
            for found in reader.tensors
        }
    except Exception as error:  # a damaged file raises any kind, from NumPy or from the package
        raise WeightsError(
            f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}): it is cut off or "
            "damaged, download it again; or it needs a later gguf, pip install -U gguf"
        ) from error
    file = GgufFile(path, metadata, tensors)
    _check_whole(file)
    _check_kinds(file)
    return file


def _check_magic(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a GGUF file")
    with path.open("rb") as stream:
        start = stream.read(len(_MAGIC))
    if start != _MAGIC:
        raise WeightsError(f"{path} is not a GGUF file: it begins with {start!r}, not {_MAGIC!r}")


def _check_whole(file):
    parts = file.metadata.get("split.count", 0)
    if parts > 1:
        raise WeightsError(
            f"{file.path} is one of {parts} parts: join them first, llama-gguf-split --merge FIRST "
            "WHOLE"
        )
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise WeightsError(f"{file.path} holds no model (general.type is {kind!r}): name another")


def _check_kinds(file):
    unreadable = {}
    for name, tensor in file.tensors.items():
        if tensor.kind not in unreadable:
            try:
                tensor.check_kind()
                unreadable[tensor.kind] = None
            except NotImplementedError:
                unreadable[tensor.kind] = name
    for kind, name in unreadable.items():
        if name is not None:
            raise WeightsError(
                f"{file.path}: {name} is stored as {kind}, which the package gguf does not undo: "
                "take a file of another quantisation, as Q8_0 or Q4_K_M"
            )


def _dequantised(data, kind):
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(np.asarray(data), GGMLQuantizationType[kind])
