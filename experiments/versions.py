"""Pairs of jax and flax that the tests passed with; setup.py asks for one of them."""

import re
from collections.abc import Mapping
from importlib import metadata

# A pair: package → (first version, first version beyond). jax and flax break programs at the second
# number of a version (flax at times at the third), so pairs end there.
TESTED = (
    {"jax": ("0.10.2", "0.11"), "flax": ("0.12.8", "0.12.12")},  # Python 3.11
    {"jax": ("0.11.1", "0.13"), "flax": ("0.12.12", "0.13")},  # Python 3.12 and later
)


def installed() -> dict[str, str]:
    """Returns the versions that are installed; neither package is imported."""
    found = {}
    for package in TESTED[0]:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            return {}  # the command says so itself if it needs it
    return found


def untested(found: Mapping[str, str]) -> str:
    """Returns one line about a pair that no test was run with; empty for a tested pair."""
    if not found or any(_within(found, pair) for pair in TESTED):
        return ""
    tested = "; or ".join(
        ", ".join(f"{package} ≥ {low} and < {high}" for package, (low, high) in pair.items())
        for pair in TESTED
    )
    pair = " with ".join(f"{package} {version}" for package, version in found.items())
    return f"{pair} was never tested here: results may differ (tested: {tested})"


def _within(found: Mapping[str, str], pair: Mapping[str, tuple[str, str]]) -> bool:
    return all(
        _release(low) <= _release(found[package]) < _release(high)
        for package, (low, high) in pair.items()
    )


def _release(version: str) -> tuple[int, ...]:
    """Returns the numbers of a version, without marks of candidates and builds."""
    return tuple(int(part) for part in re.match(r"\d*(?:\.\d+)*", version)[0].split(".") if part)
