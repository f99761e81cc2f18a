"""Datasets by name, and the function that loads one."""

import dataclasses
import hashlib
import inspect
import pathlib
from collections.abc import Iterable, Sequence

from luspo_jax.datasets import filters, sources
from luspo_jax.datasets.contests import AIME, AMC, MATH500
from luspo_jax.datasets.dapo_math import DAPO_LAYOUT
from luspo_jax.datasets.example import DataError, Example, Report
from luspo_jax.datasets.geometry3k import GEOMETRY3K
from luspo_jax.datasets.gsm8k import GSM8K
from luspo_jax.datasets.label_lookup import LabelLookup
from luspo_jax.datasets.label_sums import LabelSums
from luspo_jax.datasets.open_problems import MINERVA, OLYMPIADBENCH
from luspo_jax.datasets.reasoning_gym import reasoning_gym
from luspo_jax.datasets.rows import names_in
from luspo_jax.datasets.selection import ALL, Selection
from luspo_jax.datasets.shapes import Shapes
from luspo_jax.datasets.store import build_once, default_data_dir, file_sha256
from luspo_jax.datasets.table import READER_VERSION, Columns, Table, read_file
from luspo_jax.datasets.virl39k import VIRL39K
from luspo_jax.datasets.visual_benchmarks import (
    DYNAMATH,
    LOGICVISTA,
    MATHVERSE,
    MATHVISION,
    MATHVISTA,
    WEMATH,
)
from luspo_jax.hosts import fetched, files
from luspo_jax.hosts.buckets import Bucket, is_bucket
from luspo_jax.hosts.values import nearest

# A Table reads a file. Anything else is a generator: a function of the split and its own options
# that returns a sequence of examples.
DATASETS = {
    "aime24": AIME,
    "aime25": AIME,
    "amc23": AMC,
    "dapo_math_17k": DAPO_LAYOUT,
    "dynamath": DYNAMATH,
    "geometry3k": GEOMETRY3K,
    "gsm8k": GSM8K,
    "label_lookup": LabelLookup,
    "label_sums": LabelSums,
    "logicvista": LOGICVISTA,
    "math500": MATH500,
    "mathverse": MATHVERSE,
    "mathvision": MATHVISION,
    "mathvista": MATHVISTA,
    "minerva_math": MINERVA,
    "olympiadbench": OLYMPIADBENCH,
    "reasoning_gym": reasoning_gym,
    "shapes": Shapes,
    "virl39k": VIRL39K,
    "wemath": WEMATH,
    # A user's own file: its columns must be named.
    "file": Table(problem=("problem",), answer=("answer",), images=("image", "images")),
}


@fetched.addressed()
def load(
    name: str,
    path: str | pathlib.Path | None = None,
    split: str = "train",
    *,
    data_dir: str | pathlib.Path | None = None,
    columns: Columns | None = None,
    selection: Selection = ALL,
    **options,
) -> tuple[Sequence[Example], Report]:
    """Loads a dataset as a random-access sequence of examples, with a report on its rows.

    Args:
      name: a key of DATASETS.
      path: files, as `sources.found` reads it: one, several by a pattern, a folder, the address of
        a bucket, or "hub:OWNER/NAME[@REVISION][/FILE, FOLDER or PATTERN]"; None for a generator.
      split: the split; it applies to folders, repositories and generators, since a file is one
        split.
      data_dir: folder of the built dataset; by default the user's cache. In a bucket it is kept for
        other hosts, and read from the user's cache.
      columns: columns of the file that replace the dataset's own, and more to keep; None for none.
      selection: which rows are taken.
      **options: a generator's own options.

    Raises:
      DataError: an invalid name, file, row or column.
      BucketError: a bucket that cannot be used.
    """
    entry, columns = _entry(name), columns or Columns()
    if not isinstance(entry, Table):
        if path or columns.problem or columns.answer or columns.image or selection.chooses:
            given = f" (path {path!r})" if path else ""
            raise DataError(
                f"dataset {name!r} is generated: it takes no path, no columns and no selection of "
                f"rows{given}"
            )
        try:
            inspect.signature(entry).bind(split=split, **options)
        except TypeError as error:
            raise DataError(f"dataset {name!r}: {error}") from None
        examples = entry(split=split, **options)
        origin = getattr(examples, "origin", f"generator ({split})")
        return examples, Report(name, origin, "", len(examples), len(examples))
    if options:
        raise DataError(f"dataset {name!r} has no options {sorted(options)}")
    paths = _files(name, path, split, selection)
    table = entry.with_columns(columns)
    digest = _sha256(table, paths)
    filters.made(selection.filter)  # a wrong one is refused even where its rows are built already
    read_from = (table.meta, table.fields, table.identity, table.images, table.keep)
    # A part of the rows has a key of its own; that of all of them is as it was.
    part = (selection.filter, selection.limit) if selection.filter or selection.limit else ()
    how = (*read_from, selection.drop_bad_rows, *part)
    key = _key(READER_VERSION, digest, table.problem, table.answer, *how)
    remote = Bucket(f"{str(data_dir).rstrip('/')}/{name}/{key}") if is_bucket(data_dir) else None
    here = data_dir if data_dir and remote is None else default_data_dir()

    def read(scratch: pathlib.Path) -> tuple[Iterable[bytes], Report]:
        spool = (scratch / "rows").open("w+b")
        kept, counts = read_file(table, paths, spool, selection)
        if columns.image and not counts.pictured:
            _refuse_blind(table, paths[0], columns.image)
        facts = dataclasses.asdict(counts)
        report = Report(name, sources.described(paths), digest, examples=len(kept), **facts)
        return kept.lines(), report

    return build_once(files.local(here) / name / key, read, kept=remote)


def _refuse_blind(table: Table, file: pathlib.Path, image: str) -> None:
    """Refuses a file with no image in the column that its user named."""
    _, row = next(table.rows(file, lambda _: None))
    raise DataError(
        f"{file}: no row has an image in the column {image!r}; the columns of its first row are: "
        f"{', '.join(names_in(row))}"
    )


def image_source(
    name: str,
    path: str | pathlib.Path | None = None,
    split: str = "train",
    selection: Selection = ALL,
) -> pathlib.Path | tuple[pathlib.Path, ...] | None:
    """Returns the file (or folder of problems) that `load` reads; image paths are relative to it.

    Arguments and errors as for `load`. Several files if there are; None for a generator.
    """
    if not isinstance(_entry(name), Table):
        return None
    paths = _files(name, path, split, selection)
    return paths[0] if len(paths) == 1 else paths


def _key(*what) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _sha256(table: Table, paths: tuple[pathlib.Path, ...]) -> str:
    """Returns the digest of files, or of a problem folder's file names and digests."""
    source = paths[0]
    if source.is_file():
        return sources.sha256(paths)
    found = sorted(source.glob(table.folder))
    return _key(*((str(file.relative_to(source)), file_sha256(file)) for file in found))


def _entry(name: str):
    if name in DATASETS:
        return DATASETS[name]
    raise DataError(
        f"unknown dataset {name!r}: {nearest(name, DATASETS)}; a file of your own is dataset "
        "'file' with its path and columns"
    )


def _files(
    name: str, path: str | pathlib.Path | None, split: str, selection: Selection
) -> tuple[pathlib.Path, ...]:
    """Returns the files of the split."""
    origin = DATASETS[name].origin
    if not path:
        raise DataError(f"dataset {name!r} needs a path to its file ({origin})")
    try:
        return sources.found(path, split, selection, pattern=DATASETS[name].folder, origin=origin)
    except DataError as error:
        if str(error).startswith("no file"):
            raise DataError(f"dataset {name!r}: {error}") from None
        raise
