"""Compares two evaluations, paired by problem; refuses those that do not measure the same."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.command import UsageError
from experiments.evaluation import storage
from luspo_jax.benchmarks.statistics import Difference, difference

# Fields of a benchmark that two comparable evaluations share; numbers of responses and seeds may
# differ. Chat templates belong to models, so a difference in their hash is only reported.
_SHARED = {"problems_hash": "problems", "scorers": "scorers", "template": "prompt template"}


def compare(ours: pathlib.Path, theirs: pathlib.Path) -> str:
    """Returns a table of paired differences, ours minus theirs, on the benchmarks in both.

    Raises:
      UsageError: different protocols, scorers, problems or templates, named in the message; no
        benchmark in common.
    """
    folders = [pathlib.Path(ours), pathlib.Path(theirs)]
    manifests = [storage.read_manifest(folder) for folder in folders]
    shared = [n for n in manifests[0]["benchmarks"] if n in manifests[1]["benchmarks"]]
    if not shared:
        held = [", ".join(manifest["benchmarks"]) for manifest in manifests]
        raise UsageError(f"--compare: no benchmark in common: {held[0]} and {held[1]}")
    clashes = [line for line in _clashes(manifests[0], manifests[1], shared)]
    if clashes:
        raise UsageError(
            "--compare: these evaluations do not measure the same:\n"
            + "\n".join(f"  - {line}" for line in clashes)
        )
    lines = [f"A: {manifests[0]['model']}", f"B: {manifests[1]['model']}"]
    lines.append(f"protocol: {manifests[0]['protocol']}; A − B, paired by problem")
    for name in shared:
        lines.append(_line(name, *_records(folders, manifests, name)))
    lines += list(_notes(manifests, shared))
    return "\n".join(lines)


def _clashes(a: Mapping[str, Any], b: Mapping[str, Any], shared: list[str]) -> Iterator[str]:
    if a["sampling"] != b["sampling"]:
        yield f"protocols: {a['protocol']} and {b['protocol']}"
    for name in shared:
        ours, theirs = a["benchmarks"][name], b["benchmarks"][name]
        for field, word in _SHARED.items():
            if ours[field] != theirs[field]:
                yield f"{name}: {word}: {_shown(ours, field)} and {_shown(theirs, field)}"


def _shown(entry: Mapping[str, Any], field: str) -> str:
    if field == "scorers":
        return ", ".join(entry["scorers"].values()) + " (--rescore brings both to one)"
    if field == "problems_hash":
        return f"{entry['problems']} of {entry['dataset']['source']} ({entry[field]})"
    return str(entry[field] or "none")


def _records(folders, manifests, name):
    sides = [
        storage.read_benchmark(folder, name, manifest["benchmarks"][name])
        for folder, manifest in zip(folders, manifests, strict=True)
    ]
    metric = manifests[0]["benchmarks"][name]["metric"]
    sizes = [manifest["benchmarks"][name]["num_samples"] for manifest in manifests]
    return difference(*sides, metric=metric), sizes


def _line(name: str, result: Difference, sizes: list[int]) -> str:
    low, high = result.ci95
    fields = dataclasses.asdict(result)
    return (
        f"{name} (n = {sizes[0]} and {sizes[1]}): {100 * result.difference:+.1f} points, 95 % "
        f"interval {100 * low:+.1f} … {100 * high:+.1f}; A better on {fields['better']} problems, "
        f"worse on {fields['worse']}, equal on {fields['equal']}"
    )


def _images(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Describes the first difference between the images of two evaluations."""
    for fields in (("blank", "min_pixels", "max_pixels"), ("settings",), ("shown",)):
        changed = [field for field in fields if ours.get(field) != theirs.get(field)]
        if changed:
            sides = (", ".join(f"{f} {side.get(f)}" for f in changed) for side in (ours, theirs))
            return f"images differ: {' and '.join(sides)}"
    return "images differ"


def _notes(manifests, shared: list[str]) -> Iterator[str]:
    a, b = manifests
    if a["sampling"] is None:
        yield "note: how these predictions were sampled is not known"
    for name in shared:
        ours, theirs = a["benchmarks"][name], b["benchmarks"][name]
        pictures = [facts.get("images", {}) for facts in (ours, theirs)]
        if pictures[0] != pictures[1]:
            yield f"note: {name}: {_images(*pictures)}"
        elif ours["template_hash"] != theirs["template_hash"]:
            yield f"note: {name}: chat templates or system prompts differ"
    alone = sorted({*a["benchmarks"]} ^ {*b["benchmarks"]})
    if alone:
        yield f"note: only one side has {', '.join(alone)}"
