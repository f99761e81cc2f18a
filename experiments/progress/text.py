"""A run's progress as plain text, as wide as the terminal."""

import datetime
import textwrap
from collections.abc import Sequence

from experiments.progress.facts import FINISHED, GONE, RUNNING, UNSTARTED, Progress
from experiments.responses import texts

_LABEL = 12
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def page(known: Progress, width: int) -> str:
    """Returns the lines of a run."""
    lines = [f"{known.workdir}: {headline(known)}"]
    for label, text in (
        ("step", _step(known) if known.age_s is not None else ""),
        ("reward", _value(known, "reward", "{:.4g}")),
        ("loss", _value(known, "sft/loss", "{:.4f}")),
        ("length", _length(known)),
        *(("held out", _curve(name, curve)) for name, curve in known.curves.items()),
        *(("flag", f"{name}: {says}") for name, says in known.flags.items()),
        *((f"process {p.index}", _process(p)) for p in known.processes),
        ("checkpoints", _checkpoints(known)),
        ("in bucket" if "://" in known.workdir else "on disk", _disk(known)),
        *(("note", note) for note in known.notes),
    ):
        if text:
            lines.append(f"  {label:{_LABEL - 1}} {text}")
    return "\n".join(_wrapped(line, width) for line in lines)


def member_lines(known: Sequence[Progress], width: int) -> str:
    """Returns one line for each member of a sweep, in columns, cut at the width."""
    cells = [("member", "state", "step", "reward", "length", "held out", "flags")]
    for member in known:
        curve = next(iter(member.curves.values()), None)
        cells.append(
            (
                member.workdir,
                member.state,
                _of(member),
                _plain(member, "reward", "{:.3f}") or _plain(member, "sft/loss", "{:.4f}"),
                _plain(member, "response_length/mean", "{:,.0f}"),
                f"{curve.last.value:.3f}, best {curve.best.value:.3f}" if curve else "",
                ", ".join(name.removeprefix("length/") for name in member.flags),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(f"{cell:{size}}" for cell, size in zip(row, widths, strict=True)) for row in cells
    )
    return "\n".join(texts.line(line.rstrip())[:width] for line in lines)


def headline(known: Progress) -> str:
    """Returns the state in words, with the last sign of life."""
    if known.state == GONE:
        return "GONE, or not there yet: there is no such folder"
    if known.state == UNSTARTED:
        return "never started: the folder holds no run"
    ago = f"last sign of life {span(known.age_s)} ago"
    if known.state in (RUNNING, FINISHED):
        return f"{known.state}, {ago}"
    return f"{known.state.upper()}, {ago}"


def span(seconds: float) -> str:
    """Returns a time in its two largest units: 2 h 5 min."""
    left, words = round(seconds), []
    for size, unit in _UNITS:
        if left >= size and len(words) < 2:
            words.append(f"{left // size} {unit}")
            left %= size
        elif words:
            break
    return " ".join(words) or "0 s"


def size(number: int) -> str:
    """Returns bytes with their unit, of 1,000 each."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= least:
            return f"{number / least:.1f} {unit}"
    return f"{number} bytes"


def _wrapped(line, width):
    indent = " " * (_LABEL + 2)
    return "\n".join(
        textwrap.wrap(
            texts.line(line), max(width, 2 * _LABEL), subsequent_indent=indent,
            break_on_hyphens=False,
        )
    )  # fmt: skip


def _of(known):
    if known.step is None:
        return ""
    return f"{known.step}" + (f"/{known.num_steps}" if known.num_steps else "")


def _step(known):
    if known.step is None:
        return "none yet"
    text = f"{known.step:,}" + (f" of {known.num_steps:,}" if known.num_steps else "")
    if known.seconds_per_step is not None:
        text += f", {known.seconds_per_step:.3g} s each"
    if known.ends_in_s is not None and known.step < known.num_steps:
        end = datetime.datetime.now() + datetime.timedelta(seconds=known.ends_in_s)
        text += f"; about {span(known.ends_in_s)} to go, until {end:%a %d %b %H:%M}"
    return text


def _plain(known, name, form):
    return form.format(known.values[name].value) if name in known.values else ""


def _value(known, name, form):
    """Returns a value, and its step if that is not the run's last."""
    if name not in known.values:
        return ""
    point = known.values[name]
    late = f" (step {point.step:,})" if point.step != known.step else ""
    return form.format(point.value) + late


def _length(known):
    mean, cut = "response_length/mean", "response_length/clip_ratio"
    parts = [_value(known, mean, "{:,.1f} tokens"), _value(known, cut, "{:.1%} truncated")]
    return ", ".join(filter(None, parts))


def _curve(name, curve):
    points = curve.first, curve.best, curve.last
    first, best, last = (f"{p.value:.4g} (step {p.step:,})" for p in points)
    return f"{name.removeprefix('val-core/')}: first {first}, best {best}, last {last}"


def _process(process):
    phase = "" if process.status == "done" else f"phase {process.phase} of "
    text = f"{process.status}, {phase}step {process.step}, {span(process.age_s)} ago; "
    text += f"host {process.host}, pid {process.pid}"
    return text + (f": {process.message}" if process.message else "")


def _checkpoints(known):
    if not known.checkpoints:
        return "none yet" if known.age_s is not None else ""
    text = f"latest {known.checkpoints[-1]:,}"
    if known.best_checkpoint is not None:
        text += f", best {known.best_checkpoint:,}"
    return text + f"; {len(known.checkpoints)} kept"


def _disk(known):
    parts = [f"{name} {size(number)}" for name, number in known.bytes.items() if number]
    return f"{size(sum(known.bytes.values()))}: {', '.join(parts)}" if parts else ""
