"""Texts that a model wrote, made safe to show: nothing in them may act on a terminal or a page."""

import re
import unicodedata
from collections.abc import Sequence

# Vision_start, one or more image_pad, vision_end: the place of an image in a prompt.
_IMAGE = re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>")
# Control, format (text direction, zero width), half a surrogate pair, line and paragraph separator.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


class _Visible(dict):
    """Code point → what is shown for it, found when it is first met."""

    def __missing__(self, code: int) -> str:
        sign = chr(code)
        if sign in "\n\t" or unicodedata.category(sign) not in _HIDDEN:
            shown = sign
        else:
            shown = sign.encode("unicode_escape", "surrogatepass").decode("ascii")
        self[code] = shown
        return shown


_VISIBLE = _Visible()


def visible(text: str) -> str:
    """Returns the text with each sign that has no form of its own as an escape, such as \\x1b.

    Line breaks and tabs stay. No result holds a control sequence, or changes the direction of text.
    """
    return text.translate(_VISIBLE)


def line(text: str, most: int = 0) -> str:
    """Returns a visible text on one line, cut after `most` characters if that is not 0."""
    cut = text[:most] + "…" if most and len(text) > most else text
    return visible(cut.replace("\n", "\\n").replace("\t", "\\t"))


def with_images_named(prompt: str, names: Sequence[str] = ()) -> str:
    """Returns a prompt with `[image 1: NAME]` for each placeholder of an image."""
    known = iter(enumerate([*names, *("" for _ in range(prompt.count("<|vision_start|>")))], 1))

    def named(_):
        number, name = next(known)
        return f"[image {number}: {name}]" if name else f"[image {number}]"

    return _IMAGE.sub(named, prompt)


def excerpt(text: str, most: int, find: str = "") -> list[str | int]:
    """Cuts a long text: its pieces, and between them how many characters are left out.

    The beginning and the end stay, and the surroundings of the first place that holds `find`.

    Args:
      text: to cut.
      most: characters to keep; 0 for all.
      find: text that the cut must not hide.
    """
    if not most or len(text) <= most:
        return [text]
    quarter, found = most // 4, _search(find, text)
    tail = (len(text) - quarter, len(text))
    if quarter and found and most - quarter < found.end() and found.start() < tail[0]:
        middle = found.start() - quarter // 2
        spans = _joined([(0, quarter), (middle, middle + 2 * quarter), tail])
    else:
        spans = _joined([(0, most - quarter), tail])
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [start - end, text[start:stop]] if start > end else [text[start:stop]]
        end = stop
    return [piece for piece in pieces if piece]


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins spans, sorted by their starts, that touch."""
    found = spans[:1]
    for start, stop in spans[1:]:
        if start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def found_in(text: str, find: str) -> list[tuple[str, bool]]:
    """Splits a text at the places that hold `find`, whatever their case: (visible piece, held)."""
    if not find:
        return [(visible(text), False)]
    pieces = re.split(f"({re.escape(find)})", text, flags=re.IGNORECASE)
    return [(visible(piece), index % 2 == 1) for index, piece in enumerate(pieces) if piece]


def holds(text: str, find: str) -> bool:
    """Returns whether a text contains another, whatever their case."""
    return _search(find, text) is not None


def _search(find: str, text: str):
    return re.search(re.escape(find), text, re.IGNORECASE) if find else None
