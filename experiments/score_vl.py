"""Scores a model's responses to a visual benchmark, by rule, in two columns.

    python -m experiments.score_vl --benchmark=mathvista --annotations=testmini.json \
        --predictions=responses.jsonl [--json=scores.json]

`strict` is this project's verdict, `vlmevalkit` that program's, its mistakes kept. Predictions have
a column `id` and a column `prediction`; --id and --prediction name others. Ids are those of the
annotations: `pid` (MathVista), `id` (MathVision), `sample_index` (MathVerse), the name of the row
(LogicVista), question and variant as 17/3 (DynaMath, --id=qid,varid), problem and step
(We-Math, --id=ID,key).
"""

import dataclasses
import json
import pathlib
import sys

from absl import flags

from experiments import command
from luspo_jax.benchmarks.verdicts import Line, Scores, score
from luspo_jax.benchmarks.visual import VISUAL
from luspo_jax.datasets.example import DataError, Example
from luspo_jax.datasets.predictions import read_predictions
from luspo_jax.datasets.registry import DATASETS
from luspo_jax.datasets.table import read_examples
from luspo_jax.datasets.visual_benchmarks import read_variants

_BENCHMARK = flags.DEFINE_enum("benchmark", None, sorted(VISUAL), "Which benchmark.")
_ANNOTATIONS = flags.DEFINE_list(
    "annotations", None, "File of the annotations; for dynamath one a variant, or their folder."
)
_PREDICTIONS = flags.DEFINE_string("predictions", None, ".jsonl, .json, .csv or .parquet file.")
_ID = flags.DEFINE_list("id", ["id"], "Column of the id; several are joined by '/'.")
_PREDICTION = flags.DEFINE_string("prediction", "prediction", "Column of the response.")
_JSON = flags.DEFINE_string("json", None, "File to write figures and every verdict to.")
_WORKERS = flags.DEFINE_integer(
    "verifier_workers", None, "Processes of the math verifier.", lower_bound=1
)
_SHOWN = 5  # ids that a message lists


def annotations(benchmark: str, paths: list[str]) -> list[Example]:
    """The annotated questions of a benchmark.

    Raises:
      DataError: a file is absent or not as it must be, or there are several where one is read.
    """
    absent = [path for path in paths if not pathlib.Path(path).exists()]
    if absent:
        raise DataError(f"--annotations: no file {absent[0]}")
    if benchmark == "dynamath":
        return read_variants(paths)
    if len(paths) > 1 or pathlib.Path(paths[0]).is_dir():
        raise DataError(f"--annotations: {benchmark} is read from one file")
    return read_examples(DATASETS[benchmark], pathlib.Path(paths[0]))[0]


def table(scores: Scores) -> str:
    """The figures, and before them whatever the reader must know to trust them."""
    lines = [f"{scores.scorer}: {len(scores.verdicts):,} items", *_warnings(scores), ""]
    width = max(len(line.group) for line in scores.lines)
    title = None
    for line in scores.lines:
        if line.table != title:
            title = line.table
            lines.append(f"{title:<{width + 9}}{'strict':>10}{'vlmevalkit':>13}")
        strict, kit = _figure(line.strict, line), _figure(line.vlmevalkit, line)
        lines.append(f"  {line.group:<{width}}{line.n:>7,}{strict:>10}{kit:>13}")
    return "\n".join([*lines, "", f"vlmevalkit: {scores.note}"])


def _figure(value: float | None, line: Line) -> str:
    if value is None:
        return "undefined"
    return f"{value:,.0f}" if line.unit == "count" else f"{100 * value:.2f} %"


def _warnings(scores: Scores) -> list[str]:
    meanings = {
        "missing": "items without a prediction, counted as wrong",
        "empty": "empty predictions, wrong in the strict column",
        "unparsed": "responses in which no answer was found, wrong in the strict column",
        "unusable": "annotations without a usable answer, left out of the strict column",
        "timeout": "answers whose comparison ran out of time, counted as wrong",
        "error": "answers whose comparison failed, counted as wrong",
    }
    named = [(meaning, scores.with_status(status)) for status, meaning in meanings.items()]
    named.append(("predictions whose id no annotation has, left out", scores.unknown))
    return [
        f"  {len(names):,} {meaning}: {', '.join(names[:_SHOWN])}"
        + (", …" if len(names) > _SHOWN else "")
        for meaning, names in named
        if names
    ]


def main() -> None:
    """Scores what the flags name."""
    items = annotations(_BENCHMARK.value, _ANNOTATIONS.value)
    predictions = read_predictions(
        _PREDICTIONS.value, id_columns=_ID.value, response=_PREDICTION.value
    )
    scores = score(VISUAL[_BENCHMARK.value], items, predictions, workers=_WORKERS.value)
    if _JSON.value:
        text = json.dumps(dataclasses.asdict(scores), indent=1)
        pathlib.Path(_JSON.value).write_text(text + "\n", encoding="utf-8")
    print(table(scores))


if __name__ == "__main__":
    sys.exit(command.call(main, required=("benchmark", "annotations", "predictions")))
