"""Several slices: the bytes that cross the network between them, and the time that this takes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.rehearsal import costs
from experiments.rehearsal.case import Case
from experiments.rehearsal.crossing import Transfer

_LISTED = 8  # transfers of a program in the report


def gradient_bytes(case: Case) -> float:
    """Counts by hand what a device receives from other slices in an update: the sum of gradients.

    Its own part of them, in float32, summed over S slices: 2 · (S − 1)/S of it. The k copies within
    a slice are summed before, so each has a k-th to sum across.
    """
    own, slices = case.trained_bytes, case.topology.slices
    within = case.train_parts.copies // slices
    return 2 * own * costs.others(slices) / max(1, within)


def gradient_seconds(case: Case, share: float = 1.0) -> float:
    """Returns the seconds of a step in which gradients cross, at a share of the network's peak."""
    crossed = gradient_bytes(case) * case.sizes.updates_per_step
    return crossed / (share * case.topology.chip.network)


def crossed(case: Case, records: dict[str, Any]) -> dict[str, Any]:
    """Returns what crosses slices, as JSON values: as compiled, and gradients by hand."""
    return {
        "slices": case.topology.slices,
        "network_bandwidth": case.topology.chip.network,
        "gradient_bytes_an_update": gradient_bytes(case),
        "programs": {
            name: {"bytes_a_call": one["across_slices_bytes"], "calls_a_step": one["calls_a_step"]}
            for name, one in records.items()
        },
    }


def record(crossing: Sequence[Transfer]) -> dict[str, Any]:
    """Returns the bytes that a device receives in a call, and the largest transfers."""
    return {
        "across_slices_bytes": sum(one.total for one in crossing),
        "across_slices": [
            {**dataclasses.asdict(one), "shapes": list(one.shapes[:_LISTED])}
            for one in crossing[:_LISTED]
        ],
    }


def lines(report: dict[str, Any]) -> list[str]:
    """Describes what crosses slices; nothing for one slice."""
    if "across_slices" not in report:
        return []
    found = report["across_slices"]
    gradients, speed = found["gradient_bytes_an_update"], found["network_bandwidth"]
    text = (
        f"Across the {found['slices']} slices, by hand: gradients, {gradients / 1e9:.3g} GB to a "
        f"device per update, {gradients / speed:.3g} s at {speed / 1e9:.3g} GB/s."
    )
    if found["programs"]:
        told = [
            f"{name} {_size(one['bytes_a_call'])}"
            for name, one in found["programs"].items()
            if one["bytes_a_call"]
        ]
        silent = [name for name, one in found["programs"].items() if not one["bytes_a_call"]]
        text += f" As compiled, a call: {', '.join(told) or 'nothing'}"
        text += f"; nothing: {', '.join(silent)}." if silent else "."
    return [text, ""]


def _size(count):
    if count >= 1e8:
        return f"{count / 1e9:.3g} GB"
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"
