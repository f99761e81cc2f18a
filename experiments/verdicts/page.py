"""Writes Markdown from commands: tables, and sections of a page that leave the others unchanged."""

import pathlib
import re
from collections.abc import Sequence

from luspo_jax.hosts import files


def table(head: Sequence, rows: Sequence[Sequence]) -> str:
    """Formats a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_section(page: pathlib.Path, title: str, body: str) -> None:
    """Replaces the section with this title, or appends it to the page."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    sections = [s.strip() for s in re.split(r"(?m)^(?=# )", text) if s.strip()]
    new = f"# {title}\n\n{body}".rstrip()
    places = [k for k, s in enumerate(sections) if s.partition("\n")[0] == f"# {title}"]
    if places:
        sections[places[0]] = new
    else:
        sections.append(new)
    files.write_text(page, "\n\n".join(sections) + "\n")


def cell(text: str, longest: int = 60) -> str:
    """Formats a short text as code on one line, with table syntax escaped."""
    text = " ".join(text.split())
    return "`" + text[-longest:].replace("|", "\\|").replace("`", "'") + "`"
