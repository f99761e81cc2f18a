"""Metrics: declared once, reduced right."""

import math

import numpy as np
import pytest

from luspo_jax.metrics import (
    METRICS,
    REDUCERS,
    StepMetrics,
    declared,
)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_every_declaration_is_complete(metric):
    assert metric.reducer in REDUCERS
    assert metric.meaning
    assert declared(metric.name.replace("*", "some/thing")).reducer == metric.reducer


@pytest.mark.parametrize(
    ("name", "declaration"),
    [
        ("reward", "reward"),
        ("timing_s/update_actor", "timing_s/*"),
        ("val-core/aime24/acc/mean@32", "val-core/*"),
        ("actor/clipfrac/pos/bin_3", "actor/clipfrac/pos/*"),
        ("rollout_corr/kl", "rollout_corr/kl"),
        ("rollout_corr/ppl_ratio", "rollout_corr/*"),
    ],
)
def test_patterns_cover_names(name, declaration):
    assert declared(name).name == declaration


@pytest.mark.parametrize("name", ["rewards", "timing_s", "timing_s/", "critic/score/median"])
def test_undeclared_names_are_refused_with_the_nearest(name):
    with pytest.raises(KeyError, match=r"did you mean|known"):
        declared(name)


def test_reducers():
    step = StepMetrics()
    for value, count in ((3.0, 1), (5.0, 3)):
        step.update(
            {
                "actor/pg_loss": (value, count),
                "response_length/max": value,
                "response_length/min": value,
                "timing_s/gen": np.float32(value),
                "actor/lr": value,
                "reward": value,
            }
        )
    assert step.result() == {
        "actor/pg_loss": 2.0,
        "response_length/max": 5.0,
        "response_length/min": 3.0,
        "timing_s/gen": 8.0,
        "actor/lr": 5.0,
        "reward": 4.0,
    }


def test_a_mean_of_nothing_is_not_a_number_and_a_count_needs_a_mean():
    step = StepMetrics()
    step.add("actor/pg_loss", 0.0, 0)
    assert math.isnan(step.result()["actor/pg_loss"])
    with pytest.raises(ValueError, match="reduced by max"):
        step.add("response_length/max", 3.0, 2)
