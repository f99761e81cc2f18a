"""Images of a data file: references that fit into `meta`, and how one is opened."""

import io
import pathlib
from typing import Any

from luspo_jax.datasets.example import DataError

# A reference is {"row": number, "path": text} for a file, relative to the data file's folder, or
# {"row": number, "column": name} for bytes that stand in the data file itself. It holds no absolute
# path and no bytes, because examples are stored once and outlive a move of the data.
Reference = dict[str, Any]


def references(name: str, cell: Any, number: int, place: str) -> list[Reference]:
    """References to the images of one cell: nothing, one image, or a list of them.

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
        if isinstance(image, dict) and image.get("bytes"):
            column = f"{name}.{position}" if several else name
            found.append({"row": number, "column": column})
        elif isinstance(path, str) and path.strip():
            found.append({"row": number, "path": path.strip()})
        elif path is not None and not isinstance(path, str):
            raise DataError(
                f"{place}: column {name!r} must hold a path or an object with bytes or path, not "
                f"{type(image).__name__}"
            )
    return found


def open_image(
    reference: Reference,
    source: str | pathlib.Path,
    *,
    image_dir: str | pathlib.Path | None = None,
):
    """The image that a reference of `source` means, as a loaded PIL image in its own mode.

    Args:
      reference: an element of `meta["images"]`.
      source: the data file (or folder of problems) that was read.
      image_dir: folder that paths are relative to, where it is not the data file's.

    Raises:
      DataError: the image is missing or unreadable; the message names file and row.
    """
    import PIL.Image

    source = pathlib.Path(source)
    place = f"{source}, row {reference['row']}"
    if "path" in reference:
        folder = pathlib.Path(image_dir or (source if source.is_dir() else source.parent))
        stream, what = folder / reference["path"], f"image {folder / reference['path']}"
        if not stream.is_file():
            raise DataError(f"{place}: {what} is missing")
    else:
        what = f"image in column {reference['column']!r}"
        stream = io.BytesIO(_embedded(source, reference, place))
    try:
        with PIL.Image.open(stream) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{place}: {what} cannot be read ({error})") from error


def _embedded(source: pathlib.Path, reference: Reference, place: str) -> bytes:
    """The bytes in one cell of a parquet file; only that row group and column are read."""
    import pyarrow
    import pyarrow.parquet

    column, _, position = reference["column"].partition(".")
    try:
        with pyarrow.parquet.ParquetFile(source) as table:
            group, row = _row_group(table.metadata, reference["row"] - 1)
            cell = table.read_row_group(group, columns=[column]).column(column)[row].as_py()
    except (pyarrow.ArrowException, OSError, KeyError, IndexError) as error:
        raise DataError(f"{place}: column {column!r} cannot be read ({error})") from error
    try:
        return (cell[int(position)] if position else cell)["bytes"] or b""
    except (TypeError, KeyError, IndexError) as error:
        raise DataError(f"{place}: column {reference['column']!r} holds no image bytes") from error


def _row_group(metadata, index: int) -> tuple[int, int]:
    """(row group, row in it) of a row of a parquet file, both from 0."""
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if index < rows:
            return group, index
        index -= rows
    raise IndexError("the file has fewer rows")
