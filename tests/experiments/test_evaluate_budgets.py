"""Budget curves of a finished evaluation: nothing is sampled; a cut is judged as it reads."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from matplotlib import image

from experiments.command import UsageError
from experiments.evaluation import budgets, policy, report, scoring, session, storage
from experiments.evaluation.plan import Options
from luspo_jax.benchmarks import BENCHMARKS, Record, protocol
from luspo_jax.benchmarks.budgets import curve
from luspo_jax.experience import held_out
from luspo_jax.rewards import Reward, score
from luspo_jax.run.fields import default_config
from luspo_jax.run.model import load_model

MODEL = "embedded:label_sums"
CHOSEN = [BENCHMARKS["label_sums"]]
PLAIN = Options(
    protocol=protocol("dapo", max_response_length=40, num_samples=4),
    limit=5,
    num_slots=8,
    workers=1,
)
CUT = dataclasses.replace(PLAIN, budgets="4,24,34,40")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An evaluation whose curves were asked for afterwards: its folder, first and second table."""
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    before = session.run(MODEL, CHOSEN, folder, PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "ask", None)  # nothing may be sampled
        return folder, before, session.run(MODEL, CHOSEN, folder, CUT)


def _curve(folder):
    return json.loads((folder / "results.json").read_text())["benchmarks"]["label_sums"]["budgets"]


def test_every_cut_is_judged_as_it_reads(finished):
    folder, before, after = finished
    config, found = default_config(), _curve(folder)
    config.model.path = MODEL
    model = load_model(config)
    records = storage.read_benchmark(folder, "label_sums", {
        "problems": 5, "num_samples": 4, "scorers": {"gsm8k": _label(folder)},
    })  # fmt: skip
    for size, accuracy in zip((4, 24, 34, 40), found["accuracy"], strict=True):
        texts = [model.decode(r.tokens[:size]) for r in records]
        right = [
            score({"gsm8k": 1.0}, text, r.answer).value
            for r, text in zip(records, texts, strict=True)
        ]
        assert accuracy == pytest.approx(np.mean(right))
    assert found["accuracy"][-1] == pytest.approx(np.mean([r.right("gsm8k") for r in records]))
    assert found["accuracy"][0] < found["accuracy"][-1]
    assert 0 < found["judged_again"] <= sum(r.length > b for r in records for b in (4, 24, 34))
    assert "under a budget" not in before
    assert "at 4," in after
    assert "[figure](budgets.png)" in (folder / "results.md").read_text()


def _label(folder):
    return storage.read_manifest(folder)["benchmarks"]["label_sums"]["scorers"]["gsm8k"]


def test_the_figure_is_drawn(finished):
    shape = image.imread(finished[0] / budgets.FIGURE).shape
    assert min(shape[:2]) > 400


def test_later_commands_report_the_curves_until_verdicts_change(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    assert "under a budget" in session.run(MODEL, CHOSEN, folder, PLAIN)
    assert _curve(folder) == _curve(finished[0])
    assert "under budgets removed" in scoring.rescore(folder, PLAIN)
    assert not (folder / budgets.FIGURE).exists()
    results = json.loads((folder / "results.json").read_text())
    assert "budgets" not in results["benchmarks"]["label_sums"]
    assert "under budgets" not in scoring.rescore(folder, PLAIN)


def test_curves_of_several_benchmarks_are_kept_together(tmp_path):
    first, second = curve(np.ones((2, 1, 2)), (4, 8)), curve(np.zeros((2, 1, 3)), (4, 8, 16))
    budgets.keep(tmp_path, {"aime24": first})
    budgets.keep(tmp_path, {"math500": second})
    assert budgets.read(tmp_path) == {"aime24": first, "math500": second}


def test_responses_without_a_verdict_count_as_not_right_and_unusable_problems_not_at_all():
    def record(problem, status, right):
        verdict = Reward(float(right), status, {"gsm8k": float(right)})
        values = ("label_sums", problem, 0, "", "abc", "", [1, 2, 3], 3, False, {}, verdict)
        return Record(*values)

    records = [record(0, "ok", 1), record(1, "timeout", 0), record(2, "unusable", 0)]
    found = budgets.under(records, (3, 8), None, None, "gsm8k")
    assert found.accuracy == (0.5, 0.5)
    assert found.judged_again == 0


@pytest.mark.parametrize("text", ["64", "8,4", "many"])
def test_budgets_that_cannot_be_are_refused_before_the_model_is_read(text, tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "load", None)
    options = dataclasses.replace(PLAIN, budgets=text)
    with pytest.raises(UsageError, match=rf'^--budgets="{text}" must be'):
        session.run(MODEL, CHOSEN, tmp_path, options)


def test_ticks_near_a_larger_one_are_left_out():
    assert budgets._ticks([1024, 2048, 16_384, 20_480, 2048]) == [20_480, 2048, 1024]


def test_tables_have_a_column_for_each_head(finished):
    lines = (finished[0] / "results.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| benchmark"))
    row = next(line for line in lines if line.startswith("| label_sums"))
    assert head.count("|") == row.count("|") == len(report._HEAD) + 1
    assert {"completed %", "tokens a right"} <= {cell.strip() for cell in head.split("|")}
