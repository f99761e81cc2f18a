"""The first rows of a dataset on the hub, without its files, through the package `datasets`."""

import hashlib
import json
import pathlib

from tqdm import tqdm

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.hub import Repository
from luspo_jax.datasets.selection import Selection
from luspo_jax.hosts import files


def streamed(repository: Repository, split: str, selection: Selection) -> pathlib.Path:
    """Returns a file of the first `selection.limit` rows of a split, read once and then kept.

    It lies in the user's cache by repository, revision, subset, split and limit. So a run that is
    resumed reads the same rows, whatever the hub has meanwhile; on another host they are read anew,
    and a file that differs is refused as other data.

    Raises:
      DataError: no limit, the package is not installed, the hub cannot be read, or a row holds more
        than text, numbers and lists and objects of them.
    """
    if selection.limit < 1:
        raise DataError(
            f"{repository.text}: data.streaming takes the first data.limit rows: set data.limit"
        )
    if repository.inside:
        raise DataError(
            f"{repository.text}: data.streaming reads a repository, hub:OWNER/NAME; data.subset "
            "and data.split say what of it"
        )
    what = [repository.id, repository.revision, selection.subset, split, selection.limit]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    file = files.user_cache() / "streamed" / f"{repository.id.replace('/', '--')}-{key}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(file, repository.id, split, selection, revision=repository.revision)
    return file


def write_rows(
    file: pathlib.Path,
    source: str,
    split: str,
    selection: Selection,
    *,
    revision: str | None = None,
) -> None:
    """Writes the first rows of what `datasets.load_dataset` finds, whole or not at all.

    Args:
      file: a jsonl file.
      source: a repository, or a folder.
      split: of it.
      selection: subset and limit.
      revision: of the repository; None for the newest.

    Raises:
      DataError: as `streamed`.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.streaming needs the package datasets: pip install 'luspo_jax[datasets]'"
        ) from error
    try:
        stream = datasets.load_dataset(
            source, selection.subset or None, split=split, streaming=True, revision=revision
        )
        # Rows are taken as they are stored: no image or sound is decoded.
        rows = stream.decode(False) if hasattr(stream, "decode") else stream
        with files.replacing(file) as scratch, scratch.open("w", encoding="utf-8") as out:
            bar = tqdm(rows.take(selection.limit), source, selection.limit, disable=None, delay=1)
            for number, row in enumerate(bar, start=1):
                out.write(_line(row, f"{source}, row {number}") + "\n")
    except DataError:
        raise
    except Exception as error:  # readers of a dozen formats raise any kind of error
        said = " ".join(str(error).split())
        raise DataError(
            f"hub:{source}, split {split!r}: cannot be streamed ({type(error).__name__}: {said}): "
            "check data.subset, data.split, the name and the network"
        ) from error


def _line(row: dict, place: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{place}: holds what no line of JSON does ({error}), such as an image: download the "
            "files instead (data.streaming=False)"
        ) from error


def _plain(value):
    """Converts dates to text, and NumPy's numbers and arrays to Python's."""
    for method in ("isoformat", "tolist"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"a value of type {type(value).__name__}")
