"""Objects of a bucket as files of this host: downloaded once, and again when they change.

They lie in the user's cache by their address and by the server's checksums, so that a changed
object becomes another file and whoever still reads the old one is not disturbed. Of a run in
progress there is one copy, which follows it.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping

from tqdm import tqdm

from luspo_jax.hosts import files
from luspo_jax.hosts.buckets import Bucket, BucketError, Entry, is_bucket

_AT_ONCE = 16  # objects that are downloaded together
_TRIES = 3  # at objects that change while they are downloaded
_LISTED = 20  # names in a message
_EQUAL_S = 1e-3  # of times of files, which file systems round

_addresses: dict[str, str] = {}  # path of what was fetched → its address


def place(url: str, wanted: Callable[[str], bool] = lambda name: True) -> pathlib.Path:
    """Returns the file of an object, or the folder of the objects below an address.

    It has the last name of the address. An interrupted download goes on where it stopped, and what
    it left is not used before it is complete; of several processes one downloads.

    Args:
      url: of an object or of a folder.
      wanted: which objects of a folder to download, by their names in it.

    Raises:
      FileNotFoundError: there is no such object, and none is wanted below.
      BucketError: the bucket cannot be read, or what is there changes all the time.
    """
    bucket = Bucket(url)
    home = _home(bucket.url)
    for _ in range(_TRIES):
        above, there = _listed(bucket, wanted)
        version = _digest([(n, *_stamp(e)) for n, e in sorted(there.items())])
        path = home / version / bucket.url.rpartition("/")[2]
        if not path.exists():
            with files.locked(home, flag="cache", wait=True):
                if not path.exists() and not _download(bucket, above, there, wanted, path):
                    continue
        _addresses[str(path)] = bucket.url
        return path
    raise BucketError(f"{bucket.url} changes while it is read: try again when it is complete")


def local(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path with `~` replaced by the home folder; an address is downloaded whole.

    Raises:
      FileNotFoundError, BucketError: as `place`.
    """
    return place(str(path)) if is_bucket(path) else files.local(path)


class RunCopy:
    """A run in a bucket as a folder of this host, which holds what was asked for.

    Args:
      url: of the run; it is listed once.

    Attributes:
      names: of all objects.
      folder: of this host.

    Raises:
      FileNotFoundError: there is nothing. BucketError: as of all methods, it cannot be read.
    """

    def __init__(self, url: str):
        self._bucket = Bucket(url)
        self._found = self._bucket.entries()
        if not self._found:
            raise FileNotFoundError(f"{self._bucket.url} holds no run: there is nothing")
        self.names: Collection[str] = self._found.keys()
        last = self._bucket.url.rpartition("/")[2]
        self.folder = _home(self._bucket.url) / "run" / last
        _addresses[str(self.folder)] = self._bucket.url

    def fetch(self, *names: str) -> None:
        """Makes files equal to their objects; what is not in the bucket is not there after."""
        for name in names:
            path, entry = self.folder / name, self._found.get(name)
            if entry is None:
                path.unlink(missing_ok=True)
                continue
            _check_name(self._bucket.url, name)
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                late = abs(status.st_mtime - entry.written) > _EQUAL_S
                if status.st_size == entry.size and not late:
                    continue
            self._bucket.download(name, path)
            os.utime(path, (entry.written, entry.written))


def is_fetched(path: str | os.PathLike) -> bool:
    """Returns whether `place` returned this path, or the folder it is in, in this process."""
    path = pathlib.Path(path)
    return any(str(above) in _addresses for above in (path, *path.parents))


def shown(text: str) -> str:
    """Returns a text with the addresses in it of what was fetched, instead of paths in the
    cache."""
    for path, url in _addresses.items():
        text = text.replace(path, url)
    return text


@contextlib.contextmanager
def addressed() -> Iterator[None]:
    """Makes the message of an error name addresses, as `shown` does."""
    try:
        yield
    except Exception as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (shown(error.args[0]), *error.args[1:])
        raise


def _listed(bucket, wanted):
    """Returns (the folder that names are relative to, the objects to download)."""
    parent, _, last = bucket.url.rpartition("/")
    is_whole = parent.endswith("/")  # gs://BUCKET has no folder above it
    above = bucket if is_whole else Bucket(parent)
    found = above.entries("" if is_whole else last)
    if not is_whole and last in found:
        return above, {last: found[last]}
    names = found if is_whole else {n.removeprefix(f"{last}/"): e for n, e in found.items()}
    there = {name: entry for name, entry in names.items() if wanted(name)}
    if there:
        return bucket, there
    some = ", ".join(sorted({name.split("/")[0] for name in names})[:_LISTED])
    what = f"no file that is needed, but {some}" if names else "nothing"
    raise FileNotFoundError(f"{bucket.url}: there is {what}")


def _download(bucket, above, there: Mapping[str, Entry], wanted, path: pathlib.Path) -> bool:
    """Downloads objects; returns False if they have changed meanwhile, and keeps nothing."""
    partial = path.parent.with_name(f".{path.parent.name}.partial")
    # An object's own name is that of its file; those of a folder lie in one.
    inside = partial if above is not bucket else partial / path.name
    earlier = _earlier(path.parent.parent)
    size = sum(entry.size for entry in there.values())
    for name in there:
        _check_name(bucket.url, name)

    def one(name: str) -> int:
        file, entry = inside / name, there[name]
        same = earlier.get((name, *_stamp(entry)))
        if not file.exists() and same is not None and same.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # a file system without links
                os.link(same, file)
        if not file.exists():
            above.download(name, file)
        return entry.size

    pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE)
    bar = tqdm(total=size, desc=bucket.url, unit="B", unit_scale=True, disable=None, delay=1)
    try:
        for done in concurrent.futures.as_completed([pool.submit(one, name) for name in there]):
            bar.update(done.result())
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    fits = all((inside / name).stat().st_size == entry.size for name, entry in there.items())
    if not fits or _listed(bucket, wanted)[1] != there:
        shutil.rmtree(partial)
        return False
    record = [
        (name, *_stamp(entry), (inside / name).relative_to(partial).as_posix())
        for name, entry in there.items()
    ]
    files.write_json(path.parent.with_suffix(".json"), record)
    partial.rename(path.parent)
    return True


def _earlier(home) -> dict[tuple, pathlib.Path]:
    """Returns the files of earlier versions of an address, by name and stamp of the object."""
    found = {}
    for record in home.glob("*.json"):
        with contextlib.suppress(ValueError, OSError):
            for *known, at in files.read_json(record):
                found[tuple(known)] = record.with_suffix("") / at
    return found


def _stamp(entry: Entry) -> tuple[int, str]:
    """Returns what changes with an object's content."""
    return entry.size, entry.tag or repr(entry.written)


def _home(url: str) -> pathlib.Path:
    last = re.sub(r"[^A-Za-z0-9_.-]", "_", url.rpartition("/")[2])
    return files.user_cache() / "buckets" / f"{last}-{_digest(url)}"


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _check_name(url, name):
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise BucketError(f"{url}: {name!r} cannot be the name of a file")
