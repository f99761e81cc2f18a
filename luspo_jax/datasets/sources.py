"""The files of a source: on this host, in a bucket, on the hub, or taken from a stream of it."""

import glob
import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.hub import PREFIX, Repository, hub_names, is_hub
from luspo_jax.datasets.rows import SUFFIXES, read_rows
from luspo_jax.datasets.selection import Selection, chosen, is_pattern
from luspo_jax.datasets.store import file_sha256
from luspo_jax.datasets.streamed import streamed
from luspo_jax.hosts import fetched, files
from luspo_jax.hosts.buckets import is_bucket


def found(
    path: str | pathlib.Path,
    split: str,
    selection: Selection,
    *,
    pattern: str = "",
    origin: str = "",
) -> tuple[pathlib.Path, ...]:
    """Returns the files to read as one table, in order; or the folder, if it is one of problems.

    Args:
      path: a file; a pattern such as `data/*.parquet`; a folder, of which the files of the split
        are taken; a file or folder at the address of a bucket; or "hub:OWNER/NAME[@REVISION]",
        perhaps with "/FILE", "/FOLDER" or "/PATTERN". What is not here is downloaded.
      split: the split, of a folder or repository.
      selection: what is taken; with a limit no more files are downloaded than it needs.
      pattern: of the files of a source that has a folder per problem.
      origin: where the data comes from, for messages.

    Raises:
      DataError: there is no such file, or it is not clear which are meant.
      BucketError: the bucket cannot be read.
    """
    if selection.streaming:
        if not is_hub(path):
            raise DataError(f"{path}: data.streaming is of {PREFIX}OWNER/NAME")
        return (streamed(Repository.of(str(path)), split, selection),)
    if is_hub(path):
        repository = Repository.of(str(path))
        names = hub_names(repository, split, selection.subset)
        return _up_to(selection.limit, (repository.download(name) for name in names))
    if is_bucket(path):
        return (_one(_in_bucket(path, split, pattern), split, pattern, origin),)
    place = files.local(path)
    if is_pattern(str(path)) and not place.exists():
        return _up_to(selection.limit, _matching(place))
    if place.is_dir() and not pattern:
        several = _of_folder(place, split, selection.subset)
        if several is not None:
            return _up_to(selection.limit, several)
    return (_one(place, split, pattern, origin),)


def _matching(place: pathlib.Path) -> list[pathlib.Path]:
    paths = (pathlib.Path(name) for name in sorted(glob.glob(str(place), recursive=True)))
    found = [p for p in paths if p.is_file() and p.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(f"no {', '.join(SUFFIXES)} file matches {place}")
    return found


def _of_folder(place, split, subset) -> list[pathlib.Path] | None:
    """Returns the files of a split, in parts or further below; None if one has its very name."""
    if not subset and len(_named(place, split)) == 1:
        return None
    names = [p.relative_to(place).as_posix() for p in sorted(place.rglob("*")) if p.is_file()]
    card = place / "README.md"
    read = (lambda: card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return [place / name for name in chosen(names, str(place), split, subset, read)]


def _named(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    return [file for name in _names(split) if (file := folder / name).is_file()]


def _one(place: pathlib.Path, split: str, pattern: str, origin: str) -> pathlib.Path:
    """Returns the one file that a path means, or the folder of problems."""
    for folder in (place, place / split) if pattern else ():
        if any(folder.glob(pattern)):
            return folder
    if place.is_dir():
        files_of_split = _named(place, split)
        if len(files_of_split) != 1:
            present = ", ".join(sorted(p.name for p in place.iterdir())) or "nothing"
            raise DataError(f"{place}: need one file {split}.*, the folder holds {present}")
        return files_of_split[0]
    if not place.is_file():
        raise DataError(
            f"no file {place}; download it from {origin or 'its source'} or correct the path"
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


def _up_to(limit: int, paths: Iterable[pathlib.Path]) -> tuple[pathlib.Path, ...]:
    """Returns the files that the first `limit` rows are in, without asking for others."""
    found, rows = [], 0
    for path in paths:
        found.append(path)
        if limit:
            rows += _num_rows(path, limit)
            if rows >= limit:
                break
    return tuple(found)


def _num_rows(path: pathlib.Path, enough: int) -> int:
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    return sum(1 for _ in zip(range(enough), read_rows(path, lambda _: None), strict=False))


def sha256(paths: Sequence[pathlib.Path]) -> str:
    """Returns the hex digest of a file, or one of the digests of several."""
    digests = [file_sha256(path) for path in paths]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(repr(digests).encode()).hexdigest()


def described(paths: Sequence[pathlib.Path]) -> str:
    """Names files in a report: the one, or the first and how many more."""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{os.path.basename(paths[0])}{more}"
