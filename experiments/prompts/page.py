"""Writes prompts, token by token, as one page of HTML that holds all it needs and runs nothing."""

import html
import os
import pathlib

from experiments.prompts.reading import Piece, Preview, Shown
from experiments.prompts.terminal import written
from experiments.responses import page, texts
from luspo_jax.hosts import files

_STYLE = """
.tokens span { border-radius: 2px; color: #111; white-space: pre-wrap; }
.tokens .a { background: #a8d8df; }
.tokens .b { background: #f5d7a1; }
.tokens .s { background: #7a3e9d; color: #fff; font-weight: 600; }
.tokens .t { text-decoration: underline; text-underline-offset: 3px; }
"""


def write(path: pathlib.Path, found: Preview, *, ids: bool = False) -> None:
    """Writes the page, whole or not at all; the place must have been checked.

    A token's number shows when the pointer is on it; with `ids` all numbers stand below too.
    """
    path = pathlib.Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(
        f'<tr><th scope="row">{_safe(name)}</th><td>{_safe(value)}</td></tr>\n'
        for name, value in found.facts
    )
    body = "".join(_one(shown, ids) for shown in found.prompts)
    with files.replacing(path) as scratch:
        scratch.write_text(
            f"{page.head(_safe(found.title), _STYLE)}<table>\n{rows}</table>\n{body}"
            "</body>\n</html>\n",
            encoding="utf-8",
        )


def _one(shown: Shown, ids: bool) -> str:
    notes = "".join(f'<p class="note">Note: {_safe(note)}</p>\n' for note in shown.notes)
    text = (
        f"<h2>{_safe(shown.title)}</h2>\n{notes}"
        f'<pre class="tokens">{"".join(_spans(shown.pieces))}</pre>\n'
    )
    if shown.answer is not None:
        text += f'<div><span class="name">answer</span> {_safe(shown.answer)}</div>\n'
    if ids:
        numbers = " ".join(str(token) for piece in shown.pieces for token in piece.ids)
        text += f'<div><span class="name">ids</span> {numbers}</div>\n'
    return text


def _spans(pieces: tuple[Piece, ...]):
    number = 0
    for piece in pieces:
        kind = "s" if piece.special else "ab"[number % 2]
        number += not piece.special
        kind += " t" * piece.trained
        ids = " ".join(map(str, piece.ids[:4])) + " …" * (len(piece.ids) > 4)
        yield f'<span class="{kind}" title="{ids}">{html.escape(written(piece))}</span>'


def _safe(text: str) -> str:
    return html.escape(texts.line(text))
