"""Datasets by name, and the function that loads one."""

import dataclasses
import hashlib
import inspect
import pathlib
from collections.abc import Iterable, Sequence

from luspo_jax.datasets.contests import AIME, AMC, MATH500
from luspo_jax.datasets.dapo_math import DAPO_LAYOUT
from luspo_jax.datasets.example import DataError, Example, Report
from luspo_jax.datasets.geometry3k import GEOMETRY3K
from luspo_jax.datasets.gsm8k import GSM8K
from luspo_jax.datasets.hub import hub_file, is_hub
from luspo_jax.datasets.label_lookup import LabelLookup
from luspo_jax.datasets.label_sums import LabelSums
from luspo_jax.datasets.open_problems import MINERVA, OLYMPIADBENCH
from luspo_jax.datasets.reasoning_gym import reasoning_gym
from luspo_jax.datasets.rows import SUFFIXES, names_in
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
    drop_bad_rows: bool = False,
    **options,
) -> tuple[Sequence[Example], Report]:
    """Loads a dataset as a random-access sequence of examples, with a report on its rows.

    Args:
      name: a key of DATASETS.
      path: the file; a folder with `{split}.jsonl` or `.parquet`, `.json`, `.csv`; either at the
        address of a bucket, or "hub:OWNER/NAME[@REVISION][/FILE]", which are downloaded; None for a
        generator.
      split: the split; it applies to folders and generators only, since a file is one split.
      data_dir: folder of the built dataset; by default the user's cache. In a bucket it is kept for
        other hosts, and read from the user's cache.
      columns: columns of the file that replace the dataset's own, and more to keep; None for none.
      drop_bad_rows: leave out and count unusable rows, instead of refusing the file.
      **options: a generator's own options.

    Raises:
      DataError: an invalid name, file, row or column.
      BucketError: a bucket that cannot be used.
    """
    entry, columns = _entry(name), columns or Columns()
    if not isinstance(entry, Table):
        if path or columns.problem or columns.answer or columns.image:
            given = f" (path {path!r})" if path else ""
            raise DataError(
                f"dataset {name!r} is generated: it takes no path and no columns{given}"
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
    file = _file(name, path, split)
    table = entry.with_columns(columns)
    digest = _sha256(table, file)
    read_from = (table.meta, table.fields, table.identity, table.images, table.keep, drop_bad_rows)
    key = _key(READER_VERSION, digest, table.problem, table.answer, *read_from)
    remote = Bucket(f"{str(data_dir).rstrip('/')}/{name}/{key}") if is_bucket(data_dir) else None
    here = data_dir if data_dir and remote is None else default_data_dir()

    def read(scratch: pathlib.Path) -> tuple[Iterable[bytes], Report]:
        spool = (scratch / "rows").open("w+b")
        kept, counts = read_file(table, file, spool, drop_bad_rows=drop_bad_rows)
        if columns.image and not counts.pictured:
            _refuse_blind(table, file, columns.image)
        facts = dataclasses.asdict(counts)
        return kept.lines(), Report(name, file.name, digest, examples=len(kept), **facts)

    return build_once(files.local(here) / name / key, read, kept=remote)


def _refuse_blind(table: Table, file: pathlib.Path, image: str) -> None:
    """Refuses a file with no image in the column that its user named."""
    _, row = next(table.rows(file, lambda _: None))
    raise DataError(
        f"{file}: no row has an image in the column {image!r}; the columns of its first row are: "
        f"{', '.join(names_in(row))}"
    )


def image_source(
    name: str, path: str | pathlib.Path | None = None, split: str = "train"
) -> pathlib.Path | None:
    """Returns the file (or folder of problems) that `load` reads; image paths are relative to it.

    Arguments and errors as for `load`. None for a generator.
    """
    return _file(name, path, split) if isinstance(_entry(name), Table) else None


def _key(*what) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _sha256(table: Table, source: pathlib.Path) -> str:
    """Returns the hex digest of a file, or of a problem folder's file names and digests."""
    if source.is_file():
        return file_sha256(source)
    found = sorted(source.glob(table.folder))
    return _key(*((str(file.relative_to(source)), file_sha256(file)) for file in found))


def _entry(name: str):
    if name in DATASETS:
        return DATASETS[name]
    raise DataError(
        f"unknown dataset {name!r}: {nearest(name, DATASETS)}; a file of your own is dataset "
        "'file' with its path and columns"
    )


def _file(name: str, path: str | pathlib.Path | None, split: str) -> pathlib.Path:
    """Returns the file of the split."""
    if not path:
        raise DataError(f"dataset {name!r} needs a path to its file ({DATASETS[name].origin})")
    if is_hub(path):
        return hub_file(str(path), split, SUFFIXES)
    pattern = DATASETS[name].folder
    place = _in_bucket(path, split, pattern) if is_bucket(path) else files.local(path)
    for folder in (place, place / split) if pattern else ():
        if any(folder.glob(pattern)):
            return folder
    if place.is_dir():
        found = [file for name in _names(split) if (file := place / name).is_file()]
        if len(found) != 1:
            present = ", ".join(sorted(p.name for p in place.iterdir())) or "nothing"
            raise DataError(f"{place}: need one file {split}.*, the folder holds {present}")
        return found[0]
    if not place.is_file():
        raise DataError(
            f"dataset {name!r}: no file {place}; download it from "
            f"{DATASETS[name].origin or 'its source'} or correct the path"
        )
    return place


def _in_bucket(url: str | pathlib.Path, split: str, pattern: str) -> pathlib.Path:
    """Downloads a file, or of a folder the split's file, or all if it is one of problems."""
    try:
        return fetched.place(str(url), lambda name: pattern or name in _names(split))
    except FileNotFoundError as error:
        raise DataError(f"{error}; need one file {split}.*, or name the file itself") from error


def _names(split: str) -> list[str]:
    return [f"{split}{suffix}" for suffix in SUFFIXES]
