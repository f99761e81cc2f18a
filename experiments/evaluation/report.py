"""Numbers of an evaluation's folder: results.json, results.md, a table on the console."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.command import UsageError
from experiments.evaluation import storage
from luspo_jax.benchmarks import Summary, summary
from luspo_jax.benchmarks.registry import benchmark
from luspo_jax.watchdog import write_atomically

_HEAD = (
    "benchmark", "problems", "n", "avg@n %", "95 % interval", "pass@n %", "maj@n %", "length",
    "truncated %", "unparsed %", "not judged",
)  # fmt: skip


def write(folder: pathlib.Path, manifest: Mapping[str, Any]) -> str:
    """Writes results.json and results.md of the benchmarks that are complete.

    Returns:
      The table with the protocol above it.
    """
    summaries, missing = {}, []
    for name, entry in manifest["benchmarks"].items():
        try:
            records = storage.read_benchmark(folder, name, entry)
        except UsageError as error:  # of an earlier command that was stopped
            missing.append(f"no results of {error}")
            continue
        split_by = benchmark(name).split_by
        summaries[name] = summary(records, metric=entry["metric"], split_by=split_by)
    results = dict(manifest) | {
        "benchmarks": {
            name: dict(manifest["benchmarks"][name]) | {"results": dataclasses.asdict(result)}
            for name, result in summaries.items()
        }
    }
    write_atomically(
        folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    )
    write_atomically(folder / "results.md", markdown(manifest, summaries))
    return "\n".join([console(manifest, summaries), *missing])


def console(manifest: Mapping[str, Any], summaries: Mapping[str, Summary]) -> str:
    """The table in columns, and what to know of it."""
    rows = [_HEAD, *(_row(name, result) for name, result in summaries.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    facts = [f"model   : {manifest['model']}", f"protocol: {manifest['protocol']}"]
    return "\n".join([*facts, *lines, *_notes(manifest, summaries)])


def markdown(manifest: Mapping[str, Any], summaries: Mapping[str, Summary]) -> str:
    """The whole report."""
    seed = f"; seed {manifest['seed']}" if "seed" in manifest else ""
    weights = f" (weights {manifest['weights']})" if "weights" in manifest else ""
    lines = [
        f"# {manifest['model']}",
        "",
        f"Model: `{manifest['model']}`{weights}. Protocol: {manifest['protocol']}{seed}.",
        "",
        *_grid(_HEAD, [_row(name, result) for name, result in summaries.items()]),
        "",
        *_notes(manifest, summaries),
        "",
    ]
    for name, result in summaries.items():
        lines += _details(name, manifest["benchmarks"][name], result)
    return "\n".join(lines)


def _row(name: str, result: Summary) -> tuple[str, ...]:
    responses = result.num_problems * result.num_samples
    failed = result.statuses.get("timeout", 0) + result.statuses.get("error", 0)
    mean = result.lengths.get("mean")
    return (
        name,
        str(result.num_problems),
        str(result.num_samples),
        _percent(result.accuracy),
        _interval(result.accuracy_ci95),
        _percent(result.pass_at[result.num_samples]),
        _percent(result.majority_at[result.num_samples]),
        "–" if mean is None else f"{mean:.1f}",
        "–" if result.truncated is None else _percent(result.truncated),
        _percent(result.statuses.get("unparsed", 0) / responses),
        str(failed),
    )


def _notes(manifest: Mapping[str, Any], summaries: Mapping[str, Summary]) -> list[str]:
    """What a reader must know before quoting a number."""
    notes = []
    for name, result in summaries.items():
        entry = manifest["benchmarks"][name]
        if entry["problems"] < entry["problems_in_dataset"]:
            whole = entry["problems_in_dataset"]
            notes.append(f"{name}: the first {entry['problems']} of {whole} problems only")
        failed = result.statuses.get("timeout", 0) + result.statuses.get("error", 0)
        if failed:
            notes.append(f"{name}: {failed} responses could not be judged and count as not right")
        if set(result.statuses) == {"unparsed"}:
            notes.append(
                f"{name}: no response states an answer as {', '.join(entry['scorers'].values())} "
                "reads it"
            )
    return notes


def _details(name: str, entry: Mapping[str, Any], result: Summary) -> list[str]:
    dataset = entry["dataset"]
    source = f"{dataset['source']}, sha256 {dataset['sha256'][:16] or 'none (generated)'}"
    ks = list(result.pass_at)
    curve = [[str(k), _percent(result.pass_at[k]), _percent(result.majority_at[k])] for k in ks]
    lines = [
        f"## {name}",
        "",
        f"Dataset: {source}; problems {entry['problems_hash']}. Template: {entry['template']} "
        f"{entry['template_hash']}. Scorer: {', '.join(entry['scorers'].values())}. Statuses: "
        + ", ".join(f"{status} {count}" for status, count in result.statuses.items())
        + ".",
        "",
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
    for field, values in result.by_field.items():
        cells = [
            [value, _percent(part["accuracy"]), _interval(part["ci95"]), str(part["problems"])]
            for value, part in values.items()
        ]
        lines += [*_grid((field, "accuracy %", "95 % interval", "problems"), cells), ""]
    return lines


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
