"""The study of length bias: what it runs, and how it reads runs."""

import pathlib

import numpy as np
import pytest

from experiments.drawing import chart
from experiments.studies.length_bias import analysis, design, rewards
from experiments.sweeps import prediction, spec

BASES = pathlib.Path("bases")
LENGTH = "val-aux/label_sums/response_length/mean"


def _rates():
    return dict.fromkeys(design.factorial("sums"), 2e-4)


@pytest.mark.parametrize("task", design.TASKS)
def test_the_factorial_is_whole(task):
    names = set(design.factorial(task))
    weightings, clips = ("GSPO", "LUSPO", "LUSPO/L_ref"), ("tight", "wide", "none")
    assert names == {f"{w} {c}" for w in weightings for c in clips} | {"GRPO"}
    assert len(design.SEEDS) >= 5
    assert len(design.BASES) >= 2
    assert not set(design.SEEDS) & set(design.TUNING_SEEDS)


@pytest.mark.parametrize("task", design.TASKS)
def test_every_member_of_base_0_has_a_valid_configuration(task):
    """The other bases are made by the study itself; their folders do not exist here."""
    sweep = design.main(task, _rates(), BASES)
    for member in spec.members(sweep):
        if "base 0" in member.name and member.seed == 0:
            config = spec.config_of(sweep, member)
            assert config.train.learning_rate == 2e-4


def test_contrasts_name_what_is_run():
    ran = set(design.factorial("sums")) | set(design.CONTROLS)
    assert {name for pair in analysis.CONTRASTS.values() for name in pair} <= ran
    assert {parent for parent, _ in design.CONTROLS.values()} <= set(design.factorial("sums"))


def test_windows_sum_the_pressure_of_the_updates_between_two_lengths():
    """The update of step s is scored one step later, so those from 0 to 5 stand at 2 … 6."""
    lengths = {0: 10.0, 5: 12.0, 10: 11.0, 15: 11.5}
    rows = [
        {"step": step, "length/pressure/taken": float(step)}
        | ({LENGTH: lengths[step]} if step in lengths else {})
        for step in range(16)
    ]
    found = prediction.windows(rows)
    assert [w[:2] for w in found] == [(2 + 3 + 4 + 5 + 6, 2.0), (7 + 8 + 9 + 10 + 11, -1.0)]
    assert found[0][2] == -1.0  # the change of the next window
    assert np.isnan(found[0][3])  # nothing before the first
    assert found[1][2:] == (0.5, 2.0)


def test_windows_need_every_update():
    rows = [{"step": s, LENGTH: 1.0, "length/pressure/taken": 0.0} for s in range(7) if s != 4]
    assert prediction.windows(rows) == []


def test_fit_finds_a_line_and_its_interval():
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(40):
        x = rng.normal(size=4)
        runs.append(list(zip(x, 0.9 * x + 0.1 * rng.normal(size=4), strict=True)))
    found = prediction.fit(runs)
    slope, low, high = found.slope
    assert low < 0.9 < high
    assert slope == pytest.approx(0.9, abs=0.03)
    assert found.correlation[0] > 0.98
    assert found.rank_correlation[0] > 0.95
    assert found.count == 160


def test_ranks_resist_one_wild_window():
    x = np.linspace(-1, 1, 40)
    runs = [[(a, a)] for a in x[:-1]] + [[(30.0, 1.0)]]
    found = prediction.fit(runs, resamples=10)
    assert found.correlation[0] < 0.5
    assert found.rank_correlation[0] == pytest.approx(1)


def test_ties_share_a_rank():
    np.testing.assert_array_equal(prediction._ranks(np.array([3.0, 1, 3, 2])), [2.5, 0, 2.5, 1])


@pytest.mark.parametrize(
    ("response", "sparse", "strict"),
    [
        ("a1=1 b4=0 c0=0 d0=0 e0=0 f0=0 #### 0", 1, 1),
        ("a1=1 b4=0 c0=0 #### 0", 1, 0),  # the trace stops early
        ("b4=0 a1=1 f0=0 #### 0", 1, 0),  # labels out of order
        ("#### 0", 1, 1),  # a bare guess is in form
        ("#### 3", 0, 0),
        ("0", 0, 0),
    ],
)
def test_the_harsher_rewards(response, sparse, strict):
    assert rewards.sparse(response, "0") == sparse
    assert rewards.strict(response, "0") == strict


def test_sparse_pays_for_zero_alone():
    assert rewards.sparse("#### 3", "3") == 0
    assert rewards.strict("#### 3", "3") == 1


def test_predictions_of_some_of_the_runs_are_drawn(tmp_path):
    """Of an unfinished study: sets of runs of an odd number, without a window, or none at all."""
    analysis.prediction_figure({}, tmp_path)
    assert not list(tmp_path.iterdir())
    windows = [(1.0, 2.0, 0.0, 0.0), (3.0, 5.0, 0.0, 0.0)]
    points = {
        ("sums", "a"): {"GRPO": [windows, []], "GSPO tight": [[]]},
        ("sums", "b"): {"GRPO": [windows]},
        ("lookup", "a"): {"LUSPO wide": [windows]},
    }
    analysis.prediction_figure(points, tmp_path)
    kept = chart.loads((tmp_path / "prediction.json").read_text(encoding="utf-8"))
    panels = [panel for row in kept.rows for panel in row]
    assert [[line.label for line in panel.lines] for panel in panels] == [
        ["GRPO"], ["GRPO"], ["LUSPO wide"],
    ]  # fmt: skip
    assert panels[0].lines[0].x.tolist() == [1, 3]
    assert panels[0].lines[0].y.tolist() == [2, 5]
