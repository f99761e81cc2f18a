"""Outliers of groups that are all right are cut, with all their fields, and judged again."""

import numpy as np
import pytest

from luspo_jax.experience import outliers
from luspo_jax.experience.groups import Group
from luspo_jax.experience.outliers import cut, without_outliers
from tests.experience.experience_cases import group

# Mean 10 + 90/12 = 17.5 and standard deviation 90 · √11 / 12 = 24.87.
LENGTHS = [10] * 11 + [100]
LIMIT = int(17.5 + 3 * 90 * np.sqrt(11) / 12)  # 92


def _judge(verdicts):
    def judge(groups):
        return [
            g.enriched(reward=[verdicts(r) for r in g.responses], text=["again"] * len(g.responses))
            for g in groups
        ]

    return judge


def _wrong_if_cut(response):
    return group(0, [1.0 if response.stopped else 0.0]).responses[0].reward


def test_the_limit_is_by_mean_and_deviation_of_a_group_that_is_all_right():
    assert LIMIT == 92
    assert outliers.limit(group(0, [1] * 12, LENGTHS), deviations=3.0, part="right") == LIMIT
    assert outliers.limit(group(0, [1] * 12, LENGTHS), deviations=0.0, part="right") == 17
    assert outliers.limit(group(0, [1] * 11 + [0], LENGTHS), deviations=3.0, part="right") is None
    unjudged = group(0, [1] * 12, LENGTHS, judged=[True] * 11 + [False])
    assert outliers.limit(unjudged, deviations=3.0, part="right") is None


@pytest.mark.parametrize(("margin", "tokens"), [(8, 8), (9, 0)])
def test_only_what_exceeds_the_limit_by_the_margin_is_cut(margin, tokens):
    before = [group(0, [1] * 12, LENGTHS), group(1, [1, 0], [3, 900])]
    after, found = without_outliers(
        before, _judge(_wrong_if_cut), margin=margin, deviations=3.0, part="right"
    )
    assert found == tokens
    assert after[1] is before[1]
    if not tokens:
        assert after[0] is before[0]
        return
    assert after[0].lengths.tolist() == [10] * 11 + [LIMIT]
    assert after[0].column("stopped") == [True] * 11 + [False]
    assert all(after[0].column("ended"))
    assert after[0].values("right").tolist() == [1] * 11 + [0]
    assert after[0].column("text") == ["again"] * 12


def test_nothing_is_judged_again_if_nothing_is_cut():
    def judge(groups):
        raise AssertionError(groups)

    before = [group(0, [1, 1], [3, 4])]
    assert without_outliers(before, judge, margin=1, deviations=3.0, part="right") == (before, 0)


def test_every_field_of_a_token_is_cut():
    ids = np.arange(5 * 2, dtype=np.uint8).reshape(5, 1, 2)
    prompt_ids = np.zeros((1, 1, 2), np.uint8)
    (before,) = group(0, [1], [5], expert_ids=[ids], prompt_expert_ids=[prompt_ids]).responses
    after = cut(before, 3)
    arrays = {name for name, x in vars(before).items() if isinstance(x, np.ndarray)}
    assert arrays - {"prompt_expert_ids"} == set(outliers._PER_TOKEN)
    for name in outliers._PER_TOKEN:
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name)[:3])
    assert after.prompt_expert_ids is prompt_ids
    assert cut(Group(None, [before]).enriched(expert_ids=[None]).responses[0], 3).expert_ids is None
