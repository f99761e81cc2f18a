"""A checkup's outcomes as tables: in the terminal, as JSON, and as a self-contained page."""

import html
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from experiments.machine import rates, running
from experiments.machine.records import (
    ABSENT,
    FAIL,
    OK,
    PARTS,
    SKIPPED,
    Advised,
    Agreed,
    Decoding,
    Fact,
    Gap,
    Outcome,
    Predicted,
    Rate,
    Training,
    plain,
)
from experiments.machine.units import shown_bytes, shown_operations, shown_time

Row = tuple[str, ...]
_WIDTH = 120


def _of_fact(one: Fact) -> Row:
    return one.name, one.value


def _of_rate(one: Rate) -> Row:
    if one.kind.startswith("matrix"):
        return (
            one.kind,
            one.dtype,
            f"{one.size:,} × {one.size:,}",
            f"{shown_operations(one.per_second)}/s",
        )
    return one.kind, one.dtype, shown_bytes(one.size), f"{shown_bytes(one.per_second)}/s"


def _of_gap(one: Gap) -> Row:
    return (
        one.model, one.dtype, f"{one.tokens:,}", f"{one.largest:.3g}", f"{one.mean:.3g}",
        f"{one.limit:g}", OK if one.passed else FAIL,
    )  # fmt: skip


def _of_decoding(one: Decoding) -> Row:
    bound = "" if one.compute_s <= one.bandwidth_s else f"; products {shown_time(one.compute_s)}"
    return (
        one.model, one.dtype, f"{one.rows:,}", f"{one.context:,}", shown_time(one.seconds),
        f"{shown_time(one.bandwidth_s)} for {shown_bytes(one.bytes)}{bound}",
        f"{one.share:.0%}", f"{one.tokens_per_second:,.0f}",
    )  # fmt: skip


def _of_training(one: Training) -> Row:
    return (
        one.model, one.dtype, one.how, f"{one.rows:,} × {one.length:,}", shown_time(one.seconds),
        f"{shown_operations(one.flops)}, {shown_operations(one.computed_flops)}",
        f"{one.share:.0%}", f"{one.tokens_per_second:,.0f}",
    )  # fmt: skip


def _of_predicted(one: Predicted) -> Row:
    shown = shown_time if one.unit == "s" else shown_bytes
    if one.measured is None:
        return one.what, shown(one.predicted), "–", "–", one.note
    ratio = f"{one.predicted / one.measured:.2f}" if one.measured else "–"
    return one.what, shown(one.predicted), shown(one.measured), ratio, one.note


def _of_advised(one: Advised) -> Row:
    mark = "as it is" if one.now == one.value else f"SET {one.value}"
    mark = "DOES NOT FIT" if one.value is None else mark
    return one.field, str(one.now), mark, one.reason


# Kind of record → (part, titles, cells).
_TABLES: dict[type, tuple[str, Row, Callable[[Any], Row]]] = {
    Fact: ("machine", ("what", "found"), _of_fact),
    Rate: ("rates", ("what", "type", "size", "best"), _of_rate),
    Gap: ("agreement", ("weights", "type", "tokens", "largest |Δ log-prob|", "mean", "limit", ""),
          _of_gap),
    Decoding: ("decoding", ("model", "type", "rows", "context", "a step", "bound of bandwidth",
                            "reached", "tokens/s"), _of_decoding),
    Training: ("training", ("model", "type", "how", "tokens", "an update", "needed, computed",
                            "of matrix rate", "tokens/s"), _of_training),
    Predicted: ("rehearsal", ("what", "predicted", "measured", "ratio", ""), _of_predicted),
    Advised: ("advice", ("field", "now", "set", "because"), _of_advised),
}  # fmt: skip


def record(outcomes: Sequence[Outcome], *, config: str, minutes: float, seconds: float) -> dict:
    """Returns everything as JSON values."""
    return {
        "config": config,
        "budget_minutes": minutes,
        "seconds": seconds,
        "passed": running.passed(outcomes),
        "outcomes": [plain(outcome) for outcome in outcomes],
    }


def as_json(found: dict) -> str:
    """Returns the text of a file."""
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def parts(outcomes: Sequence[Outcome]) -> list[tuple[str, Row, list[Row], list[str]]]:
    """Returns (heading, titles, rows, notes) of every part, in order; notes say what is missing."""
    records = [record for outcome in outcomes for record in outcome.records]
    found = []
    for part, heading in PARTS.items():
        titles, rows = (), []
        for kind, (of, names, cells) in _TABLES.items():
            mine = [cells(one) for one in records if of == part and type(one) is kind]
            if mine:
                titles, rows = names, mine
        if part == "kernels":
            titles, rows = _kernels(outcomes)
        notes = [
            f"{outcome.name}: {outcome.status}: {outcome.note}"
            for outcome in outcomes
            if outcome.part == part and outcome.status != OK and part != "kernels"
        ]
        if not rows and not notes:
            notes = ["nothing was measured"]
        found.append((heading, titles, rows, notes))
    return found


def _kernels(outcomes):
    """A row for each kernel, those that failed first, absent ones last."""
    order = (FAIL, OK, SKIPPED, ABSENT)
    mine = [outcome for outcome in outcomes if outcome.part == "kernels"]
    rows = []
    for outcome in sorted(mine, key=lambda one: order.index(one.status)):
        agreed = [one for one in outcome.records if isinstance(one, Agreed)]
        errors = "; ".join(_error(one) for one in agreed)
        limits = "; ".join(f"{one.tolerance:g}" for one in agreed)
        rows.append((outcome.name, outcome.status, limits, errors or outcome.note))
    return ("kernel", "", "tolerance", "error / largest value"), rows


def _error(one):
    if one.of:
        return f"{one.error:.2g} {one.of}"
    gradients = "" if one.gradient_error is None else f", gradients {one.gradient_error:.2g}"
    return f"{one.error:.2g}{gradients}"


def ending(outcomes: Sequence[Outcome], seconds: float) -> list[str]:
    """Returns the lines that say what the checkup comes to."""
    counts = {status: [o for o in outcomes if o.status == status] for status in (FAIL, OK, SKIPPED)}
    lines = [
        f"{len(counts[OK])} checks passed, {len(counts[FAIL])} FAILED, {len(counts[SKIPPED])} "
        f"skipped, in {seconds / 60:.1f} min."
    ]
    if counts[FAIL]:
        lines.append(
            "FAILED: " + "; ".join(o.name for o in counts[FAIL])
            + ". Do not train with these. If one raised an error, those after it may fail for "
            "that alone."
        )  # fmt: skip
    advised = [r for outcome in outcomes for r in outcome.records if isinstance(r, Advised)]
    lines += [f"DOES NOT FIT: {one.field}: {one.reason}." for one in advised if one.value is None]
    changes = [one for one in advised if one.value not in (None, one.now)]
    if changes:
        lines.append("To set: " + "  ".join(f"--config.{c.field}={c.value}" for c in changes))
    elif advised and all(one.value is not None for one in advised):
        lines.append("Nothing to set: the configuration's values are as good as any measured.")
    facts = [one for outcome in outcomes for one in outcome.records if isinstance(one, Fact)]
    if any(rates.BUSY in one.value for one in facts):
        lines.append("Others used the machine: run it again alone before you trust a time.")
    if counts[SKIPPED]:
        lines.append("Skipped checks say why above; for more time, --minutes=30.")
    return lines


def text(outcomes: Sequence[Outcome], seconds: float) -> str:
    """Formats the report for a terminal."""
    lines = []
    for heading, titles, rows, notes in parts(outcomes):
        lines += ["", heading.upper()]
        lines += _table(titles, rows)
        lines += [f"  {note}" for note in notes]
    return "\n".join([*lines, "", *ending(outcomes, seconds)])


def _table(titles: Row, rows: Sequence[Row]) -> list[str]:
    """Lays out cells; the last column is wrapped."""
    if not rows:
        return []
    table = [titles, *rows] if any(titles) else list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(titles) - 1)]
    indent = 2 + sum(widths) + 2 * len(widths)
    lines = []
    for row in table:
        head = "  " + "".join(f"{cell:{width}}  " for cell, width in zip(row, widths, strict=False))
        if indent + min(24, len(row[-1])) > _WIDTH:  # lines of their own
            lines.append(head.rstrip())
            lines += [f"        {line}" for line in textwrap.wrap(row[-1], _WIDTH - 8)]
            continue
        tail = textwrap.wrap(row[-1], max(24, _WIDTH - indent)) or [""]
        lines.append((head + tail[0]).rstrip())
        lines += [" " * indent + line for line in tail[1:]]
    return lines


# ---------------------------------------------------------------- page

_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.25rem 4rem;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 0.4rem; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 0.15rem 1.1rem 0.15rem 0;
  border-top: 1px solid #8884; overflow-wrap: anywhere; }
th { font-weight: 500; opacity: 0.7; white-space: nowrap; }
.FAIL { color: #c22; font-weight: 600; } .ok { color: #187a3c; }
.note { opacity: 0.75; margin: 0.3rem 0; } .end { font-weight: 600; margin: 0.3rem 0; }
"""
# A browser then runs no script and loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(outcomes: Sequence[Outcome], title: str, seconds: float) -> str:
    """Returns the report as one page of HTML."""
    safe = html.escape
    body = [f"<h1>{safe(title)}</h1>"]
    body += [f'<p class="end">{safe(line)}</p>' for line in ending(outcomes, seconds)]
    for heading, titles, rows, notes in parts(outcomes):
        body.append(f"<h2>{safe(heading)}</h2>")
        if rows:
            names = "".join(f'<th scope="col">{safe(name)}</th>' for name in titles)
            body.append(f"<table>\n<tr>{names}</tr>")
            body += ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
            body.append("</table>")
        body += [f'<p class="note">{safe(note)}</p>' for note in notes]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{safe(title)}</title>\n<style>{_STYLE}</style>\n'
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _cell(text):
    kind = f' class="{text}"' if text in (OK, FAIL) else ""
    return f"<td{kind}>{html.escape(text)}</td>"
