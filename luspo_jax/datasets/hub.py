"""A dataset's file on the Hugging Face hub; downloaded only if a user names one."""

import pathlib
import re
from collections.abc import Sequence

from luspo_jax.datasets.example import DataError

PREFIX = "hub:"


def is_hub(path) -> bool:
    """Whether a path names a file on the hub."""
    return str(path).startswith(PREFIX)


def hub_file(path: str, split: str, suffixes: Sequence[str]) -> pathlib.Path:
    """Downloads "hub:OWNER/NAME[@REVISION][/FILE]" and returns the local path.

    If no file is named, the repository must have exactly one whose name has the split as a word.

    Raises:
      DataError: no such repository or file, or several candidates, listed in the message.
    """
    owner, _, rest = path.removeprefix(PREFIX).partition("/")
    name, _, file = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise DataError(f"{path}: a dataset on the hub is hub:OWNER/NAME or hub:OWNER/NAME/FILE")
    place = {"repo_id": f"{owner}/{name}", "repo_type": "dataset", "revision": revision or None}
    # Imported here, so that nothing uses the network unless a hub id is named.
    import huggingface_hub

    try:
        if not file:
            file = _only(huggingface_hub.list_repo_files(**place), path, split, suffixes)
        return pathlib.Path(huggingface_hub.hf_hub_download(filename=file, **place))
    except DataError:
        raise
    except Exception as error:  # the hub raises a dozen types with the same remedy
        raise DataError(
            f"{path}: cannot be downloaded ({type(error).__name__}: {error}): check the name, the "
            "network and the login, or give a local file"
        ) from error


def _only(files: Sequence[str], path: str, split: str, suffixes: Sequence[str]) -> str:
    readable = sorted(f for f in files if pathlib.PurePath(f).suffix in suffixes)
    word = re.compile(rf"(?:^|[/_.-]){re.escape(split)}(?:[/_.-]|$)")
    fitting = [file for file in readable if word.search(file)]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(fitting or readable) or "none that can be read"
    raise DataError(
        f"{path}: {len(fitting)} files fit split {split!r}; name one, as in {path}/FILE: {listed}"
    )
