"""The launcher of the visual benchmarks: a table, a file of verdicts, one line for a mistake."""

import json
import sys

import pytest
from absl import flags

from experiments import command, score_vl
from luspo_jax.benchmarks.visual import VISUAL
from luspo_jax.datasets import DATASETS

ROWS = {
    name: {
        "question": "q",
        "answer": answer,
        "image": "a.png",
        "choices": None,
        "precision": None,
        "question_type": "free_form",
        "answer_type": "integer",
        "pid": name,
        "metadata": {"task": "counting", "skills": ["arithmetic reasoning"]},
    }
    for name, answer in (("1", "14"), ("2", "15"), ("3", "16"))
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Calls the launcher on the rows above; gives status, standard output and standard error."""
    (tmp_path / "a.json").write_text(json.dumps(ROWS))

    def call(predictions, *arguments, benchmark="mathvista", annotations="a.json"):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions))
        argv = ["experiments.score_vl", f"--predictions={tmp_path / 'p.jsonl'}"]
        argv += [f"--benchmark={benchmark}"] if benchmark else []
        argv += [f"--annotations={tmp_path / annotations}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            status = command.call(
                score_vl.main, required=("benchmark", "annotations", "predictions")
            )
        finally:
            flags.FLAGS.unparse_flags()
            for name in ("benchmark", "annotations", "predictions", "json"):
                setattr(flags.FLAGS, name, None)
            flags.FLAGS.id, flags.FLAGS.prediction = ["id"], "prediction"
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_a_table_in_both_columns_and_a_file(run, tmp_path):
    predictions = [{"id": 1, "prediction": "14.0"}, {"id": 2, "prediction": "15"}]
    status, out, err = run(
        [*predictions, {"id": 9, "prediction": "x"}], f"--json={tmp_path / 'out.json'}"
    )
    assert (status, err) == (0, "")
    assert f"mathvista@{VISUAL['mathvista'].version}: 3 items" in out
    assert "1 items without a prediction, counted as wrong: 3" in out
    assert "1 predictions whose id no annotation has, left out: 9" in out
    (overall,) = [line.split() for line in out.splitlines() if line.split()[:1] == ["all"]]
    assert overall == ["all", "3", "66.67", "%", "33.33", "%"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["scorer"] == VISUAL["mathvista"].label
    assert written["verdicts"]["1"] == {
        "strict": True, "vlmevalkit": False, "status": "ok", "extracted": "14.0"
    }  # fmt: skip


def test_columns_by_name(run):
    status, out, _ = run([{"pid": "1", "out": "14"}], "--id=pid", "--prediction=out")
    assert status == 0
    assert "arithmetic reasoning" in out


@pytest.mark.parametrize(
    ("predictions", "arguments", "message"),
    [
        ([], {}, "p.jsonl: there are no predictions"),
        ([{"id": "x", "prediction": "1"}], {}, "no prediction has the id of an annotation"),
        ([{"name": "1"}], {}, "p.jsonl, row 1: no column 'id'; the columns are: name"),
        ([{"id": "1"}], {"annotations": "gone.json"}, "--annotations: no file"),
        ([{"id": "1"}], {"annotations": "."}, "mathvista is read from one file"),
        ([{"id": "1"}], {"benchmark": "mathvisto"}, "mathvista"),
        ([{"id": "1"}], {"benchmark": "wemath"}, "row 1: no column 'option'"),
        ([{"id": "1"}], {"benchmark": None}, "--benchmark is required"),
    ],
)
def test_mistakes_answer_in_one_line(run, predictions, arguments, message):
    status, out, err = run(predictions, **arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_every_benchmark_has_a_reader():
    assert set(VISUAL) <= set(DATASETS)
