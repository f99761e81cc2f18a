"""Where a file of the checkout stands in the site, and links between them.

Documents link each other by their places in the checkout, as one reads them there. The site has
the same links between its own pages: every document of the checkout is one of them, and a file of
another kind that a document names (a configuration, a notebook) becomes a page that shows it.
"""

import functools
import json
import pathlib
import posixpath
import re
import subprocess
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(\]\()([^()\s]+)(\))")
_FENCE = re.compile(r"^\s*(```|~~~)")
_CODE = re.compile(r"(`+[^`]+`+)")
_FILES = "files/"  # of the site: pages of files that are no documents
_LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".sh": "bash", ".yaml": "yaml"}
# Documents that are no pages: cards of models, which are about their folders.
_APART = ("luspo_jax/models/embedded/",)


@functools.cache
def documents() -> tuple[str, ...]:
    """Returns the Markdown files and pictures of the checkout that the site shows, as paths.

    These are the tracked ones and new ones, but not what git ignores.
    """
    kinds = ("--cached", "--others", "--exclude-standard")
    command = ["git", "ls-files", *kinds, "*.md", "*.png"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(ran.stdout.split())
    return tuple(
        path for path in sorted(listed) if (ROOT / path).is_file() and not path.startswith(_APART)
    )


def place(path: str) -> str:
    """Returns where a file of the checkout stands in the site.

    docs/ is the site's top. `README.md` of a folder is the page of the folder.
    """
    for folder in ("docs/", "experiments/"):
        if path.startswith(folder):
            path = path.removeprefix(folder)
            break
    if not path.endswith((".md", ".png")):
        return f"{_FILES}{path}.md"
    folder, name = posixpath.split(path)
    name = "index.md" if name == "README.md" else name
    return posixpath.join(folder, name if folder else name.lower())


def origin(place_: str) -> str:
    """Returns the path in the checkout of a page; one of the reference counts as in docs/."""
    if place_.startswith(_FILES):
        return place_.removeprefix(_FILES).removesuffix(".md")
    return _places().get(place_, f"docs/{place_}")


@functools.cache
def _places():
    return {place(path): path for path in documents()}


def rewritten(text: str, path: str, found: Callable[[str], str]) -> str:
    """Returns a document's text with its relative links pointing into the site.

    Args:
      text: Markdown.
      path: of the document in the checkout.
      found: path of the file in the checkout that a link names → its place in the site.
    """
    here = posixpath.dirname(place(path)) or "."

    def replace(match):
        target, mark, anchor = match[2].partition("#")
        if not target or ":" in target:
            return match[0]
        there = found(_resolved(path, target))
        return f"{match[1]}{posixpath.relpath(there, here)}{mark}{anchor}{match[3]}"

    return _outside_code(text, lambda part: _LINK.sub(replace, part))


def linked(text: str, path: str) -> Iterator[str]:
    """Yields the paths of the files in the checkout that a document links."""
    parts = []
    _outside_code(text, lambda part: parts.append(part) or part)
    for part in parts:
        for match in _LINK.finditer(part):
            target = match[2].partition("#")[0]
            if target and ":" not in target:
                yield _resolved(path, target)


def shown(path: str) -> str:
    """Returns the page of a file that is no document: its text, or a notebook's cells."""
    file = ROOT / path
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return f"*`{path}`*\n\n" + "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    language = _LANGUAGES.get(file.suffix, "")
    return f"# {file.name}\n\n`{path}`\n\n{_fenced(text, language)}\n"


def _cell(cell):
    source = "".join(cell["source"])
    return source if cell["cell_type"] == "markdown" else _fenced(source, "python")


def _fenced(text, language):
    return f"````{language}\n{text.rstrip()}\n````"


def _resolved(path, target):
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _outside_code(text, change):
    """Applies `change` to what is neither in a fenced block nor between backticks.

    A link may have code in its text, so a line is cut only into what precedes a link's target.
    """
    lines, fence = [], None
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if mark and fence in (None, mark[1]):
            fence = None if fence else mark[1]
            lines.append(line)
        elif fence:
            lines.append(line)
        else:
            parts = _CODE.split(line)
            lines.append("".join(x if i % 2 else change(x) for i, x in enumerate(parts)))
    return "\n".join(lines)
