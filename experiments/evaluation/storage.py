"""An evaluation's folder: a manifest of what it evaluates, and its generations in parts.

A part holds all responses to a few problems and is written whole or not at all. The assignment of
problems to parts is fixed, so a resumed evaluation samples the missing parts exactly as an
uninterrupted one would have: the same problems in the same call, with noise that depends on seed,
problem and sample only.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.command import UsageError
from luspo_jax.benchmarks import Record
from luspo_jax.hosts import files

MANIFEST = "evaluation.json"


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Locks the folder of an evaluation for this process, creating it if necessary.

    Raises:
      PlaceError: it holds something else, cannot be written, or is in use by another process.
    """
    files.check_own(folder, ours=[MANIFEST], what="evaluation")
    with files.locked(folder):
        yield


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the manifest of an evaluation's folder.

    Raises:
      UsageError: it holds no evaluation, or a damaged one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} holds no evaluation: there is no {MANIFEST} in it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): evaluate into another folder") from error


def write_manifest(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, sort_keys=True)
    files.write_text(folder / MANIFEST, text + "\n")


def begin(folder: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Begins an evaluation, or resumes the one in the folder.

    Returns:
      The manifest with the benchmarks of earlier commands.

    Raises:
      UsageError: the folder holds another evaluation, or something else; says what differs.
    """
    manifest = json.loads(json.dumps(manifest))
    if (folder / MANIFEST).exists():
        stored = read_manifest(folder)
        differences = list(_differences(stored, manifest))
        if differences:
            raise UsageError(
                f"--workdir={folder} holds another evaluation:\n"
                + "\n".join(f"  - {line}" for line in differences)
                + "\nchoose another --workdir"
            )
        manifest["benchmarks"] = stored["benchmarks"] | manifest["benchmarks"]
    write_manifest(folder, manifest)
    return manifest


def _differences(stored: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yields the fields that make it another evaluation; package versions do not count."""
    for name in sorted({*stored, *new} - {"packages", "benchmarks"}):
        if stored.get(name) != new.get(name):
            yield f"{name}: {stored.get(name)!r} in the workdir, {new.get(name)!r} now"
    for name, entry in new["benchmarks"].items():
        old = stored["benchmarks"].get(name, entry)
        for field in sorted({*old, *entry}):
            if old.get(field) != entry.get(field):
                yield f"{name}.{field}: {old.get(field)!r} in the workdir, {entry.get(field)!r} now"
                if field == "scorers":
                    yield "  (--rescore=WORKDIR judges stored generations by today's scorers)"


def part_path(folder: pathlib.Path, benchmark: str, number: int) -> pathlib.Path:
    """Returns the path of a part's generations."""
    return folder / "generations" / benchmark / f"part_{number:05d}.jsonl"


def write_part(path: pathlib.Path, records: Sequence[Record]) -> None:
    """Writes a part whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(record.to_json() for record in records))


def read_part(path: pathlib.Path) -> list[Record]:
    """Reads the records of a part."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [
        Record.from_json(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line
    ]


def read_benchmark(folder: pathlib.Path, name: str, entry: Mapping[str, Any]) -> list[Record]:
    """Reads all records of a benchmark.

    Args:
      folder: of the evaluation.
      name: of the benchmark.
      entry: its entry in the manifest.

    Raises:
      UsageError: some are missing, or parts were judged by different scorers.
    """
    parts = sorted((folder / "generations" / name).glob("part_*.jsonl"))
    records = [record for path in parts for record in read_part(path)]
    wanted = entry["problems"] * entry["num_samples"]
    if len(records) != wanted:
        raise UsageError(
            f"{folder}: {name} has {len(records)} of {wanted} responses: run the same evaluation "
            "again to finish it"
        )
    stated = json.dumps(entry["scorers"], sort_keys=True)
    labels = {stated} | {json.dumps(dict(r.scorers), sort_keys=True) for r in records}
    if len(labels) > 1:
        raise UsageError(
            f"{folder}: {name} was judged by different scorers ({'; '.join(sorted(labels))}): "
            f"run --rescore={folder} to the end"
        )
    return records
