"""Which part of a source is taken, and which files it has."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.rows import SUFFIXES
from luspo_jax.hosts.values import nearest

_LISTED = 20  # names in a message
# What tells apart the parts of one table: train-00000-of-00003.parquet, train_07.jsonl.
_SHARD = re.compile(r"([-_.]?\d+(-of-\d+)?(-[0-9a-f]{8,})?)(?=\.[^.]+$)")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which part of a source is taken.

    Attributes:
      subset: one of several tables of a repository or folder, "configuration" on the hub.
      filter: rows to take, as `filters.Filter` reads it; empty for all.
      limit: the first so many rows, before the filter; 0 for all.
      streaming: read these rows from the hub without downloading files; needs a limit.
      drop_bad_rows: leave out and count unusable rows, instead of refusing the source.
    """

    subset: str = ""
    filter: str = ""
    limit: int = 0
    streaming: bool = False
    drop_bad_rows: bool = False

    @property
    def chooses(self) -> bool:
        """Whether it takes less than everything."""
        return bool(self.subset or self.filter or self.limit or self.streaming)


ALL = Selection()


def is_pattern(text: str) -> bool:
    """Whether a path means the files that match it."""
    return any(sign in text for sign in "*?[")


def matching(names: Sequence[str], pattern: str) -> list[str]:
    """Returns the names that a pattern matches, in order; ** crosses folders, * does not."""
    made = "".join(map(_translated, _SIGNS.findall(pattern)))
    return sorted(name for name in names if re.fullmatch(made, name))


_SIGNS = re.compile(r"\*\*/|\*\*|\*|\?|\[[^]/]+\]|.", re.DOTALL)
_MEANT = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _translated(sign: str) -> str:
    """Returns a part of a pattern as a regular expression."""
    if len(sign) > 2 and sign[0] == "[":
        inside = re.sub(r"([\\\[^&|~])", r"\\\1", sign[1:-1])
        return f"[^{inside[1:]}]" if inside[0] == "!" else f"[{inside}]"
    return _MEANT.get(sign) or re.escape(sign)


def chosen(
    names: Sequence[str], place: str, split: str, subset: str, card: Callable[[], str] | None = None
) -> list[str]:
    """Returns the files of one split of one table, in order.

    The card of a repository (README.md) says which they are; without such lines the names do: they
    have split and subset as words, and differ only in the number of a part.

    Args:
      names: of all files, relative to the repository or folder.
      place: it, for messages.
      split: the split.
      subset: the table; empty if there is only one, or one by default.
      card: returns the card's text; None if there is none.

    Raises:
      DataError: no such files, or those of several tables; the message lists what there is.
    """
    tables = _tables(card()) if card is not None else {}
    if tables:
        return _by_card(tables, names, place, split, subset)
    readable = sorted(n for n in names if pathlib.PurePath(n).suffix.lower() in SUFFIXES)
    fitting = [n for n in readable if _has_word(n, split) and (not subset or _has_word(n, subset))]
    groups: dict[str, list[str]] = {}
    for name in fitting:
        groups.setdefault(_SHARD.sub("", name), []).append(name)
    if len(groups) == 1:
        return fitting
    what = f"split {split!r}" + (f" of subset {subset!r}" if subset else "")
    count = len(fitting) if groups else 0
    shown = [part[0] + (f" (and {len(part) - 1} more)" if part[1:] else "") for part in
             groups.values()] or readable  # fmt: skip
    raise DataError(
        f"{place}: {count} files fit {what}; name one or a pattern, as in {place}/FILE or "
        f"{place}/*.parquet, or set data.subset: {_list(shown) or 'none that can be read'}"
    )


def _has_word(name: str, word: str) -> bool:
    return re.search(rf"(?:^|[/_.-]){re.escape(word)}(?:[/_.-]|$)", name) is not None


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + f" and {len(names) - _LISTED} more" * (len(names) > _LISTED)


def _tables(card: str) -> dict[str, Any]:
    """Returns table → its lines, of the front matter of a card; empty if it has none."""
    import yaml  # huggingface_hub needs it too

    found = re.match(r"\ufeff?---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        lines = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    listed = lines.get("configs") if isinstance(lines, Mapping) else None
    return {
        str(table.get("config_name", "default")): table
        for table in (listed if isinstance(listed, list) else [])
        if isinstance(table, Mapping) and table.get("data_files")
    }


def _by_card(tables, names, place, split, subset) -> list[str]:
    default = [name for name, table in tables.items() if table.get("default") is True]
    if not subset and len(tables) > 1 and not default and "default" not in tables:
        raise DataError(f"{place} has several subsets: set data.subset to {_or(tables)}")
    name = subset or (default or [*(n for n in tables if n == "default"), *tables])[0]
    if name not in tables:
        raise DataError(f"{place}: no subset {name!r}; {nearest(name, tables)} (data.subset)")
    splits = _splits(tables[name]["data_files"])
    if split not in splits:
        raise DataError(f"{place}: no split {split!r} of subset {name!r}; {nearest(split, splits)}")
    found = [n for pattern in splits[split] for n in matching(names, pattern.removeprefix("./"))]
    found = [n for n in dict.fromkeys(found) if pathlib.PurePath(n).suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(
            f"{place}: its card names {', '.join(splits[split])} for split {split!r}, and no such "
            f"file is a {', '.join(SUFFIXES)} file"
        )
    return found


def _or(names) -> str:
    return " or ".join([*names][:_LISTED])


def _splits(files: Any) -> dict[str, list[str]]:
    """Returns split → patterns, of a card's `data_files` in any of its forms."""
    files = [files] if isinstance(files, str | Mapping) else files
    found: dict[str, list[str]] = {}
    for item in files:
        split, path = "train", item
        if isinstance(item, Mapping):
            split, path = str(item.get("split", "train")), item.get("path", [])
        found.setdefault(split, []).extend([path] if isinstance(path, str) else map(str, path))
    return found
