"""The study of length on images: what it runs, and how it reads runs."""

import numpy as np
import pytest

from experiments.studies.vl_length import analysis, design
from experiments.sweeps import spec
from luspo_jax.metrics import json_line

RATES = dict.fromkeys(design.TUNED, 2e-4)


def test_the_three_objectives_as_published_and_every_control():
    cells = design.cells(RATES | {"LUSPO": 4e-4})
    assert {"GRPO", "GSPO", "LUSPO"} <= set(cells)
    assert len(design.SEEDS) >= 3
    assert not set(design.SEEDS) & set(design.TUNING_SEEDS)
    assert cells["LUSPO"]["train.learning_rate"] == 4e-4
    for name, (cell, fields) in design.CONTROLS.items():
        assert cells[name] == cells[cell] | fields


@pytest.mark.parametrize("sweep", [design.tuning(), design.main(RATES)])
def test_every_member_has_a_valid_configuration(sweep):
    spec.check(sweep)
    for variant in spec.variants(sweep):
        config = spec.config_of(sweep, spec.Member(variant, 0))
        spec.checks.check(config)
        assert config.data.name == "shapes"


def test_comparisons_name_what_is_run():
    cells = design.cells(RATES)
    for label, (this, that) in analysis.CONTRASTS.items():
        assert this in cells, label
        assert that in cells, label


def _rows(seed, objective):
    """Metrics of a run: LUSPO is 0.1 and two tokens ahead; length moves as its pressure says."""
    rng, gain = np.random.default_rng(seed), objective.startswith("LUSPO")
    noise, changes = 0.01 * rng.normal(), rng.normal(size=design.STEPS + 2)
    lengths = 20 + 2 * gain + np.cumsum(changes)
    found = []
    for step in range(design.STEPS + 1):
        row = {
            "step": step,
            "length/pressure/taken": changes[step - 1],  # of the update before
            "length/pressure/own/pos": 0.2,
            "length/pressure/own/neg": -0.1,
            "actor/clipfrac/pos": 0.1,
            "actor/clipfrac/neg": 0.3,
            "actor/ratio_deviation": 0.01,
            "actor/entropy": 0.2,
        }
        if step % 5 == 0:
            row["val-core/shapes/acc/mean@4"] = 0.5 + 0.1 * gain + noise
            row["val-aux/shapes/response_length/mean"] = lengths[step]
        found.append(row)
    return found


@pytest.fixture
def ran(tmp_path, monkeypatch):
    sweep = design.main(RATES)
    for member in spec.members(sweep):
        if member.seed == 4 and member.variant.name == "GRPO":
            continue  # not finished
        folder = member.folder(tmp_path)
        folder.mkdir(parents=True)
        lines = [json_line(row.pop("step"), row) for row in _rows(member.seed, member.variant.name)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    monkeypatch.setattr(
        "experiments.sweeps.runner.standing",
        lambda folder, config: ("finished" if folder.is_dir() else "absent", ""),
    )
    return sweep, tmp_path


def test_tables_and_figures_say_what_the_runs_say(ran, tmp_path):
    text = analysis.write(RATES, *ran, tmp_path)
    claim = next(line for line in text.splitlines() if line.startswith("| the paper's claim"))
    cells = [cell.strip() for cell in claim.split("|")[2:-1]]
    assert cells[0] == cells[1] == "0.1000 ± 0.0000"
    assert cells[2].startswith("2.000")
    (fitted,) = (line for line in text.splitlines() if line.startswith("| all "))
    assert fitted.startswith("| all | 1.000 [1.000, 1.000] | 1.00 [1.00, 1.00]")
    assert "- GRPO/seed_4: not finished" in text
    clipped = text.split("Are negatives clipped")[1].split("##")[0]
    assert clipped.count("0.2000 ± 0.0000") == len(design.cells(RATES))
    assert (tmp_path / "results.md").read_text() == text
    for name in ("curves.png", "clipping.png"):
        assert (tmp_path / name).stat().st_size > 1000
