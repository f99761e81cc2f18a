"""Reports of an evaluation's folder: results.json, results.md, a table on the console."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.command import UsageError
from experiments.evaluation import budgets, storage
from luspo_jax.benchmarks import Benchmark, Record, Summary, summary
from luspo_jax.benchmarks.budgets import Curve
from luspo_jax.benchmarks.record import UNUSABLE
from luspo_jax.benchmarks.registry import benchmark
from luspo_jax.benchmarks.verdicts import STRICT, VLMEVALKIT, Line
from luspo_jax.hosts.files import write_json, write_text

_HEAD = (
    "benchmark", "problems", "not asked", "n", "avg@n %", "95 % interval", "pass@n %", "maj@n %",
    "completed %", "length", "tokens a right", "truncated %", "unparsed %", "not judged",
)  # fmt: skip
_NAMED = 10  # problems named in a note


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Numbers of one benchmark: the common summary, its own figures, and their caveats.

    And its accuracies under budgets, if they were asked for.
    """

    summary: Summary
    figures: list[Line]
    caveats: list[str]
    budgets: Curve | None = None


def write(folder: pathlib.Path, manifest: Mapping[str, Any]) -> str:
    """Writes results.json and results.md for the complete benchmarks.

    Returns:
      The table with the protocol above it.
    """
    found, missing, curves = {}, [], budgets.read(folder)
    for name, entry in manifest["benchmarks"].items():
        try:
            records = storage.read_benchmark(folder, name, entry)
        except UsageError as error:  # from an earlier, stopped command
            missing.append(f"no results of {error}")
            continue
        found[name] = dataclasses.replace(
            numbers(benchmark(name), records), budgets=curves.get(name)
        )
    results = dict(manifest) | {
        "benchmarks": {
            name: dict(manifest["benchmarks"][name]) | _results(result)
            for name, result in found.items()
        }
    }
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", markdown(manifest, found))
    return "\n".join([console(manifest, found), *missing])


def numbers(entry: Benchmark, records: Sequence[Record]) -> Numbers:
    """Computes the numbers of a benchmark's records."""
    once = [record for record in records if record.sample_id == records[0].sample_id]
    rule, caveats = entry.rule, []
    if rule:
        caveats = [f"{VLMEVALKIT}: {rule.note}", *rule.caveats(once)]
    return Numbers(
        summary=summary(records, metric=entry.metric, split_by=entry.split_by),
        figures=entry.figures(records),
        caveats=caveats,
    )


def _results(result: Numbers) -> dict[str, Any]:
    fields = {"results": dataclasses.asdict(result.summary)}
    if result.figures:
        figures = [dataclasses.asdict(line) for line in result.figures]
        fields["figures"] = {"lines": figures, "caveats": result.caveats}
    if result.budgets:
        fields["budgets"] = dataclasses.asdict(result.budgets)
    return fields


def console(manifest: Mapping[str, Any], found: Mapping[str, Numbers]) -> str:
    """Formats the table in columns, with its caveats."""
    rows = [_HEAD, *_rows(manifest, found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    facts = [f"model   : {manifest['model']}", f"protocol: {manifest['protocol']}"]
    own = [line for name, result in found.items() for line in _figure_columns(name, result)]
    cut = [_budget_line(name, n.budgets) for name, n in found.items() if n.budgets]
    return "\n".join([*facts, *lines, *cut, *_notes(manifest, found), *own])


def _budget_line(name: str, found: Curve) -> str:
    """Formats the accuracies under budgets in one line."""
    cuts = (f"{_percent(a)} at {b:,}" for b, a in zip(found.budgets, found.accuracy, strict=True))
    return f"{name}, % under a budget of tokens: {', '.join(cuts)}; area {_percent(found.area)}"


def markdown(manifest: Mapping[str, Any], found: Mapping[str, Numbers]) -> str:
    """Formats the whole report."""
    seed = f"; seed {manifest['seed']}" if "seed" in manifest else ""
    weights = f" (weights {manifest['weights']})" if "weights" in manifest else ""
    lines = [
        f"# {manifest['model']}",
        "",
        f"Model: `{manifest['model']}`{weights}. Protocol: {manifest['protocol']}{seed}.",
        "",
        *_grid(_HEAD, _rows(manifest, found)),
        "",
        *(f"- {note}" for note in _notes(manifest, found)),
        "",
    ]
    for name, result in found.items():
        lines += _details(name, manifest["benchmarks"][name], result)
    return "\n".join(lines)


def _rows(manifest: Mapping[str, Any], found: Mapping[str, Numbers]) -> list[tuple[str, ...]]:
    return [
        _row(name, manifest["benchmarks"][name], result.summary) for name, result in found.items()
    ]


def _row(name: str, entry: Mapping[str, Any], result: Summary) -> tuple[str, ...]:
    responses = sum(result.statuses.values())
    unparsed = result.statuses.get("unparsed", 0) + result.statuses.get("empty", 0)
    failed = result.statuses.get("timeout", 0) + result.statuses.get("error", 0)
    mean = result.lengths.get("mean")
    return (
        name,
        str(result.num_problems),
        str(_not_asked(entry)),
        str(result.num_samples),
        _percent(result.accuracy),
        _interval(result.accuracy_ci95),
        _percent(result.pass_at[result.num_samples]),
        _percent(result.majority_at[result.num_samples]),
        "–" if result.completed is None else _percent(result.completed),
        "–" if mean is None else f"{mean:.1f}",
        "–" if result.tokens_per_right is None else f"{result.tokens_per_right:.1f}",
        "–" if result.truncated is None else _percent(result.truncated),
        _percent(unparsed / responses),
        str(failed),
    )


def _not_asked(entry: Mapping[str, Any]) -> int:
    return sum(map(len, entry.get("refused", {}).values()))


def _notes(manifest: Mapping[str, Any], found: Mapping[str, Numbers]) -> list[str]:
    """Lists what a reader must know before quoting a number."""
    notes = []
    for name, numbers in found.items():
        entry, result = manifest["benchmarks"][name], numbers.summary
        whole, tried = entry["problems_in_dataset"], entry["problems"] + _not_asked(entry)
        if tried < whole:
            notes.append(f"{name}: the first {tried} of {whole} problems only")
        for reason, names in entry.get("refused", {}).items():
            notes.append(f"{name}: {len(names)} of {tried} not asked, {reason}: {_some(names)}")
        if entry.get("images", {}).get("blank"):
            notes.append(f"{name}: every image was blanked")
        unusable = result.statuses.get(UNUSABLE, 0)
        if unusable:
            notes.append(f"{name}: {unusable} responses to unusable annotations do not count")
        failed = result.statuses.get("timeout", 0) + result.statuses.get("error", 0)
        if failed:
            notes.append(f"{name}: {failed} responses could not be judged and count as not right")
        if set(result.statuses) <= {"unparsed", "empty"}:
            notes.append(
                f"{name}: no response states an answer as {', '.join(entry['scorers'].values())} "
                "reads it"
            )
    return notes


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _figure_columns(name: str, numbers: Numbers) -> list[str]:
    """Formats the benchmark's own figures in columns."""
    if not numbers.figures:
        return []
    groups = max(len(line.group) for line in numbers.figures) + len("  ") + 7
    width = max([groups, *(len(f"{name}, {line.table}") for line in numbers.figures)])
    lines = ["", *(f"{name}: {caveat}" for caveat in numbers.caveats)]
    for title, rows in _tables(numbers):
        lines.append(f"{f'{name}, {title}':<{width}}{STRICT:>11}{VLMEVALKIT:>13}")
        lines += [
            f"  {group:<{width - 9}}{items:>7}{strict:>11}{kit:>13}"
            for group, items, strict, kit in rows
        ]
    return lines


def _tables(numbers: Numbers) -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    """Yields (title, rows of group, items, strict, vlmevalkit) of each table."""
    for title, lines in itertools.groupby(numbers.figures, key=lambda line: line.table):
        yield (
            title,
            [
                (
                    line.group,
                    str(line.n),
                    _figure(line.strict, line),
                    _figure(line.vlmevalkit, line),
                )
                for line in lines
            ],
        )


def _figure(value: float | None, line: Line) -> str:
    if value is None:
        return "undefined"
    return f"{value:g}" if line.unit == "count" else f"{100 * value:.2f} %"


def _details(name: str, entry: Mapping[str, Any], numbers: Numbers) -> list[str]:
    dataset, result = entry["dataset"], numbers.summary
    source = f"{dataset['source']}, sha256 {dataset['sha256'][:16] or 'none (generated)'}"
    ks = list(result.pass_at)
    curve = [[str(k), _percent(result.pass_at[k]), _percent(result.majority_at[k])] for k in ks]
    lines = [
        f"## {name}",
        "",
        f"Dataset: {source}; problems {entry['problems_hash']}. Template: {entry['template']} "
        f"{entry['template_hash']}. Scorer: {', '.join(entry['scorers'].values())}. Statuses: "
        + ", ".join(f"{status} {count}" for status, count in result.statuses.items())
        + "."
        + _image_facts(entry.get("images")),
        "",
    ]
    for title, rows in _tables(numbers):
        lines += [*_grid((title, "items", f"{STRICT}", f"{VLMEVALKIT}"), rows), ""]
    lines += [f"- {caveat}" for caveat in numbers.caveats]
    lines += [
        *([""] if numbers.caveats else []),
        *_grid(("k", "pass@k %", "maj@k %"), curve),
        "",
    ]
    if result.lengths:
        shown = [f"{k} {v:.1f}" for k, v in result.lengths.items() if v is not None]
        bins = [
            [edge, _percent(cell["accuracy"]), str(cell["responses"])]
            for edge, cell in result.by_length.items()
        ]
        lines += [f"Length in tokens: {', '.join(shown)}.", ""]
        lines += [*_grid(("tokens", "accuracy %", "responses"), bins), ""]
    lines += [*_mode_table(result), *_budget_table(numbers.budgets)]
    for field, values in result.by_field.items():
        cells = [
            [value, _percent(part["accuracy"]), _interval(part["ci95"]), str(part["problems"])]
            for value, part in values.items()
        ]
        lines += [*_grid((field, "accuracy %", "95 % interval", "problems"), cells), ""]
    return lines


def _mode_table(result: Summary) -> list[str]:
    """Formats the modes by length bin: of any use only with several answers to a problem."""
    if result.num_samples < 2 or not result.modes:
        return []
    names = ("accuracy", "mode_accuracy", "distinct", "differ")
    rows = [
        [
            edge,
            *("–" if cell[name] is None else _percent(cell[name]) for name in names),
            str(cell["problems"]),
        ]
        for edge, cell in result.modes.items()
    ]
    head = ("tokens", "accuracy %", "mode right %", "distinct %", "differ %", "problems")
    return ["Means over problems:", "", *_grid(head, rows), ""]


def _budget_table(found: Curve | None) -> list[str]:
    if found is None:
        return []
    rows = [
        [f"{budget:,}", _percent(share), _interval(ends)]
        for budget, share, ends in zip(found.budgets, found.accuracy, found.ci95, strict=True)
    ]
    return [
        f"Responses cut at a budget of tokens ({found.judged_again} judged again; area over log2 "
        f"of the budget {_percent(found.area)} %; [figure]({budgets.FIGURE})):",
        "",
        *_grid(("budget", "accuracy %", "95 % interval"), rows),
        "",
    ]


def _image_facts(images: Mapping[str, Any] | None) -> str:
    if not images:
        return ""
    return (
        f" Images: {images['min_pixels']} to {images['max_pixels']} pixels"
        + (", blanked" if images["blank"] else "")
        + f"; settings {images['settings']}, shown {images['shown']}."
    )


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f} … {100 * ends[1]:.1f}"
