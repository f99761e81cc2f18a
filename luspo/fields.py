"""The fields of a configuration with their comments, read from the declarations as text.

A section is a dataclass of `luspo_jax`; its fields are explained by the comment above them or at
the end of their line, or in the docstring under "Attributes". Reading instead of importing them
takes a tenth of a second instead of the seconds that jax takes.
"""

import ast
import dataclasses
import functools
import io
import pathlib
import re
import textwrap
import tokenize

import luspo_jax

_WIDTH = 100
_HOME = "luspo_jax.run.settings"  # where both kinds of configuration can be named
_LIBRARY = pathlib.Path(luspo_jax.__file__).parent


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      name: dotted, as in `--config.NAME`.
      type: its annotation.
      default: the expression of its default; "unset" for None.
      about: the comment; may be empty.
    """

    name: str
    type: str
    default: str
    about: str


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields that belong together; the fields outside all sections have the name ""."""

    name: str
    about: str
    fields: tuple[Field, ...]


def sections(kind: str) -> list[Section]:
    """Returns the sections of `Settings` or of `SftSettings`, in their order."""
    module, node = _class(_HOME, kind)
    outer, found = [], []
    comments = _comments(module)
    for name, declared in _declared(node):
        inner = _class(module, declared.annotation.id) if _is_section(module, declared) else None
        if inner is None:
            outer.append(_field(name, declared, _about(node, declared, name, comments)))
        else:
            found.append(_section(name, *inner))
    return [Section("", "Of the whole run.", tuple(outer)), *found]


def listing(kind: str, prefix: str = "") -> str:
    """Returns the fields that begin with a prefix, for people; empty if there are none."""
    blocks = []
    for section in sections(kind):
        lines = [line for f in section.fields if f.name.startswith(prefix) for line in _lines(f)]
        if lines:
            head = f"{section.name}: {section.about}" if section.name else section.about
            blocks.append("\n".join([*textwrap.wrap(head, _WIDTH), *lines]))
    return "\n\n".join(blocks)


def _lines(field: Field) -> list[str]:
    head = f"  --config.{field.name}={field.default}  ({field.type})"
    return [head, *textwrap.wrap(field.about, _WIDTH - 6, initial_indent=" " * 6,
                                 subsequent_indent=" " * 6)]  # fmt: skip


def _section(name: str, module: str, node: ast.ClassDef) -> Section:
    about, comments = (ast.get_docstring(node) or "").split("\n")[0], _comments(module)
    fields = [
        _field(f"{name}.{field}", declared, _about(node, declared, field, comments))
        for field, declared in _declared(node)
    ]
    if node.name == "Objective":
        # A preset gives every value that is not set (fields.default_config).
        fields = [dataclasses.replace(field, default="unset") for field in fields]
        preset = "An algorithm of docs/objectives.md: gives every field that is unset here."
        fields.insert(0, Field(f"{name}.preset", "str", "'luspo'", preset))
    return Section(name, about, tuple(fields))


def _declared(node: ast.ClassDef) -> list[tuple[str, ast.AnnAssign]]:
    return [
        (item.target.id, item)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)
    ]


def _field(name: str, declared: ast.AnnAssign, about: str) -> Field:
    default = "unset" if declared.value is None else ast.unparse(declared.value)
    default = {"None": "unset", "open_section()": "{}"}.get(default, default)
    kind = ast.unparse(declared.annotation).removesuffix(" | None")
    return Field(name, "dict" if kind.startswith("Mapping") else kind, default, about)


def _is_section(module: str, declared: ast.AnnAssign) -> bool:
    kind = declared.annotation
    return isinstance(kind, ast.Name) and kind.id[0].isupper() and _found(module, kind.id)


def _about(node: ast.ClassDef, declared: ast.AnnAssign, name: str, comments: dict) -> str:
    """Returns the comment above a field and that at its end, or the docstring's words on it."""
    own = _attributes(ast.get_docstring(node) or "")
    if name in own:
        return own[name]
    above, line = [], declared.lineno - 1
    while line in comments and comments[line][0]:
        above.insert(0, comments[line][1])
        line -= 1
    alone, text = comments.get(declared.end_lineno, (True, ""))
    return " ".join([*above, *([] if alone else [text])])


def _attributes(docstring: str) -> dict[str, str]:
    """Returns field → words of the part "Attributes" of a docstring."""
    _, _, part = docstring.partition("Attributes:\n")
    part = re.split(r"\n\n", part)[0]
    found = {}
    for entry in re.split(r"\n(?=  \w)", f"\n{part}"):
        name, colon, words = entry.strip().partition(": ")
        if colon:
            found[name] = " ".join(words.split())
    return found


@functools.cache
def _comments(module: str) -> dict[int, tuple[bool, str]]:
    """Returns line → (whether nothing else is on it, comment) of a module."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(_text(module)).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = (
                not token.line[: token.start[1]].strip(),
                token.string[1:].strip(),
            )
    return found


def _class(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """Returns the module that defines a class, and the definition; follows imports."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _class(node.module, name)
    raise LookupError(f"{module} knows no class {name}")


def _found(module: str, name: str) -> bool:
    try:
        return bool(_class(module, name))
    except LookupError:
        return False


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_text(module))


def _text(module: str) -> str:
    _, *parts = module.split(".")
    path = _LIBRARY.joinpath(*parts)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8")
