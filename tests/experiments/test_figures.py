"""A run's figure, with and without held-out accuracy under token budgets."""

import json

import matplotlib.figure
import pytest

from experiments import figures


def _workdir(tmp_path, budgets):
    rows = [
        {
            "step": step,
            "reward": 0.1 * step,
            "response_length/mean": 10 + step,
            "val-core/sums/acc/mean@4": 0.2 * step,
            **{f"val-aux/sums/budget/{b}/acc": 0.01 * b * step for b in budgets},
        }
        for step in range(4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("budgets", [(), (8,), (16, 8, 32)])
def test_accuracy_is_drawn_for_every_budget_that_there_is(tmp_path, monkeypatch, budgets):
    drawn = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        drawn.append([line.get_label() for line in figure.axes[-1].lines])
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    target = figures.run_figure(_workdir(tmp_path, budgets))
    assert target.stat().st_size > 10_000
    assert drawn == [["held out", *(f"cut at {b} tokens" for b in sorted(budgets))]]
