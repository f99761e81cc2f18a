"""Images of a data file: references that fit into `meta`, and functions to read and open them."""

import dataclasses
import functools
import io
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from luspo_jax.datasets import shapes
from luspo_jax.datasets.example import DataError, Example
from luspo_jax.hosts import files
from luspo_jax.hosts.fetched import is_fetched
from luspo_jax.images.record import ImageError, StoredImage

# A reference is {"row": number, "path": text} for a file, relative to the data file's folder,
# {"row": number, "column": name} for bytes inside the data file itself, or {"row": number,
# "generated": name, …} for an image that GENERATORS[name] draws from it. It holds no absolute path
# and no bytes, because examples are stored once and the data may be moved.
Reference = dict[str, Any]

# Name → function from a reference to uint8 [height, width, 3].
GENERATORS: dict[str, Callable[[Reference], np.ndarray]] = {"shapes": shapes.draw}

MAX_FILE_BYTES = 1 << 30  # larger than an image of `max_source_pixels` in any format


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Where the images of a set of problems are.

    Attributes:
      source: the data file (or folder of problems) read; several that are read as one; None if all
        images are generated.
      image_dir: folder that paths are relative to, if not the (first) data file's. A path is also
        searched for in its subfolder `images`, and without its innermost folder.
      of_source: for a mixture, the ImageFiles of each source by name.
    """

    source: str | pathlib.Path | tuple[pathlib.Path, ...] | None = None
    image_dir: str | pathlib.Path | None = None
    of_source: Mapping[str, "ImageFiles"] = dataclasses.field(default_factory=dict)

    def images(self, example: Example) -> list[StoredImage]:
        """Returns the images of an example, in order, without reading them."""
        if self.of_source:
            return self.of_source[example.meta["source"]].images(example)
        return [self._stored(reference) for reference in example.meta.get("images", ())]

    def _stored(self, reference: Reference) -> StoredImage:
        source, row = _located(self.source, reference)
        place = f"{source or reference.get('generated')}, row {row}"
        name = reference.get("path") or reference.get("column")
        return StoredImage(
            f"{place}, image {name}" if name else place, functools.partial(self._read, reference)
        )

    def _read(self, reference: Reference) -> bytes | np.ndarray:
        if "generated" in reference:
            return GENERATORS[reference["generated"]](reference)
        if self.source is None:
            raise ImageError("missing", f"no data file is known for {reference}")
        source, row = _located(self.source, reference)
        try:
            return read_bytes({**reference, "row": row}, source, image_dir=self.image_dir)
        except (DataError, OSError) as error:
            raise ImageError("missing", str(error)) from error


def _located(source, reference: Reference) -> tuple[Any, int]:
    """Returns (the data file of a reference, the row in it); of several, rows count through."""
    row = reference["row"]
    if not isinstance(source, tuple):
        return source, row
    if "column" not in reference:
        return source[0], row
    for file in source:
        rows = _rows_of(file, file.stat().st_mtime_ns)
        if row <= rows:
            break
        row -= rows
    return file, row


@functools.lru_cache(maxsize=1024)
def _rows_of(file: pathlib.Path, stamp: int) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(file).num_rows


def image_name(reference: Reference) -> str:
    """Names the image of a reference: its path, else its row and what holds or draws it."""
    if "path" in reference:
        return reference["path"]
    return f"{reference.get('column') or reference.get('generated')}, row {reference['row']}"


def references(name: str, cell: Any, number: int, place: str) -> list[Reference]:
    """Returns references to the images of one cell: none, one image, or a list of them.

    An image is a path, or an object with `bytes` or else `path`, as the Hugging Face hub stores it.

    Args:
      name: the cell's column.
      cell: its value.
      number: its row, from 1.
      place: file and row in words.

    Raises:
      DataError: the cell holds something else.
    """
    several = isinstance(cell, list | tuple)
    found = []
    for position, image in enumerate(cell if several else [cell]):
        path = image.get("path") if isinstance(image, dict) else image
        path = None if path != path else path  # NaN in a table means no image
        named = isinstance(path, str) and path.strip()
        # An object with neither is a lost image, to be refused as empty: without a reference its
        # problem would be asked without the image.
        lost = path is None or (isinstance(path, str) and not named)
        if isinstance(image, dict) and (image.get("bytes") or lost):
            column = f"{name}.{position}" if several else name
            found.append({"row": number, "column": column})
        elif named:
            found.append({"row": number, "path": path.strip()})
        elif path is not None and not isinstance(path, str):
            raise DataError(
                f"{place}: column {name!r} must hold a path or an object with bytes or path, not "
                f"{type(image).__name__}"
            )
    return found


def read_bytes(
    reference: Reference,
    source: str | pathlib.Path,
    *,
    image_dir: str | pathlib.Path | None = None,
) -> bytes:
    """Reads the bytes of the file that a reference names; arguments as for `open_image`.

    Raises:
      DataError: no such file; the message names file and row.
      ImageError: "huge", a file larger than MAX_FILE_BYTES, which is not read.
    """
    source = pathlib.Path(source)
    place = f"{source}, row {reference['row']}"
    if "path" not in reference:
        return _embedded(source, reference, place)
    for file in _places(source, image_dir, reference["path"]):
        if file.is_file():
            size = file.stat().st_size
            if size > MAX_FILE_BYTES:
                raise ImageError("huge", f"{place}: image {file} has {size:,} bytes")
            return file.read_bytes()
    first = _folder(source, image_dir) / reference["path"]
    raise DataError(
        f"{place}: image {first} is missing"
        + (
            "; of a bucket, name the folder of the images too: image_dir"
            if not image_dir and is_fetched(source)
            else ""
        )
    )


def open_image(
    reference: Reference,
    source: str | pathlib.Path | None = None,
    *,
    image_dir: str | pathlib.Path | None = None,
):
    """Opens the image that a reference of `source` names, as a loaded PIL image in its own mode.

    Args:
      reference: an element of `meta["images"]`.
      source: the data file (or folder of problems) read; None for generated images.
      image_dir: folder that paths are relative to, if not the data file's.

    Raises:
      DataError: the image is missing or unreadable; the message names file and row.
      ImageError: as for `read_bytes`.
    """
    import PIL.Image

    if "generated" in reference:
        return PIL.Image.fromarray(GENERATORS[reference["generated"]](reference))
    source = pathlib.Path(source)
    stream = io.BytesIO(read_bytes(reference, source, image_dir=image_dir))
    try:
        with PIL.Image.open(stream) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        what = f"image in column {reference.get('column')!r}"
        if "path" in reference:
            what = f"image {_folder(source, image_dir) / reference['path']}"
        raise DataError(
            f"{source}, row {reference['row']}: {what} cannot be read ({error})"
        ) from error


def _folder(source: pathlib.Path, image_dir: str | pathlib.Path | None) -> pathlib.Path:
    return files.local(image_dir or (source if source.is_dir() else source.parent))


def _places(source, image_dir, path: str) -> Iterator[pathlib.Path]:
    """Yields candidate places of an image: its path, in a folder `images`, without its own folder.

    Authors keep images apart from annotations, and copies rearrange them.
    """
    folder, path = _folder(source, image_dir), pathlib.PurePath(path)
    yield folder / path
    yield folder / "images" / path
    if path.parent.name:
        yield folder / path.parent.parent / path.name


def _embedded(source: pathlib.Path, reference: Reference, place: str) -> bytes:
    """Reads the bytes in one parquet cell; only its row group and column are read."""
    import pyarrow

    column, _, position = reference["column"].partition(".")
    try:
        state = source.stat()
        stamp = (state.st_mtime_ns, state.st_size)
        with _READING:
            found, row = _cells(source, stamp, column, reference["row"] - 1)
        cell = found[row].as_py()
    except (pyarrow.ArrowException, OSError, KeyError, IndexError) as error:
        raise DataError(f"{place}: column {column!r} cannot be read ({error})") from error
    try:
        return (cell[int(position)] if position else cell)["bytes"] or b""
    except (TypeError, KeyError, IndexError) as error:
        raise DataError(f"{place}: column {reference['column']!r} holds no image bytes") from error


def _cells(source: pathlib.Path, stamp: tuple, column: str, index: int):
    """Returns (a column's cells in the row group of a row, the row's index in the group)."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(source) as table:
        group, row = _row_group(table.metadata, index)
    return _group_cells(source, stamp, column, group), row


# Reading one image decompresses its whole row group: 0.2 s for 1,000 images of 30 kB. The latest
# groups are cached, so that a file of few groups is read once.
@functools.lru_cache(maxsize=4)
def _group_cells(source: pathlib.Path, stamp: tuple, column: str, group: int):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(source) as table:
        return table.read_row_group(group, columns=[column]).column(column)


_READING = threading.Lock()  # keeps threads from reading one row group several times


def _row_group(metadata, index: int) -> tuple[int, int]:
    """Returns (row group, row in it) of a row of a parquet file, both from 0."""
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if index < rows:
            return group, index
        index -= rows
    raise IndexError("the file has fewer rows")
