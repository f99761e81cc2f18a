"""Buckets: objects of gs:// and s3:// addresses, through fsspec.

A server that is away or throttles is waited for, so that an outage of minutes costs a run nothing;
one that refuses is reported in one line. What is read is never cached: another host may write.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from luspo_jax.hosts.files import PlaceError

# Scheme → name of the file system in fsspec, package that has it, extra of setup.py that brings it.
_SYSTEMS = {"gs": ("gcs", "gcsfs", "gs"), "s3": ("s3", "s3fs", "s3")}
# Seconds to wait for a server that is away: little before a run began, longer than a usual outage
# while it has something to lose.
SHORTLY_S, LONG_S = 60.0, 1800.0
_RETRY_S = 0.5, 10.0  # first and longest pause between two attempts
_SAY_AFTER_S = 5.0  # of waiting, until a line says so
_BUSY = (408, 425, 429)  # HTTP: request timeout, too early, too many requests
_AWAY = ("aiohttp.", "requests.", "urllib3.")  # modules of errors of a connection
_AWAY_BOTO = ("HTTPClientError", "ConnectionError", "ResponseStreamingError", "ResponseParserError")
_SLOW = (
    "SlowDown", "Throttling", "RequestTimeout", "InternalError", "ServiceUnavailable",
    "UNAVAILABLE", "DEADLINE_EXCEEDED",  # TensorStore
)  # fmt: skip
_WHOLE = 50_000_000  # bytes up to which a file is sent in one request

_patience = {"seconds": SHORTLY_S}


class BucketError(PlaceError):
    """A bucket that cannot be used; the message names it and says what to do."""


def is_bucket(path: Any) -> bool:
    """Returns whether a path is an address of a bucket, gs://… or s3://….

    Raises:
      BucketError: an address of another kind.
    """
    scheme, found, rest = str(path).partition("://")
    if not found:
        if re.match(rf"({'|'.join(_SYSTEMS)}):/", str(path)):
            raise BucketError(f"{path}: an address has two slashes: {path.replace(':/', '://', 1)}")
        return False
    if scheme not in _SYSTEMS:
        raise BucketError(f"{path}: {scheme}:// is not known: name a folder, gs:// or s3://")
    if not rest.strip("/"):
        raise BucketError(f"{path} names no bucket: write {scheme}://BUCKET/FOLDER")
    return True


def wait_long() -> None:
    """From now on, waits for an absent server as long as a run should that has begun."""
    _patience["seconds"] = LONG_S


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """An object: bytes, when it was last written (seconds since 1970, by the server's clock), and
    a checksum of the server's, which changes when the content does."""

    size: int
    written: float
    tag: str


class Bucket:
    """The objects below an address; names are relative to it, as in rollouts/step_000001.jsonl.

    Args:
      url: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER; nothing is looked up yet.

    Raises:
      BucketError: no such address, or the package for it is not installed. All methods: the server
        refuses, or was away for too long.
    """

    def __init__(self, url: str):
        if not is_bucket(url):
            raise BucketError(f"{url} is no address of a bucket: write gs:// or s3://")
        self.url = str(url).rstrip("/")
        self._fs = file_system(self.url.partition("://")[0])
        self._root = self.url.partition("://")[2]

    def entries(self, below: str = "") -> dict[str, Entry]:
        """Returns all objects (below a folder of the address) by name."""
        with self._plainly("list"):
            found = self._fs.find(self._at(below), detail=True)
        start = len(self._root) + 1
        # Consoles and some tools put an empty object in the place of a folder.
        return {
            name[start:]: _entry(info)
            for name, info in found.items()
            if name[start:] and not name.endswith("/")
        }

    def read(self, name: str) -> bytes | None:
        """Returns the content of an object; None if it is not there."""
        with self._plainly("read"):
            try:
                return self._fs.cat_file(self._at(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, whole or not at all."""
        with self._plainly("write"):
            self._fs.pipe_file(self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless there is one; returns whether it did.

        The server decides, so of two that try at once one succeeds. A retry after a lost answer
        finds what it wrote itself, so no one else may write the same.
        """
        with self._plainly("write"):
            try:
                self._fs.pipe_file(self._at(name), content, mode="create")
            except FileExistsError:
                return self.read(name) == content
        return True

    def upload(self, name: str, path: pathlib.Path) -> None:
        """Writes a file of this host as an object; of .jsonl files only whole lines."""
        if path.stat().st_size > _WHOLE and path.suffix != ".jsonl":
            with self._plainly("write"):
                self._fs.put_file(str(path), self._at(name))
            return
        content = path.read_bytes()
        if path.suffix == ".jsonl":  # someone may be writing the last one
            content = content[: content.rfind(b"\n") + 1]
        self.write(name, content)

    def download(self, name: str, path: pathlib.Path) -> None:
        """Writes an object as a file of this host, and makes the folders above it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            with self._plainly("read"):
                self._fs.get_file(self._at(name), str(partial))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that are gone already are no error."""
        with self._plainly("delete"):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(self._at(name))

    def _at(self, name):
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _plainly(self, verb: str) -> Iterator[None]:
        try:
            yield
        except BucketError:
            raise
        except Exception as error:
            if (line := refusal(self.url, error, verb)) is None:
                raise
            raise BucketError(line) from error


def refusal(url: str, error: BaseException, verb: str = "read and write") -> str | None:
    """Says in one line what an error of a bucket means and what to do; None for other errors."""
    text = " ".join(str(error).split())[:200]
    chain = list(_chain(error))
    statuses = {_status(one) for one in chain}
    names = {type(one).__name__ for one in chain}
    if names & {"NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError"}:
        return f"{url}: there are no credentials on this host ({text}): {_login(url)}"
    if (
        any(isinstance(one, PermissionError) for one in chain)
        or statuses & {401, 403}
        or any(words in text for words in ("Forbidden", "PERMISSION_DENIED", "UNAUTHENTICATED"))
    ):
        return (
            f"{url}: no permission to {verb} there ({text}): give this account the right to read, "
            f"write, list and delete objects, or {_login(url)}"
        )
    if any(isinstance(one, FileNotFoundError) for one in chain):
        bucket = "/".join(url.split("/")[:3])
        return f"{url}: not found ({text}): does the bucket {bucket} exist?"
    if is_passing(error):
        return (
            f"{url} does not answer ({type(error).__name__}: {text}): check the network and the "
            "server, then run the same command again"
        )
    return None


def _login(url):
    return (
        "log in (gcloud auth application-default login, or a service account)"
        if url.startswith("gs:")
        else "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    )


def file_system(scheme: str) -> Any:
    """Returns fsspec's file system of "gs" or "s3", the same one that etils and Orbax use.

    Raises:
      BucketError: its package is not installed.
    """
    protocol, package, extra = _SYSTEMS[scheme]
    try:
        prepare()
        import fsspec

        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise BucketError(
            f"{scheme}:// needs the package {package}, which is not installed: pip install "
            f"'luspo_jax[{extra}]', or pip install {package}"
        ) from error


@functools.cache
def prepare() -> None:
    """Makes fsspec's file systems wait for servers that are away, and cache no listing."""
    # Else gcsfs asks for each bucket's kind by another service, which needs another permission.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec
    import fsspec.asyn

    # They log each attempt that fails, with a traceback; what comes of it is said once, here.
    for name in ("gcsfs", "s3fs", "fsspec", "botocore", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.suppress(ImportError):
        from gcsfs.core import GCSFileSystem

        class PatientGCS(GCSFileSystem):
            """gcsfs that waits for a server that is away."""

            async def _call(self, *args, **kwargs):
                return await _patiently(super()._call, "gs://", *args, **kwargs)

            call = fsspec.asyn.sync_wrapper(_call)  # which open files use

        fsspec.register_implementation("gcs", PatientGCS, clobber=True)
        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    with contextlib.suppress(ImportError):
        import s3fs

        class PatientS3(s3fs.S3FileSystem):
            """s3fs that waits for a server that is away."""

            async def _call_s3(self, *args, **kwargs):
                return await _patiently(super()._call_s3, "s3://", *args, **kwargs)

            call_s3 = fsspec.asyn.sync_wrapper(_call_s3)

        fsspec.register_implementation("s3", PatientS3, clobber=True)
        fsspec.config.conf.setdefault("s3", {}).setdefault("use_listings_cache", False)


async def _patiently(call, where, *args, **kwargs):
    """Calls again while the server is away, with growing pauses, for `_patience`."""
    began, pause, said = time.monotonic(), _RETRY_S[0], False
    while True:
        try:
            return await call(*args, **kwargs)
        except Exception as error:
            waited = time.monotonic() - began
            if not is_passing(error) or waited + pause > _patience["seconds"]:
                raise
            if waited > _SAY_AFTER_S and not said:
                said = True
                sys.stderr.write(
                    f"{where} does not answer ({type(error).__name__}): waiting for it, up to "
                    f"{_patience['seconds']:.0f} s\n"
                )
        await asyncio.sleep(pause)
        pause = min(2 * pause, _RETRY_S[1])


def is_passing(error: BaseException) -> bool:
    """Returns whether an error says that a server is away or throttles, which passes."""
    for one in _chain(error):
        status, kind = _status(one), type(one)
        if status is not None and (status >= 500 or status in _BUSY):
            return True
        if isinstance(one, ConnectionError | TimeoutError):
            return True
        if kind.__module__.startswith(_AWAY) or kind.__name__ == "TransportError":  # of google.auth
            return True
        if kind.__module__.startswith("botocore.") and any(
            base.__name__ in _AWAY_BOTO for base in kind.__mro__
        ):
            return True
        if any(word in str(one) for word in _SLOW):
            return True
    return False


def _chain(error):
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error):
    """Returns the HTTP status that an error of gcsfs or botocore has; None if there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        code = getattr(error, "code", None)
    try:
        return int(code)
    except (TypeError, ValueError):
        return None


def _entry(info):
    written = info.get("mtime") or info.get("LastModified")
    tag = info.get("crc32c") or info.get("ETag") or info.get("etag") or ""
    return Entry(
        int(info.get("size") or 0), written.timestamp() if written else 0.0, str(tag).strip('"')
    )
