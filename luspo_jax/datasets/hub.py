"""A dataset's files on the Hugging Face hub; downloaded only if a user names them."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.rows import SUFFIXES
from luspo_jax.datasets.selection import chosen, is_pattern, matching
from luspo_jax.hosts import files

PREFIX = "hub:"
_CARD = "README.md"


def is_hub(path) -> bool:
    """Whether a path names files on the hub."""
    return str(path).startswith(PREFIX)


@dataclasses.dataclass(frozen=True)
class Repository:
    """A dataset repository, and what is meant of it.

    Attributes:
      text: as the user wrote it, "hub:OWNER/NAME[@REVISION][/FILE, FOLDER or PATTERN]".
      id: "OWNER/NAME".
      revision: None for the newest.
      inside: FILE, FOLDER or PATTERN; empty for all.
    """

    text: str
    id: str
    revision: str | None
    inside: str

    @classmethod
    def of(cls, text: str) -> "Repository":
        """Reads a path.

        Raises:
          DataError: it names no repository.
        """
        owner, _, rest = text.removeprefix(PREFIX).partition("/")
        name, _, inside = rest.partition("/")
        name, _, revision = name.partition("@")
        if not owner or not name:
            raise DataError(
                f"{text}: a dataset on the hub is hub:OWNER/NAME or hub:OWNER/NAME/FILE"
            )
        return cls(text, f"{owner}/{name}", revision or None, inside.strip("/"))

    def _place(self):
        return {"repo_id": self.id, "repo_type": "dataset", "revision": self.revision}

    def names(self) -> list[str]:
        """Returns the names of all files.

        They are kept in the user's cache: without a network, as on the nodes of a cluster, what was
        downloaded before can be read, and what is missing is missed.
        """
        key = hashlib.sha256(json.dumps([self.id, self.revision]).encode()).hexdigest()[:16]
        kept = files.user_cache() / "hub" / f"{key}.json"
        import huggingface_hub

        try:
            with _one_message(self.text):
                found = list(huggingface_hub.list_repo_files(**self._place()))
        except DataError:
            if not kept.is_file():
                raise
            return files.read_json(kept)
        with contextlib.suppress(OSError):  # it is only a help
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(kept, found)
        return found

    def download(self, name: str) -> pathlib.Path:
        """Downloads a file, unless it is there, and returns its path."""
        # Imported here, so that nothing uses the network unless a hub id is named.
        import huggingface_hub

        with _one_message(self.text):
            return pathlib.Path(huggingface_hub.hf_hub_download(filename=name, **self._place()))

    def card(self) -> str:
        """Returns the text of the card."""
        return self.download(_CARD).read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _one_message(text: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub raises a dozen types with the same remedy
        raise DataError(
            f"{text}: cannot be downloaded ({type(error).__name__}: {error}): check the name, the "
            "network and the login, or give a local file"
        ) from error


def hub_names(repository: Repository, split: str, subset: str = "") -> list[str]:
    """Returns the names of the files that are meant, in order.

    A file is itself, a pattern all files that match it; of a folder or a repository the files of
    the split and subset (`selection.chosen`).

    Raises:
      DataError: no such repository or files, or several candidates, listed in the message.
    """
    inside = repository.inside
    if inside and not is_pattern(inside) and pathlib.PurePath(inside).suffix.lower() in SUFFIXES:
        return [inside]
    names = repository.names()
    if is_pattern(inside):
        found = [n for n in matching(names, inside) if pathlib.PurePath(n).suffix in SUFFIXES]
        if not found:
            raise DataError(
                f"{repository.text}: no {', '.join(SUFFIXES)} file of the repository matches; it "
                f"has {', '.join(sorted(names)[:20]) or 'nothing'}"
            )
        return found
    if inside in names:
        return [inside]
    within = [n.removeprefix(f"{inside}/") for n in names if n.startswith(f"{inside}/")]
    within = within if inside else list(names)
    card = repository.card if not inside and _CARD in names else None
    found = chosen(within, repository.text, split, subset, card)
    return [f"{inside}/{name}" if inside else name for name in found]
