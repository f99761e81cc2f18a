"""Examples in an array_record file built by TFDS: random access without holding them in memory."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import operator
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from luspo_jax.datasets.example import Example, Report

_FORMAT = "1.0.0"


class StoredExamples(Sequence):
    """The examples of a built dataset; reads one record an access."""

    def __init__(self, records: Sequence):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return _example(self._records[index % len(self)])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def _example(record: dict) -> Example:
    return Example(
        id=int(record["id"]),
        problem=record["problem"].decode(),
        answer=record["answer"].decode(),
        meta=json.loads(record["meta"]),
    )


def file_sha256(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def default_data_dir() -> pathlib.Path:
    """Where built datasets go unless the caller says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "luspo_jax" / "datasets"


def build_once(
    folder: pathlib.Path, read: Callable[[], tuple[list[Example], Report]]
) -> tuple[StoredExamples, Report]:
    """The dataset built in `folder`; read and built first if it is not there yet.

    It is built beside its place and renamed, so that a killed build leaves nothing that looks
    whole, and of two processes that build at once one wins.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        examples, report = read()
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _build(scratch, examples)
            (scratch / "report.json").write_text(json.dumps(dataclasses.asdict(report)))
            with contextlib.suppress(OSError):  # the other process was first
                scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    report = Report(**json.loads((folder / "report.json").read_text()))
    return StoredExamples(_open(folder)), report


@functools.cache
def _builder_class():
    """The TFDS builder of a list of examples. TFDS is imported here, where it is used."""
    import tensorflow_datasets as tfds

    class Problems(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Problems with reference answers; `meta` is JSON."""

        VERSION = tfds.core.Version(_FORMAT)
        # No checksums lie beside this code; looking for them needs importlib_resources, which TFDS
        # does not install.
        code_path = None
        examples: Sequence[Example] = ()

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"id": np.int64} | dict.fromkeys(
                ("problem", "answer", "meta"), tfds.features.Text()
            )
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"examples": self._generate_examples()}

        def _generate_examples(self):
            for example in self.examples:
                fields = dataclasses.asdict(example)
                yield example.id, fields | {"meta": json.dumps(example.meta, ensure_ascii=False)}

    tfds.disable_progress_bar()
    return Problems


def _builder(folder: pathlib.Path):
    return _builder_class()(data_dir=folder, file_format="array_record")


def _build(folder: pathlib.Path, examples: Sequence[Example]) -> None:
    builder = _builder(folder)
    builder.examples = examples
    # TFDS announces what it does on standard output, which belongs to the run.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()


def _open(folder: pathlib.Path) -> Sequence:
    return _builder(folder).as_data_source(split="examples")
