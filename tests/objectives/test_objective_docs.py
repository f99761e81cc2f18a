"""The page of objectives is the one that the docstrings give."""

import pathlib

from experiments import objective_table
from luspo_jax.objectives.advantages import ADVANTAGES
from luspo_jax.objectives.aggregation import AGGREGATIONS
from luspo_jax.objectives.corrections import CORRECTIONS
from luspo_jax.objectives.length_scales import LENGTH_SCALES
from luspo_jax.objectives.objective import Objective
from luspo_jax.objectives.ratios import RATIOS
from luspo_jax.objectives.shapings import SHAPINGS
from luspo_jax.objectives.surrogates import SURROGATE_RATIOS, SURROGATES

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "objectives.md"
TABLES = (RATIOS, SURROGATES, LENGTH_SCALES, AGGREGATIONS, ADVANTAGES, SHAPINGS, CORRECTIONS)


def test_page_is_up_to_date():
    current = PAGE.read_text(encoding="utf-8") == objective_table.page()
    assert current, "run `python -m experiments.objective_table` and commit docs/objectives.md"


def test_every_function_of_an_axis_documents_itself():
    for table in TABLES:
        for name, function in table.items():
            assert function.__doc__, name


def test_every_surrogate_works_with_a_ratio_that_it_allows():
    for surrogate in SURROGATES:
        ratios, _ = SURROGATE_RATIOS.get(surrogate, (tuple(RATIOS), ""))
        for ratio in ratios:
            Objective(surrogate=surrogate, ratio=ratio)
    assert set(SURROGATE_RATIOS) <= set(SURROGATES)
