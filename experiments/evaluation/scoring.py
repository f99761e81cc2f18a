"""Scoring without a model: stored generations again, or predictions that came from elsewhere."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.command import UsageError
from experiments.evaluation import plan, report, session, storage
from experiments.evaluation.plan import Options
from luspo_jax.benchmarks import Benchmark, Record
from luspo_jax.benchmarks.registry import benchmark
from luspo_jax.datasets import DataError, Example
from luspo_jax.datasets.rows import column, read_rows
from luspo_jax.rewards import Sample, Scorer

_NAMED = 10  # ids that a message names
_UNKNOWN = "predictions from a file (sampling unknown)"


def rescore(folder: pathlib.Path, options: Options) -> str:
    """Judges an evaluation's stored generations by today's scorers, part by part, in place.

    Returns:
      What changed, and the table.
    """
    if not folder.is_dir():
        raise UsageError(f"--rescore={folder}: no such folder")
    with storage.locked(folder):
        manifest = storage.read_manifest(folder)
        lines = []
        for name, facts in manifest["benchmarks"].items():
            entry = benchmark(name)
            before, after = facts["scorers"], {}
            with session.scorer(entry, options) as judge:
                changed, after = _rescore_parts(folder, name, judge), judge.labels
            facts["scorers"], facts["metric"] = after, entry.metric
            storage.write_manifest(folder, manifest)  # what is done stays told, whatever comes
            lines.append(
                f"{name}: {', '.join(before.values())} → {', '.join(after.values())}; "
                f"{changed} verdicts changed"
            )
        return "\n".join([*lines, report.write(folder, manifest)])


def _rescore_parts(folder: pathlib.Path, name: str, judge: Scorer) -> int:
    changed = 0
    for path in sorted((folder / "generations" / name).glob("part_*.jsonl")):
        old = storage.read_part(path)
        new = judged(old, judge)
        changed += sum(a.verdict != b.verdict for a, b in zip(old, new, strict=True))
        storage.write_part(path, new)
    return changed


def judged(records: Sequence[Record], judge: Scorer) -> list[Record]:
    """The same records with verdicts of this scorer."""
    samples = [Sample(r.response, r.answer, r.length, None, r.meta) for r in records]
    verdicts = judge.score_batch(samples)
    return [
        dataclasses.replace(record, verdict=verdict, scorers=judge.labels)
        for record, verdict in zip(records, verdicts, strict=True)
    ]


def predictions(
    file: pathlib.Path, entry: Benchmark, workdir: pathlib.Path, options: Options
) -> str:
    """Scores a file of predictions as `run` scores a model's responses.

    Args:
      file: jsonl, csv, json or parquet with columns `id` and `prediction`; several rows with one
        id are several responses to that problem, in their order.
      entry: the benchmark they answer.
      workdir: where the records and results go.
      options: protocol is not looked at: how the predictions were drawn is not known.

    Raises:
      UsageError, DataError: a file that is empty or lacks a column, ids that are unknown, missing
        or unequally often there; by name.
    """
    problems, source = plan.examples([entry], options)[entry.name]
    answers = _by_problem(file, entry, problems)
    size = len(next(iter(answers.values())))
    records = [
        _unjudged(entry.name, problem, sample_id, text)
        for problem in problems
        for sample_id, text in enumerate(answers[problem.id])
    ]
    facts = session.entry_facts(entry, problems, source, options)
    facts |= {"num_samples": size, "template": "", "template_hash": ""}
    manifest = {
        "model": f"{file.name} (sha256 {_digest(file)})",
        "protocol": _UNKNOWN,
        "sampling": None,
        "benchmarks": {entry.name: facts},
        "packages": session.packages(),
    }
    with storage.locked(workdir), session.scorer(entry, options) as judge:
        manifest = storage.begin(workdir, manifest)
        storage.write_part(storage.part_path(workdir, entry.name, 0), judged(records, judge))
        return report.write(workdir, manifest)


def _unjudged(name: str, problem: Example, sample_id: int, text: str) -> Record:
    return Record(
        benchmark=name,
        problem_id=problem.id,
        sample_id=sample_id,
        prompt=problem.problem,
        response=text,
        answer=problem.answer,
        tokens=None,
        length=None,
        truncated=None,
        meta=problem.meta,
        verdict=None,
    )


def _by_problem(
    file: pathlib.Path, entry: Benchmark, problems: Sequence[Example]
) -> dict[int, list[str]]:
    """Problem → its predictions."""
    if not file.is_file():
        raise UsageError(f"--predictions={file}: no such file")
    known = _names(entry, problems)
    found, unknown = collections.defaultdict(list), []
    for name, text in _rows(file):
        if name in known:
            found[known[name]].append(text)
        else:
            unknown.append(name)
    if not found and not unknown:
        raise UsageError(f"--predictions={file} is empty: it needs rows with id and prediction")
    how = f"ids are {entry.id_field!r} of the dataset, or " if entry.id_field else "ids are "
    how += f"0 … {len(problems) - 1}, the place of a problem in its file"
    if unknown:
        raise UsageError(f"--predictions={file}: unknown ids {_some(unknown)}; {how}")
    missing = [str(problem.id) for problem in problems if problem.id not in found]
    if missing:
        raise UsageError(
            f"--predictions={file}: {len(missing)} problems of {entry.name} have no prediction: "
            f"{_some(missing)}; give them an empty one to count them as wrong, or score the first "
            f"ones only with --limit ({how})"
        )
    sizes = collections.Counter(len(texts) for texts in found.values())
    if len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        odd = [str(key) for key, texts in found.items() if len(texts) != usual]
        raise UsageError(
            f"--predictions={file}: most ids have {usual} predictions, but not {_some(odd)}"
        )
    return found


def _names(entry: Benchmark, problems: Sequence[Example]) -> Mapping[str, int]:
    names = {str(problem.id): problem.id for problem in problems}
    if entry.id_field:
        names |= {str(p.meta[entry.id_field]): p.id for p in problems if entry.id_field in p.meta}
    return names


def _rows(file: pathlib.Path) -> Iterator[tuple[str, str]]:
    for number, row in read_rows(file):
        place = f"{file}, row {number}"
        name, text = (column(row, [wanted], place)[1] for wanted in ("id", "prediction"))
        if text is not None and not isinstance(text, str | int | float):
            raise DataError(f"{place}: column 'prediction' must be text, not {type(text).__name__}")
        yield _plain(name), "" if text is None else str(text)


def _plain(name: Any) -> str:
    """An id as text; parquet and csv writers make 3.0 of 3 where a column has gaps."""
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    return str(name).strip()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" * (len(names) > _NAMED))


def _digest(file: pathlib.Path) -> str:
    from luspo_jax.datasets.store import file_sha256

    return file_sha256(file)[:16]
