"""Examples in an array_record file built by TFDS: random access without holding all in memory."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import operator
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

from luspo_jax.datasets.example import DataError, Example, Report
from luspo_jax.hosts import files
from luspo_jax.hosts.buckets import Bucket

_REPORT = "report.json"  # written last: what has it is complete
_FORMAT = "2.0.0"
# Examples per record: TFDS takes 0.06 ms to write a record and 0.14 ms to read one, whatever its
# size; that is ten times the cost of an example.
_BLOCK = 64


class StoredExamples(Sequence):
    """The examples of a built dataset; each access reads one block."""

    def __init__(self, blocks: Sequence, size: int, folder: pathlib.Path):
        self._blocks, self._size, self._folder = blocks, size, folder
        self._latest: tuple[int, list] = (-1, [])

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        return Example(index, *self._block(index // _BLOCK)[index % _BLOCK])

    def __iter__(self) -> Iterator[Example]:
        blocks = map(self._block, range(len(self._blocks)))
        return itertools.starmap(_example, enumerate(itertools.chain.from_iterable(blocks)))

    def _block(self, number: int) -> list:
        latest, rows = self._latest
        if latest != number:
            try:
                rows = json.loads(self._blocks[number]["examples"])
            except Exception as error:  # readers of a damaged file raise any kind of error
                raise DataError(
                    f"the built dataset {self._folder} is damaged ({error}): delete this folder, "
                    "and the same command builds it anew"
                ) from error
            self._latest = number, rows
        return rows


def _example(number: int, row: list) -> Example:
    return Example(number, *row)


def file_sha256(path: pathlib.Path) -> str:
    """Returns the hex digest of a file.

    Raises:
      DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def default_data_dir() -> pathlib.Path:
    """Returns the default folder of built datasets."""
    return files.user_cache() / "datasets"


def build_once(
    folder: pathlib.Path,
    read: Callable[[pathlib.Path], tuple[Iterable[bytes], Report]],
    *,
    kept: Bucket | None = None,
) -> tuple[StoredExamples, Report]:
    """Opens the dataset built in `folder`; reads and builds it first if missing or incomplete.

    It is built in a temporary folder and then renamed, so that a killed build leaves nothing that
    looks complete, and of two processes building at once one wins.

    Args:
      folder: the dataset's folder.
      read: maps a folder for intermediate files to ([problem, answer, meta] of each example as
        JSON, report on the rows).
      kept: where the dataset is kept for other hosts: what is there is downloaded and not built,
        and what is missing there is written, its report last. Hosts that write at once write the
        same.

    Raises:
      BucketError: `kept` cannot be read or written.
      DataError: an error from `read`, or a folder that cannot be written.
    """
    found = _stored(folder)
    if found is None:
        with _scratch(folder) as scratch:
            there = kept is not None and _download(kept, scratch / "built")
            if not there:
                _build_in(scratch, read)
            _replace(folder, scratch)
        found = _stored(folder)
    else:
        there = kept is not None and kept.read(_REPORT) is not None
    if found is None:
        raise DataError(
            f"the built dataset {folder} cannot be read: name another folder in data.cache_dir "
            "(of experiments.evaluate: --cache_dir)"
        )
    if kept is not None and not there:
        _upload(kept, folder)
    return found


def _download(kept: Bucket, built: pathlib.Path) -> bool:
    """Downloads a dataset; returns False, and leaves nothing, if there is no complete one."""
    names = kept.entries()
    if _REPORT not in names:
        return False
    for name in names:
        kept.download(name, built / name)
    if _stored(built) is not None:
        return True
    shutil.rmtree(built)
    return False


def _upload(kept: Bucket, folder: pathlib.Path) -> None:
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    for name in sorted(names, key=lambda name: (name == _REPORT, name)):
        kept.upload(name, folder / name)


@contextlib.contextmanager
def _scratch(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Creates a temporary folder next to another and removes it after use."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"built datasets cannot be kept in {folder.parent} ({error.strerror or error}): name a "
            "folder that can be written in data.cache_dir (of experiments.evaluate: --cache_dir)"
        ) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build_in(scratch: pathlib.Path, read) -> None:
    """Builds in `scratch/built`."""
    built = scratch / "built"
    built.mkdir()
    lines, report = read(scratch)
    _build(built, lines)
    sizes = {file.name: file.stat().st_size for file in built.rglob("*.array_record*")}
    record = {"report": dataclasses.asdict(report), "sizes": sizes}
    (built / _REPORT).write_text(json.dumps(record))


def _replace(folder: pathlib.Path, scratch: pathlib.Path) -> None:
    """Moves the build into place, and an unreadable previous one out of it."""
    with contextlib.suppress(OSError):  # there was no previous one
        if _stored(folder) is None:
            folder.rename(scratch / "old")
    with contextlib.suppress(OSError):  # the other process was first
        (scratch / "built").rename(folder)


def _stored(folder: pathlib.Path) -> tuple[StoredExamples, Report] | None:
    """Returns the dataset in a folder; None if there is none or it is incomplete."""
    try:
        record = json.loads((folder / _REPORT).read_text())
        report = Report(**record["report"])
        files = {file.name: file.stat().st_size for file in folder.rglob("*.array_record*")}
        if not files or files != record["sizes"]:
            return None
        return StoredExamples(_open(folder), report.examples, folder), report
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return None


@functools.cache
def _builder_class():
    """Returns the TFDS builder of blocks of examples; imports TFDS only here."""
    import tensorflow_datasets as tfds

    class Problems(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Problems with reference answers: blocks of [problem, answer, meta], as JSON."""

        VERSION = tfds.core.Version(_FORMAT)
        # There are no checksums beside this code; searching for them needs importlib_resources,
        # which TFDS does not install.
        code_path = None
        lines: Iterable[bytes] = ()

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"examples": tfds.features.Text()}),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"examples": self._generate_examples()}

        def _generate_examples(self):
            lines = iter(self.lines)
            for number in itertools.count():
                block = list(itertools.islice(lines, _BLOCK))
                if not block:
                    return
                yield number, {"examples": b"[" + b",".join(block) + b"]"}

    tfds.disable_progress_bar()
    return Problems


def _builder(folder: pathlib.Path):
    return _builder_class()(data_dir=folder, file_format="array_record")


def _build(folder: pathlib.Path, lines: Iterable[bytes]) -> None:
    builder = _builder(folder)
    builder.lines = lines
    # TFDS prints progress on standard output, which belongs to the run.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()


def _open(folder: pathlib.Path) -> Sequence:
    return _builder(folder).as_data_source(split="examples")
