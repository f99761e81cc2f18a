"""The documents' sections of one RL step, from what `experiments.bench.rl_step` measured."""

from collections.abc import Sequence
from typing import Any

from experiments.bench.turns import OURS

# What a section stands between: the tables of docs/speed.md, and README.md's lines of them.
TABLES = ("<!-- step: python -m experiments.bench.readme_table -->", "<!-- end of step -->")
SUMMARY = ("<!-- speed: python -m experiments.bench.readme_table -->", "<!-- end of speed -->")
_LEAD = """One RL step of ours and of other libraries in turn
(`python -m experiments.bench.rl_step`, [experiments/bench](../experiments/bench/README.md))."""
_PHASES = ("generation", "update", "step")


def section(records: Sequence[dict[str, Any]]) -> str:
    """Returns the tables of all records."""
    return "\n\n".join([_LEAD, *(_text(record) for record in records)])


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Returns a line per task: the seconds of a step over those of each other side."""
    lines: dict[str, list[str]] = {}
    for record in records:
        lines.setdefault(record["task"]["name"], []).extend(
            f"{_ratio(ratios['step'])} of {_named(record, side)}'s"
            for side, ratios in record["ratios"].items()
        )
    return "\n".join(f"- {task}: {', '.join(sides)}" for task, sides in lines.items())


def with_section(text: str, found: str, marks: tuple[str, str]) -> str:
    """Returns a document's text with the section between its marks.

    Raises:
      ValueError: the marks are missing.
    """
    begin, stop = marks
    start, end = text.find(begin), text.find(stop)
    if not 0 <= start < end:
        raise ValueError(f"the document must hold {begin!r} and then {stop!r}")
    return f"{text[:start]}{begin}\n{found}\n{text[end:]}"


def _text(record):
    task, rounds = record["task"], record["plan"]["steps"]
    lengths = [n for group in task["lengths"] for n in group]
    prompts = [len(tokens) for tokens in task["prompt_tokens"]]
    lines = [
        f"{task['name']}: {len(prompts)} prompts × {len(task['lengths'][0])} responses of "
        f"{_range(lengths)} tokens, prompts of {_range(prompts)};",
        f"{task['dtype']}, LUSPO, one update; {record['environment']['processor']}, "
        f"{record['environment']['cores']} cores, {rounds} rounds in turn. Medians:",
        "",
        "| seconds | generation | update | step | update: of matmul rate | step | "
        "ours ÷ theirs: generation | update | step |",
        "|" + "---|" * 9,
        *(_row(record, side) for side in record["medians"]),
        "",
        f"Settings{' found by search' if record['plan']['search'] else ''}: "
        + "; ".join(_settings(record, side) for side in record["medians"])
        + ".",
    ]
    if record["ratios"]:
        lines.append(
            "Ratios are geometric means of rounds with their 95 % intervals; all sides sample and "
            "score the same tokens,\nso they are those per token too. Shares count the least work."
        )
    if "doubled" in record:
        again = record["doubled"]
        times = ", ".join(f"{side} {value:.2f}" for side, value in again["update"].items())
        lines.append(
            f"An update on twice the response tokens is {again['work']:.2f} times the least work: "
            f"{times} times the seconds."
        )
    return "\n".join(lines)


def _row(record, side):
    median = record["medians"][side]
    cells = [_named(record, side)]
    cells += [f"{median[phase]:.2f}" for phase in _PHASES]
    cells += [f"{100 * median[f'{part}_of_matmul_rate']:.0f} %" for part in ("update", "step")]
    if side != OURS:
        cells += [_ratio(record["ratios"][side][phase]) for phase in _PHASES]
        return "| " + " | ".join(cells) + " |"
    return "| " + " | ".join(cells) + " |" + " |" * len(_PHASES)


def _named(record, side):
    package = record["versions"].get(side, {})
    version = package.get(side) or package.get(f"google-{side}")
    return f"{side} {version}" if version else side


def _ratio(numbers):
    if numbers["ci95_low"] is None:
        return f"{numbers['geometric_mean']:.2f}"
    low, high = numbers["ci95_low"], numbers["ci95_high"]
    return f"{numbers['geometric_mean']:.2f} ({low:.2f} … {high:.2f})"


def _settings(record, side):
    chosen = record["settings"][side]["settings"]
    return f"{side} " + ", ".join(f"{name}={value}" for name, value in chosen.items())


def _range(numbers):
    few, many = min(numbers), max(numbers)
    return f"{many}" if few == many else f"{few} to {many}"
