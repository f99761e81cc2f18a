"""Files and folders that a user names: read as text, written whole or not at all.

One rule for all commands: the place must not exist, or be empty. An existing file is replaced only
if the user says so, and a folder only if we wrote it; files that others put into such a folder stay
there.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TextIO

MARK = ".luspo_jax.json"  # in a folder that we wrote: names of the entries that we wrote
OWN = "own"  # of a folder that belongs to the run and not to its user
_FULL = (errno.ENOSPC, errno.EDQUOT)


class PlaceError(Exception):
    """A place that may not or cannot be written; the message names it and says what to do."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, durable: bool = True) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling that replaces the file when the block ends, or is removed.

    Args:
      path: of the file; errors name it.
      durable: wait until the disk has the data, so that a machine crash leaves no empty file.
    """
    path = pathlib.Path(path)
    scratch = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        try:
            yield scratch
            if durable:
                _sync(scratch)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        if error.filename != str(scratch):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: str | os.PathLike, text: str, *, durable: bool = True) -> None:
    """Writes a text file; a failure leaves the old one."""
    with replacing(path, durable=durable) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, values: Any) -> None:
    """Writes readable JSON: indented, characters unescaped; a failure leaves the old file."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def check_file(path: str | os.PathLike, *, flag: str, overwrite: bool = False) -> None:
    """Checks, before slow work, that the file of a flag may be written.

    Raises:
      PlaceError: it exists without `overwrite`, or cannot be created.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and not path.is_file():
        raise PlaceError(f"{flag}={path} is no file: name a file")
    if path.exists() and path.stat().st_size and not overwrite:
        raise PlaceError(
            f"{flag}={path} exists already: name another file, or pass --overwrite to replace it"
        )
    _check_writable(path.parent, flag, path)


def write_new(
    path: str | os.PathLike, text: str, *, flag: str = "--out", overwrite: bool = False
) -> None:
    """Writes the file of a flag, after `check_file`, and creates the folders above it."""
    check_file(path, flag=flag, overwrite=overwrite)
    path = pathlib.Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def check_own(
    folder: str | os.PathLike, *, ours: Sequence[str], what: str, flag: str = "--workdir"
) -> None:
    """Checks that the folder where a command keeps its results is new, empty, or its own.

    Args:
      folder: to check.
      ours: names; a folder of this kind contains at least one of them.
      what: the folder's usual contents, in words.
      flag: that named the folder.

    Raises:
      PlaceError: the folder contains something else.
    """
    folder = pathlib.Path(folder).absolute()
    if os.path.lexists(folder) and not folder.is_dir():
        raise PlaceError(f"{flag}={folder} is a file: name a folder")
    # Names that start with a dot are a lock or a file that was being written.
    names = {p.name for p in folder.glob("*") if not p.name.startswith(".")}
    if names and names.isdisjoint(ours):
        raise PlaceError(f"{flag}={folder} is not empty and holds no {what}: choose another")
    _check_writable(folder, flag, folder)


def check_folder(
    folder: str | os.PathLike, *, flag: str = "--out", overwrite: bool | None = None
) -> None:
    """Checks, before slow work, that the folder of a flag may be written.

    Args:
      folder: to check.
      flag: that named the folder.
      overwrite: whether the user allows replacing what we wrote there; None if there is no such
        option.

    Raises:
      PlaceError: the folder is not empty, or cannot be created.
    """
    folder = pathlib.Path(folder).absolute()
    if os.path.lexists(folder):
        if not folder.is_dir():
            raise PlaceError(f"{flag}={folder} is a file: name a folder")
        if any(folder.iterdir()) and not overwrite:
            hint = "" if overwrite is None else ", or pass --overwrite to replace it"
            raise PlaceError(
                f"{flag}={folder} exists already and is not empty: name another folder{hint}"
            )
        if any(folder.iterdir()) and not (folder / MARK).is_file():
            raise PlaceError(
                f"{flag}={folder} is not empty and luspo_jax did not write it (there is no {MARK} "
                "in it): --overwrite does not replace it; name another"
            )
    _check_writable(folder.parent, flag, folder)


@contextlib.contextmanager
def new_folder(
    folder: str | os.PathLike,
    *,
    flag: str = "--out",
    overwrite: bool | Literal["own"] | None = None,
) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling that replaces the folder when the block ends, or is removed.

    Args:
      folder: as `check_folder` allows it.
      flag: that named the folder.
      overwrite: as in `check_folder`; or OWN if the folder belongs to the run, as `export` does,
        and may be replaced without a mark.

    Raises:
      PlaceError: as `check_folder`, or the disk is full or read-only.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    if overwrite != OWN:
        check_folder(folder, flag=flag, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        names = sorted({path.name for path in partial.iterdir()} - {MARK})
        write_text(partial / MARK, json.dumps({"written": names}) + "\n")
        _replace(partial, folder)
    except OSError as error:
        full = error.errno in _FULL
        raise PlaceError(
            f"{folder} cannot be written ({error.strerror}): "
            + ("free some space" if full else "choose a place that is writable")
            + ", then run the same command again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(
    folder: str | os.PathLike, *, flag: str = "--workdir", wait: bool = False
) -> Iterator[TextIO]:
    """Locks a folder, created if missing, for this process until the block ends.

    Raises:
      PlaceError: another process holds the lock (unless `wait`), or the folder cannot be written.
    """
    with take_lock(folder, flag=flag, wait=wait) as lock:
        yield lock


def take_lock(folder: str | os.PathLike, *, flag: str = "--workdir", wait: bool = False) -> TextIO:
    """Locks a folder as `locked` does; closing the returned file releases it."""
    folder = pathlib.Path(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise PlaceError(f"{flag}={folder} cannot be written: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        raise PlaceError(
            f"{flag}={folder} is in use by another process: wait for its end"
        ) from None
    return lock


def user_cache() -> pathlib.Path:
    """Returns the folder for what can be made again: $XDG_CACHE_HOME/luspo_jax, else ~/.cache/…."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(cache) / "luspo_jax"


def local(path: str | os.PathLike) -> pathlib.Path:
    """Returns the path with a leading `~` replaced by the home folder."""
    return pathlib.Path(os.path.expanduser(path))


def open_text(path: pathlib.Path, *, newline: str | None = None) -> TextIO:
    """Opens UTF-8 text; other bytes are read as U+DC80 … U+DCFF, so that errors can name a cell."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_text(path: pathlib.Path) -> str:
    """Reads a UTF-8 file.

    Raises:
      UnicodeDecodeError: the file is not UTF-8.
    """
    return path.read_text(encoding="utf-8-sig")


def read_json(path: pathlib.Path) -> Any:
    """Reads the JSON value of a file.

    Raises:
      ValueError: the file is not JSON.
    """
    return json.loads(read_text(path))


def _check_writable(parent, flag, path):
    """Checks the nearest existing folder above."""
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise PlaceError(f"{flag}={path} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PlaceError(f"{flag}={path} cannot be written: {parent} is not writable")


def _replace(partial, folder):
    """Renames `partial` to `folder`, and deletes only what we wrote there before."""
    if not folder.exists():
        partial.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    ours = _written(folder) | {path.name for path in partial.iterdir()}
    folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    for path in old.iterdir():
        if path.name not in ours:
            path.rename(folder / path.name)
    shutil.rmtree(old, ignore_errors=True)


def _written(folder):
    """Returns the names that the mark lists; without one, the weight files, however many."""
    try:
        return {MARK, *json.loads((folder / MARK).read_text())["written"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {path.name for path in folder.glob("model*.safetensors*")}


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
