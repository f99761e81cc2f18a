"""The TPU kernel, interpreted on CPU, and compiled for chips where libtpu is.

Its values are compared in `test_paged_attention.py`.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops import tpu_paged_attention as module
from tests.ops import paged_cases as cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(module, "_INTERPRET", True)
    monkeypatch.setattr(module, "_ENTRIES", 64)  # few copies to unroll


def test_the_tpu_is_called_for_as_many_rows_as_its_scalars_have_room(monkeypatch):
    rows = cases.rows_of(cases.S16, dtype=jnp.bfloat16)
    once = cases.attended("tpu", rows)
    monkeypatch.setattr(module, "_NUMBERS", 3 * 12)
    thrice = module.attend(rows.query, rows.pool, cases.LAYER, *rows[4:])
    for a, b in zip(once, thrice, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_no_pool_is_copied_on_a_chip():
    pytest.importorskip("libtpu")
    found = cases.temporaries_of(
        [
            ("v5p:2x2x1", "tpu", {}),
            ("v5p:2x2x1", "tpu", cases.PAGES_OF_64),
            ("v5p:2x2x1", "tpu", {"B": 512, "tokens": 500, **cases.PAGES_OF_64}),
            ("v6e:2x2", "tpu", {}),
            ("v6e:2x2", "tpu", cases.PAGES_OF_64),
        ],
        TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu",
    )  # fmt: skip
    assert [round(pool) for _, pool in found] == [14000] * 5
    assert max(temporary for temporary, _ in found) < 28  # measured 24.6 with 512 rows, else 4.5
