"""The study of mixtures of experts: what it runs, and how it reads runs."""

import json
import pathlib

import numpy as np
import pytest

from experiments.studies.moe_stability import analysis, design
from experiments.sweeps import spec
from luspo_jax.metrics import json_line

BASES = pathlib.Path("bases")


def test_token_and_sequence_ratios_meet_every_replay_and_every_base():
    cells = set(design.cells().values())
    for objective in ("grpo", "luspo"):
        for replay in design.REPLAYS:
            assert (design.MAIN, objective, replay, design.RATE) in cells
        for base in design.BASES:
            assert (base, objective, "none", design.RATE) in cells
        for base in ("dense", design.MAIN):
            assert (base, objective, "none", design.HARSH_RATE) in cells
    assert len(design.SEEDS) >= 3
    assert {cell[1] for cell in cells} == set(design.OBJECTIVES)


def test_a_dense_policy_replays_nothing():
    assert all(cell[2] == "none" for cell in design.cells().values() if cell[0] == "dense")


def test_every_cell_of_an_embedded_base_has_a_valid_configuration():
    """The other bases are made by the study itself; their folders do not exist here."""
    sweep = design.sweep(BASES)
    seen = set()
    for member in spec.members(sweep):
        base, objective, replay, rate = design.cells()[member.variant.name]
        if design.BASES[base].embedded and member.seed == 0:
            config = spec.config_of(sweep, member)
            spec.checks.check(config)
            assert config.objective.preset == objective
            assert config.train.router_replay == replay
            assert config.train.learning_rate == rate
            seen.add(base)
    assert seen == {"dense", design.MAIN}


def test_comparisons_name_what_is_run():
    for title, pairs in analysis.comparisons().items():
        assert pairs, title
        for label, this, that in pairs:
            assert this in design.cells(), label
            assert that in design.cells(), label
            assert this != that


def _rows(norms, **metrics):
    return [
        {"step": step, "actor/grad_norm": norm, **{n: v[step] for n, v in metrics.items()}}
        for step, norm in enumerate(norms)
    ]


def test_spikes_are_counted_against_the_median_of_the_run():
    rows = _rows([2.0, 2.0, 2.0, 7.0, 5.0, 1.0])
    assert analysis.spike_share(rows) == pytest.approx(1 / 6)  # 7 > 3 · 2, and 5 is not
    assert analysis.largest_norm(rows) == pytest.approx(3.5)
    assert np.isnan(analysis.largest_norm([]))


def test_measures_of_a_run():
    squares, agreement = [0.04, 0.08], [0.9, 0.8]
    rows = _rows(
        [1.0, 1.0],
        **{
            "actor/log_ratio_squared/token": squares,
            "router/agreement/old_current": agreement,
        },
    )
    assert analysis.MEASURES[analysis.TOKEN](rows) == pytest.approx((0.04 * 0.08) ** 0.25)
    assert analysis.MEASURES[analysis.DRIFT](rows) == pytest.approx(0.15)
    assert np.isnan(
        analysis.MEASURES[analysis.SEQUENCE](rows)
    )  # not there, as drift in a dense one


def test_differences_are_paired_by_seed():
    runs = {
        "a": {0: _rows([1.0, 4.0, 1.0]), 1: _rows([1.0, 2.0, 1.0]), 2: _rows([1.0, 9.0, 1.0])},
        "b": {0: _rows([1.0, 1.0, 1.0]), 1: _rows([1.0, 1.0, 1.0])},
    }
    found = analysis.difference(runs, "a", "b", analysis.largest_norm)
    assert found.count == 2
    assert found.mean == pytest.approx((3 + 1) / 2)
    # As a factor: 4 and 2 against 1.
    factor = analysis.compared(runs, "a", "b", analysis.LARGEST)
    assert factor.startswith(f"×{np.sqrt(8):.2f} (")
    assert analysis.compared(runs, "a", "b", analysis.SEQUENCE) == "–"


def test_tables_and_figures_of_what_is_there(tmp_path):
    """Two runs have ended; the table has them, and names the others as not finished."""
    sweep = design.sweep(BASES, steps=2, seeds=(0,))
    names = [design.cell_name(design.MAIN, "grpo", replay) for replay in ("none", "old")]
    for member in spec.members(sweep):
        if member.variant.name in names:
            folder = member.folder(tmp_path / "runs")
            folder.mkdir(parents=True)
            scale = 1 + names.index(member.variant.name)
            rows = [
                {
                    "step": step,
                    "actor/grad_norm": 1.0,
                    "actor/log_ratio_squared/token": 0.01 * scale,
                    "router/agreement/old_current": 0.9,
                    "val-core/label_sums/acc/mean@2": 0.5,
                }
                for step in (1, 2)
            ]
            lines = "".join(json_line(row.pop("step"), row) for row in rows)
            (folder / "metrics.jsonl").write_text(lines)
            mark = spec.fields.fingerprint(spec.config_of(sweep, member))
            (folder / "finished.json").write_text(json.dumps({"fingerprint": mark}))
    text = analysis.write(sweep, tmp_path / "runs", tmp_path)
    assert (tmp_path / "results.md").read_text() == text
    table, missing = text.split("## Not finished")
    assert all(f"| {name} " in table for name in names)
    assert missing.count("\n- ") == len(design.cells()) - 2
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("ratios.png", "curves.png"))
    runs = analysis.finished(sweep, tmp_path / "runs")
    assert analysis.compared(runs, *names[::-1], analysis.TOKEN).startswith("×1.41")
