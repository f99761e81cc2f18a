"""Writes steps as one page of HTML that holds everything it needs, and runs nothing."""

import html
import os
import pathlib
from collections.abc import Sequence
from typing import TextIO

from experiments.responses import texts
from experiments.responses.reading import Response, Stored
from experiments.responses.selection import Filters
from experiments.responses.view import PHRASE, GroupView, StepView, response_facts, view
from luspo_jax.hosts import files

_OPEN = 32  # responses up to which a step's groups are open
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #5f6368; --paper: #fff; --card: #f6f7f8;
  --rule: #d5d8db; --good: #17703c; --bad: #b3261e; --warn: #8a5300; --mark: #ffe58a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a0a5ab; --paper: #16181a;
  --card: #1f2226; --rule: #3a3f45; --good: #6fd398; --bad: #ff8a80; --warn: #ffc166;
  --mark: #6b5900; } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0.5rem 0; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 0.5rem; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: 400; color: var(--soft); padding: 0 1.5rem 0 0;
  vertical-align: top; white-space: nowrap; }
td { padding: 0; overflow-wrap: anywhere; }
.note { color: var(--warn); margin: 0.4rem 0; }
.shown { color: var(--soft); margin: 0.6rem 0 1rem; }
details { border-top: 1px solid var(--rule); }
details details { border: 0; background: var(--card); border-radius: 6px; margin: 0.4rem 0; }
summary { cursor: pointer; padding: 0.35rem 0.5rem; overflow-wrap: anywhere; }
summary:focus-visible { outline: 2px solid var(--soft); }
summary span { margin-right: 1em; unicode-bidi: isolate; }
.inside { padding: 0 0.5rem 0.6rem 1.4rem; }
pre { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0.2rem 0 0.5rem; padding: 0.5rem 0.7rem; border-left: 3px solid var(--rule); }
details details pre { margin: 0; }
.name { color: var(--soft); font-size: 0.85rem; }
.title, .index { font-weight: 600; }
.fact, .part, .prediction, .length { color: var(--soft); }
.right, .pos { color: var(--good); }
.wrong, .neg { color: var(--bad); }
.right, .wrong { font-weight: 600; }
.truncated, .status, .unknown { color: var(--warn); font-weight: 600; }
.verdicts { font-family: ui-monospace, monospace; letter-spacing: 0.1em; }
.verdicts i { font-style: normal; }
.bar { display: inline-block; width: 6em; height: 0.5em; background: var(--rule); }
.bar i { display: block; height: 100%; background: var(--soft); }
.cut { color: var(--warn); font-style: italic; }
mark { background: var(--mark); color: inherit; }
"""
# A browser then runs no script and loads nothing, even if a text of a model got into the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_BEGINNING = "<!DOCTYPE html>"
_VERDICTS = {True: ("right", "✓"), False: ("wrong", "✗"), None: ("unknown", "?")}


def check_place(path: pathlib.Path, *, overwrite: bool) -> None:
    """Checks, before slow work, that a page may be written; it replaces nothing but a page.

    Raises:
      PlaceError: the file exists without `overwrite`, is no page, or cannot be created.
    """
    files.check_file(path, flag="--html", overwrite=overwrite)
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        beginning = file.read(len(_BEGINNING))
    if beginning.upper() != _BEGINNING.upper().encode():
        raise files.PlaceError(
            f"--html={path} is no page, and --overwrite replaces pages only: name another file"
        )


def head(title: str, style: str = "") -> str:
    """Returns the beginning of a page, up to its heading.

    Args:
      title: safe in HTML.
      style: rules besides those of all pages.
    """
    return (
        f'{_BEGINNING}\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{_STYLE}{style}'
        f"</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    )


def write(
    path: pathlib.Path,
    run: Stored,
    steps: Sequence[int],
    filters: Filters,
    *,
    chars: int = 0,
    against: int | None = None,
) -> int:
    """Writes the page, whole or not at all; the place must have been checked.

    Args:
      path: of the page.
      run: the run.
      steps: to show.
      filters: what to show of each.
      chars: characters of a text at most; 0 for all.
      against: as for `view`.

    Returns:
      The number of responses on the page.
    """
    path = pathlib.Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with files.replacing(path) as scratch, scratch.open("w", encoding="utf-8") as out:
        _begin(out, run, steps)
        for number in steps:
            with run.steps[number].open("rb") as file:
                step = view(run, number, file, filters, against=against)
                count += _step(out, step, chars, several=len(steps) > 1)
        out.write("</body>\n</html>\n")
    return count


def _begin(out: TextIO, run: Stored, steps: Sequence[int]) -> None:
    name = _safe(run.folder.resolve().name)
    title = f"{name}, step {steps[0]}" if len(steps) == 1 else f"{name}, {len(steps)} steps"
    out.write(head(title))
    if len(steps) > 1:
        links = " ".join(f'<a href="#step-{number}">{number}</a>' for number in steps)
        out.write(f"<p>Steps: {links}</p>\n")


def _step(out: TextIO, step: StepView, chars: int, *, several: bool) -> int:
    heading = f"<h2>{_safe(step.title)}</h2>\n" if several else ""
    out.write(f'<section id="step-{step.number}">\n{heading}<table>\n')
    for name, value in step.facts:
        out.write(f'<tr><th scope="row">{_safe(name)}</th><td>{_safe(value)}</td></tr>\n')
    out.write("</table>\n")
    for note in step.notes:
        out.write(f'<p class="note">Note: {_safe(note)}</p>\n')
    out.write(f'<p class="shown">{_safe(step.shown)}</p>\n')
    for group in step.groups:
        _group(out, group, step, chars)
    out.write("</section>\n")
    return step.num_shown


def _group(out: TextIO, group: GroupView, step: StepView, chars: int) -> None:
    opened = " open" if step.num_shown <= _OPEN else ""
    facts = "".join(f'<span class="fact">{_safe(fact)}</span>' for fact in group.facts)
    signs = (_VERDICTS[verdict] for verdict in group.verdicts)
    verdicts = "".join(f'<i class="{kind}">{sign}</i>' for kind, sign in signs)
    answer = "?" if group.answer is None else group.answer
    out.write(
        f'<details{opened}><summary><span class="title">{_safe(group.title)}</span>'
        f'<span class="verdicts" aria-hidden="true">{verdicts}</span>{facts}</summary>\n'
        '<div class="inside">\n'
        f'<div class="name">prompt</div>\n<pre>{_body(group.prompt, chars)}</pre>\n'
        f'<div><span class="name">answer</span> {_safe(answer, PHRASE)}</div>\n'
    )
    for response in group.responses:
        _response(out, response, step, chars)
    out.write("</div>\n</details>\n")


def _response(out: TextIO, response: Response, step: StepView, chars: int) -> None:
    facts = response_facts(response, step.accuracy)
    spans = "".join(f'<span class="{kind}">{_safe(said, PHRASE)}</span>' for kind, said in facts)
    share = 100 * (response.length or 0) / max(1, step.longest)
    out.write(
        f'<details open><summary>{spans}<span class="bar"><i style="width:{share:.0f}%"></i></span>'
        f"</summary>\n<pre>{_body(response.response, chars, step.find)}</pre>\n</details>\n"
    )


def _body(text: str | None, chars: int, find: str = "") -> str:
    """Returns a text as HTML, cut, with what was searched for marked."""
    if text is None:
        return "?"
    found = []
    for piece in texts.excerpt(text, chars, find):
        if isinstance(piece, int):
            found.append(f'<span class="cut"> [… {piece:,} characters left out …] </span>')
            continue
        for part, held in texts.found_in(piece, find):
            safe = html.escape(part)
            found.append(f"<mark>{safe}</mark>" if held else safe)
    return "".join(found)


def _safe(text: str, most: int = 0) -> str:
    """Returns a text on one line of HTML."""
    return html.escape(texts.line(text, most))
