"""Prints a step in the terminal."""

from collections.abc import Iterator, Sequence

from experiments.command import UsageError
from experiments.responses import texts
from experiments.responses.reading import Response
from experiments.responses.view import PHRASE, GroupView, StepView, response_facts

try:
    from rich.console import Console
    from rich.text import Text
except ImportError as error:
    raise UsageError(
        "the terminal's view needs rich (pip install rich); --html=FILE writes a page without it"
    ) from error

_STYLES = {
    "right": "bold green",
    "wrong": "bold red",
    "pos": "green",
    "neg": "red",
    "zero": "dim",
    "truncated": "bold yellow",
    "status": "bold yellow",
    "unknown": "yellow",
    "index": "bold",
}
_NARROWEST = 20


def console(**options) -> Console:
    """Returns a console that shows text as it is: no markup, no emoji codes, no highlighting."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def show(step: StepView, to: Console, *, chars: int = 0) -> None:
    """Prints a step, group by group.

    Args:
      step: what to show.
      to: a console made by `console`.
      chars: characters of a text to print at most; 0 for all.
    """
    _print(to, [Text(texts.line(step.title), "bold")])
    width = max((len(name) for name, _ in step.facts), default=0)
    for name, value in step.facts:
        _print(to, [Text(texts.line(value))], Text(f"  {name:<{width}}  ", "dim"))
    for note in step.notes:
        _print(to, [Text(texts.line(note), "yellow")], Text("  note: ", "yellow"))
    _print(to, [Text(texts.line(step.shown), "italic")], Text("  "))
    for group in step.groups:
        _group(group, step, to, chars)
    _print(to)
    if 0 < step.num_shown < step.num_matching:  # the summary has left the screen
        _print(to, [Text(texts.line(step.shown), "italic")], Text("  "))
        _print(to)


def _group(group: GroupView, step: StepView, to: Console, chars: int) -> None:
    _print(to)
    facts = [Text(texts.line(fact)) for fact in group.facts]
    _print(to, [Text(texts.line(group.title), "bold cyan"), *facts])
    _body("?" if group.prompt is None else group.prompt, to, chars, bar="  ┊ ")
    answer = "?" if group.answer is None else texts.line(group.answer, PHRASE)
    _print(to, [Text(answer)], Text("  answer  ", "dim"))
    for response in group.responses:
        _response(response, step, to, chars)


def _response(response: Response, step: StepView, to: Console, chars: int) -> None:
    facts = response_facts(response, step.accuracy)
    said = [Text(texts.line(phrase, PHRASE), _STYLES.get(kind, "")) for kind, phrase in facts]
    _print(to, said, Text("  "))
    text = "?" if response.response is None else response.response
    _body(text, to, chars, bar="  │ ", find=step.find)


def _body(text: str, to: Console, chars: int, *, bar: str, find: str = "") -> None:
    """Prints a model's text behind a bar, so that none of it passes for a line of ours."""
    shown = Text()
    for piece in texts.excerpt(text, chars, find):
        if isinstance(piece, int):
            shown.append(f" [… {piece:,} characters left out …] ", "dim italic")
            continue
        for part, held in texts.found_in(piece, find):
            shown.append(part, "reverse" if held else "")
    for line in _lines(shown, to, len(bar)):
        _print(to, [line], Text(bar, "dim"))


def _lines(text: Text, to: Console, indent: int) -> Iterator[Text] | Sequence[Text]:
    """Returns the lines of a text; in a terminal they are as wide as it, else as they are."""
    if not to.is_terminal:
        return text.split("\n", allow_blank=True)
    return text.wrap(to, max(_NARROWEST, to.width - indent))


def _print(to: Console, phrases: Sequence[Text] = (), head: Text | None = None) -> None:
    """Prints phrases after a head, in a terminal on as many lines as they need.

    Later lines are indented: what a model wrote in a phrase never begins a line of the screen.
    """
    head = Text() if head is None else head
    later = Text(" " * (head.cell_len + 4 * (len(phrases) > 1 or not head)))
    for number, line in enumerate(_filled(phrases, to, later.cell_len)):
        to.print(Text.assemble(later if number else head, line), soft_wrap=True)


def _filled(phrases: Sequence[Text], to: Console, indent: int) -> list[Text]:
    """Joins phrases to lines that fit; a phrase is broken only if it does not fit on one."""
    if not to.is_terminal:
        return [Text("  ").join(phrases)]
    room = max(_NARROWEST, to.width - indent)
    found = [Text()]
    for piece in (piece for phrase in phrases for piece in phrase.wrap(to, room)):
        joined = Text("  ").join([found[-1], piece]) if found[-1] else piece
        if joined.cell_len > room:
            found.append(piece)
        else:
            found[-1] = joined
    return found
