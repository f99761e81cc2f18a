"""A user's files: where a path leads, and text with or without a byte order mark."""

import json
import os
import pathlib
from typing import Any, TextIO


def local(path: str | os.PathLike) -> pathlib.Path:
    """The path with a leading `~` as the home folder."""
    return pathlib.Path(os.path.expanduser(path))


def open_text(path: pathlib.Path, *, newline: str | None = None) -> TextIO:
    """Opens UTF-8 text; what is none comes out as U+DC80 … U+DCFF, so that a cell can be named."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_text(path: pathlib.Path) -> str:
    """The UTF-8 text of a file.

    Raises:
      UnicodeDecodeError: it is none.
    """
    return path.read_text(encoding="utf-8-sig")


def read_json(path: pathlib.Path) -> Any:
    """The JSON value of a file.

    Raises:
      ValueError: it holds none.
    """
    return json.loads(read_text(path))
