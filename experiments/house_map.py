"""Writes the annotated tree of the library from the first lines of module docstrings.

`python -m experiments.house_map` writes it between the marks in docs/structure.md; a test compares
the two.
"""

import ast
import pathlib
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "structure.md"
BEGIN, END = "<!-- map: python -m experiments.house_map -->", "<!-- end of map -->"
_WIDTH, _INDENT = 100, 16


def house_map(root: pathlib.Path = ROOT) -> str:
    """Returns a line per top-level module and package of `luspo_jax/`, with its modules."""
    library = root / "luspo_jax"
    modules = [p for p in sorted(library.glob("*.py")) if p.name != "__init__.py"]
    packages = [p for p in sorted(library.iterdir()) if (p / "__init__.py").is_file()]
    lines = ["luspo_jax/"]
    lines += [_entry(path.name, _about(path)) for path in modules]
    for package in packages:
        names = sorted(p.stem for p in package.glob("*.py") if p.name != "__init__.py")
        names += [f"{p.name}/" for p in sorted(package.iterdir()) if (p / "__init__.py").is_file()]
        about = _about(package / "__init__.py")
        lines.append(_entry(f"{package.name}/", f"{about} {' · '.join(names)}"))
    return "\n".join(lines)


def with_map(text: str, tree: str) -> str:
    """Returns the page's text with the tree between its marks.

    Raises:
      ValueError: the marks are missing.
    """
    start, end = text.find(BEGIN), text.find(END)
    if not 0 <= start < end:
        raise ValueError(f"docs/structure.md must hold {BEGIN!r} and then {END!r}")
    return f"{text[:start]}{BEGIN}\n```\n{tree}\n```\n{text[end:]}"


def _entry(name: str, about: str) -> str:
    return textwrap.fill(
        about,
        width=_WIDTH,
        initial_indent=f"  {name}".ljust(_INDENT),
        subsequent_indent=" " * _INDENT,
        break_on_hyphens=False,
    )


def _about(path: pathlib.Path) -> str:
    """Returns the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def main() -> None:
    """Writes the map into its page."""
    text = with_map(PAGE.read_text(encoding="utf-8"), house_map())
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
