"""Charts are kept as numbers, and every figure of the documentation is drawn of what is kept."""

import json
import re

import numpy as np
import pytest

from experiments import redraw
from experiments.drawing import chart
from luspo_jax.hosts import figure_style

LINE = chart.Line("one", [1, 2, 3], [0.123456789, float("nan"), 3], [0.1, 0.1, 0.1], style=2)
THIN = chart.Line("run", np.array([1.0, 2.0]), np.array([1.0, 2.0]), thin=True)
CHART = chart.Chart(
    [[chart.Panel("a", "step", "tokens", [LINE, THIN]), chart.Panel("b", "step", "share", [LINE])]],
    note="what is left out",
)


@pytest.fixture(autouse=True)
def closed():
    yield
    figure_style.pyplot().close("all")


def test_a_chart_is_kept_to_five_digits():
    kept = chart.loads(chart.dumps(CHART))
    assert (kept.note, len(kept.rows), len(kept.rows[0])) == (CHART.note, 1, 2)
    line, thin = kept.rows[0][0].lines
    np.testing.assert_array_equal(line.y, [0.12346, np.nan, 3])
    assert (line.label, line.style, line.thin, thin.thin) == ("one", 2, False, True)
    assert chart.dumps(kept) == chart.dumps(CHART)
    with pytest.raises(ValueError, match="no chart"):
        chart.loads("[1]")


def test_a_chart_shows_its_numbers():
    figure = chart.draw(CHART)
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), LINE.y)
    assert left.lines[0].get_color() == figure_style.LINES[2]
    assert (left.get_ylabel(), right.get_ylabel()) == ("tokens", "share")
    band = left.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.123456789 - 0.1)
    assert not chart.Chart([[chart.Panel("", "", "", [])]]).rows[0][0].lines
    assert chart.Chart([[chart.Panel("", "", "", [])]]).is_empty
    assert not CHART.is_empty


def test_points_of_named_rows_are_kept_and_drawn():
    """A dot per run, a bar for their mean, names downwards, and numbers that people write."""
    dots = chart.Line("a", [0.03, 0.05, 0.9], [0, 0, 1], style=1, thin=True, marks="o")
    means = chart.Line("a", [0.04, 0.9], [0, 1], style=1, marks="|")
    panel = chart.Panel("a title of some length", "", "", [dots, means], log_x=True, names="xy")
    plain = chart.Panel("b", "predicted", "measured", [dots], diagonal="as predicted")
    drawn = chart.Chart([[panel, plain]], width=1.5)
    kept = chart.loads(chart.dumps(drawn))
    assert chart.dumps(kept) == chart.dumps(drawn)
    figure = chart.draw(kept)
    left, right = figure.axes
    assert left.get_title(loc="left") == "a title of\nsome length"
    seen, bars = left.lines
    np.testing.assert_array_equal(seen.get_xydata(), np.transpose([dots.x, dots.y]))
    assert [line.get_linestyle() for line in left.lines] == ["None", "None"]
    assert (seen.get_marker(), bars.get_marker()) == ("o", "|")
    assert [label.get_text() for label in left.get_yticklabels()] == ["x", "y"]
    assert left.get_ylim() == (1.5, -0.5)
    figure.draw_without_rendering()
    shown = [float(label.get_text()) for label in left.get_xticklabels()]
    assert shown == [0.05, 0.1, 0.2, 0.5, 1.0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["a", "as predicted"]
    (line,) = right.lines[1:]
    assert (line.get_xy1(), line.get_slope()) == ((0, 0), 1)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.4, 0.9, None), (3.0, 60.0, [5, 10, 20, 50]), (0.5, 3000.0, [1, 10, 100, 1000])],
)
def test_a_logarithmic_axis_has_few_numbers(low, high, expected):
    line = chart.Line("a", [low, high], [0, 1], marks="o")
    figure = chart.draw(chart.Chart([[chart.Panel("", "x", "y", [line], log_x=True)]]))
    (axis,) = figure.axes
    first, last = axis.get_xlim()
    ticks = [tick for tick in axis.get_xticks() if first <= tick <= last]
    assert 2 <= len(ticks) <= 6
    assert expected is None or ticks == pytest.approx(expected)


def test_writing_keeps_numbers_beside_the_picture(tmp_path):
    target = chart.write(CHART, tmp_path / "curves.png")
    assert target.is_file()
    assert chart.loads((tmp_path / "curves.json").read_text()).note == CHART.note


# Their runs are gone, and were drawn before numbers were kept.
OLD = {
    "length_bias/factorial.png", "length_bias/prediction.png", "vl_length/clipping.png",
    "vl_length/curves.png", "moe_stability/curves.png", "moe_stability/ratios.png",
}  # fmt: skip


def test_every_picture_is_drawn_again_or_named_as_old():
    pictures = [*(redraw.ROOT / "docs").rglob("*.png"), *redraw.STUDIES.glob("*/*.png")]
    left = {path for path in pictures if path not in redraw.figures()}
    left -= {redraw.ROOT / "docs/shapes.png"}  # the task's own drawings
    assert {f"{path.parent.name}/{path.name}" for path in left} == OLD
    told = (redraw.ROOT / "docs/figures.md").read_text(encoding="utf-8")
    for path in pictures:
        name = path.relative_to(redraw.ROOT).as_posix()
        assert re.sub("^docs/", "", name) in told, (
            f"docs/figures.md does not say how {name} is made"
        )


@pytest.mark.parametrize(
    "target", redraw.figures(), ids=lambda path: f"{path.parent.name}_{path.stem}"
)
def test_recorded_numbers_can_be_drawn(target):
    figure = redraw.figures()[target]()
    assert all(axis.has_data() for axis in figure.axes if axis.get_title(loc="left"))
    charts = [axis for axis in figure.axes if target.name.startswith("curves")]
    for axis in charts:
        low, high = axis.get_ylim()
        for line in axis.lines:
            assert low <= np.nanmin(line.get_ydata()) <= np.nanmax(line.get_ydata()) <= high


def test_a_run_and_a_sweep_are_recorded_as_they_were(tmp_path, monkeypatch):
    """Of what is recorded of the recorded run, nothing is lost."""
    from experiments.drawing import reading, summary

    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    (run / "metrics.jsonl").write_text((redraw.RECORDS / "quickstart.jsonl").read_text())
    (run / "run.json").write_text('{"config": {"length.every": 5}}')
    rows = [
        {"length": 7, "reward": 0.5, "truncated": True},
        {"length": 9, "reward": 1, "truncated": False},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "rollouts/step_000004.jsonl").write_text(text)
    (tmp_path / "kept").mkdir()
    redraw.record_run(run, tmp_path / "kept")
    monkeypatch.setattr(redraw, "RECORDS", tmp_path / "kept")
    (step,) = redraw._responses()
    assert (step.step, step.lengths_B.tolist(), step.rewards_B.tolist(), step.truncated) == (
        4, [7, 9], [0.5, 1.0], 0.5,
    )  # fmt: skip
    before = list(reading.run_rows(run))
    assert len(redraw._rows()) == len(before) > 50
    for name in ("reward", "val-core/*", "length/pressure/luspo"):
        ours, theirs = (reading.series(rows, name)[1] for rows in (redraw._rows(), before))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert summary.draw(redraw._rows(), "x").axes[0].lines
