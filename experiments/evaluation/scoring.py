"""Scores without a model: stored generations again, or predictions from elsewhere."""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from experiments.command import UsageError
from experiments.evaluation import budgets, plan, report, session, storage
from experiments.evaluation.plan import Options
from luspo_jax.benchmarks import Benchmark, Record
from luspo_jax.benchmarks.registry import Judge, benchmark
from luspo_jax.datasets import Example
from luspo_jax.datasets.predictions import read_predictions

_NAMED = 10  # ids named in a message
_UNKNOWN = "predictions from a file (sampling unknown)"


def rescore(folder: pathlib.Path, options: Options) -> str:
    """Scores an evaluation's stored generations again with the current scorers, in place.

    Returns:
      What changed, and the table.
    """
    if not folder.is_dir():
        raise UsageError(f"--rescore={folder}: no such folder")
    with storage.locked(folder):
        manifest = storage.read_manifest(folder)
        lines = []
        if budgets.forget(folder):
            lines.append(
                "accuracies under budgets removed: --model and --budgets measure them anew"
            )
        for name, facts in manifest["benchmarks"].items():
            entry = benchmark(name)
            before, after = facts["scorers"], {}
            with session.scorer(entry, options) as judge:
                changed, after = _rescore_parts(folder, name, judge), judge.labels
            facts["scorers"], facts["metric"] = after, entry.metric
            storage.write_manifest(folder, manifest)  # finished parts stay recorded
            lines.append(
                f"{name}: {', '.join(before.values())} → {', '.join(after.values())}; "
                f"{changed} verdicts changed"
            )
        return "\n".join([*lines, report.write(folder, manifest)])


def _rescore_parts(folder: pathlib.Path, name: str, judge: Judge) -> int:
    changed = 0
    for path in sorted((folder / "generations" / name).glob("part_*.jsonl")):
        old = storage.read_part(path)
        new = judged(old, judge)
        changed += sum(a.verdict != b.verdict for a, b in zip(old, new, strict=True))
        storage.write_part(path, new)
    return changed


def judged(records: Sequence[Record], judge: Judge) -> list[Record]:
    """Returns the same records with verdicts of this scorer."""
    verdicts = judge.score_batch([budgets.sample(record) for record in records])
    return [
        dataclasses.replace(record, verdict=verdict, scorers=judge.labels)
        for record, verdict in zip(records, verdicts, strict=True)
    ]


def predictions(
    file: pathlib.Path, entry: Benchmark, workdir: pathlib.Path, options: Options
) -> str:
    """Scores a file of predictions as `run` scores a model's responses.

    Args:
      file: jsonl, csv, json or parquet with columns `id` and `prediction`, or those named in the
        options; several rows with one id are several responses to that problem, in order.
      entry: the benchmark they answer.
      workdir: folder of the records and results.
      options: the protocol is ignored, because the predictions' sampling is unknown.

    Raises:
      UsageError, DataError: a file that is empty or lacks a column; ids that are unknown, missing
        or unequally frequent, named in the message.
    """
    problems, source = plan.examples([entry], options)[entry.name]
    answers = _by_problem(file, entry, problems, options)
    size = len(next(iter(answers.values())))
    records = [
        _unjudged(entry.name, problem, sample_id, text)
        for problem in problems
        for sample_id, text in enumerate(answers[problem.id])
    ]
    facts = session.entry_facts(entry, problems, source, options, refused={})
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
        problem=problem.problem,
    )


def _by_problem(
    file: pathlib.Path, entry: Benchmark, problems: Sequence[Example], options: Options
) -> dict[int, list[str]]:
    """Maps each problem to its predictions."""
    known, found, unknown = _names(entry, problems), {}, []
    given = read_predictions(
        file, id_columns=options.id_columns, response=options.prediction_column
    )
    for name, texts in given.items():
        if name in known:
            found.setdefault(known[name], []).extend(texts)
        else:
            unknown.append(name)
    how = f"0 … {len(problems) - 1}, the place of a problem in its file"
    if entry.id_field:
        example = problems[0].meta.get(entry.id_field)
        own = f"{entry.id_field!r} of the dataset, as {example}"
        how = own if entry.rule else f"{own}, or {how}"
    how = f"ids are {how}"
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
    """Maps file ids to problems. A visual benchmark's ids may be numbers; no index counts."""
    own = {str(p.meta[entry.id_field]): p.id for p in problems if entry.id_field in p.meta}
    places = {} if entry.rule else {str(problem.id): problem.id for problem in problems}
    return places | own


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" * (len(names) > _NAMED))


def _digest(file: pathlib.Path) -> str:
    from luspo_jax.datasets.store import file_sha256

    return file_sha256(file)[:16]
