"""The study of mixtures of experts: what it runs, and how it reads runs."""

import pathlib

import numpy as np
import pytest

from experiments.studies.moe_stability import analysis, design
from experiments.sweeps import spec

BASES = pathlib.Path("bases")


def test_the_main_mixture_has_every_objective_with_every_replay():
    cells = set(design.cells().values())
    for objective in design.OBJECTIVES:
        for replay in design.REPLAYS:
            assert (design.MAIN, objective, replay, design.RATE) in cells
        assert ("dense", objective, "none", design.RATE) in cells
    assert len(design.SEEDS) >= 3
    assert {*design.TOKEN_LEVEL, *design.SEQUENCE_LEVEL} == set(design.OBJECTIVES)


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
            spec.configuration.check(config)
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
    assert analysis.MEASURES[analysis.TOKEN](rows) == pytest.approx(np.sqrt(0.06))
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
