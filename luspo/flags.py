"""The flags of the launchers, read from their definitions as text, for completion."""

import ast
import dataclasses

from luspo import places


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a launcher: its name, what it is, values if it has few, whether it needs one."""

    name: str
    about: str
    values: tuple[str, ...]
    takes_value: bool


def flags(command: str) -> list[Flag]:
    """Returns the flags of `experiments.COMMAND`, in their order; none if it does not exist."""
    file = places.root() / "experiments" / f"{command}.py"
    if not file.is_file():
        return []
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [flag for node in ast.walk(tree) if (flag := _flag(node)) is not None]
    names = [a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]
    return found + (flags("cluster") if "cluster" in names else [])


def _flag(node: ast.AST) -> Flag | None:
    """Returns the flag that a call `….DEFINE_kind(…)` defines."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    _, define, kind = node.func.attr.partition("DEFINE_")
    if not define:
        return None
    # DEFINE_flag takes a flag, made of a parser, a serializer and then what the others take.
    words = node.args[0].args[2:] if kind == "flag" else node.args
    texts = [word for word in words[2:] if isinstance(word, ast.Constant | ast.JoinedStr)]
    about = next((said for text in texts if isinstance(said := _words(text), str)), "")
    values = ast.literal_eval(words[2]) if kind == "enum" else ()
    return Flag(words[0].value, about, tuple(values), kind not in ("bool", "flag"))


def _words(text: ast.Constant | ast.JoinedStr) -> str | None:
    if isinstance(text, ast.Constant):
        return text.value
    return "".join(p.value if isinstance(p, ast.Constant) else "…" for p in text.values)
