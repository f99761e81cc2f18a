"""Prints prompts in the terminal, token by token."""

from rich.console import Console
from rich.text import Text

from experiments.prompts.reading import Piece, Preview, Shown
from experiments.responses import texts

_STYLES = ("black on #a8d8df", "black on #f5d7a1")  # by turns
_SPECIAL, _TRAINED = "bold white on #7a3e9d", "underline"
_BAR = "  ┊ "
_END, _TRAINED_END = "▏", "▍"  # after a token, where there are no colours


def show(found: Preview, to: Console, *, ids: bool = False) -> None:
    """Prints a preview.

    Args:
      found: what to show.
      to: a console made by `responses.terminal.console`.
      ids: whether to print the tokens' numbers too.
    """
    to.print(Text(found.title, "bold"), soft_wrap=True)
    width = max((len(name) for name, _ in found.facts), default=0)
    for name, value in found.facts:
        line = Text.assemble((f"  {name:<{width}}  ", "dim"), texts.line(value))
        to.print(line, soft_wrap=True)
    for shown in found.prompts:
        _one(shown, to, ids)


def _one(shown: Shown, to: Console, ids: bool) -> None:
    to.print()
    to.print(Text(texts.line(shown.title), "bold cyan"), soft_wrap=True)
    for note in shown.notes:
        to.print(Text(f"  note: {texts.line(note)}", "yellow"), soft_wrap=True)
    body = coloured(shown.pieces, colours=to.color_system is not None and not to.no_color)
    lines = body.split("\n", allow_blank=True)
    if to.is_terminal:
        lines = [part for line in lines for part in line.wrap(to, max(20, to.width - len(_BAR)))]
    for line in lines:
        to.print(Text.assemble((_BAR, "dim"), line), soft_wrap=True)
    if shown.answer is not None:
        answer = Text.assemble(("  answer  ", "dim"), texts.line(shown.answer))
        to.print(answer, soft_wrap=True)
    if ids:
        said = " ".join(str(token) for piece in shown.pieces for token in piece.ids)
        to.print(Text.assemble(("  ids  ", "dim"), said), soft_wrap=True)


def coloured(pieces: tuple[Piece, ...], *, colours: bool = True) -> Text:
    """Returns the text of tokens; without colours, each ends with a sign."""
    text, number = Text(), 0
    for piece in pieces:
        style = _SPECIAL if piece.special else _STYLES[number % 2]
        number += not piece.special
        if piece.trained:
            style = f"{style} {_TRAINED}"
        said = written(piece)
        if not colours:
            end = _TRAINED_END if piece.trained else _END
            said = f"{said[:-1]}{end}\n" if said.endswith("\n") else f"{said}{end}"
        text.append(said, style)
    return text


def written(piece: Piece) -> str:
    """Returns a piece's text with nothing in it that acts; a line break is shown and made."""
    text = texts.visible(piece.text).replace("\t", "\\t").replace("\n", "↵\n")
    return f"{text}×{piece.repeats:,}" if piece.repeats > 1 else text
