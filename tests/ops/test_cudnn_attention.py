"""What is asked of cuDNN, with jax's own computation in its place: there is no GPU here."""

import jax
import numpy as np
import pytest

from tests.ops import attention_cases as cases


@pytest.fixture(autouse=True)
def _without_cudnn(monkeypatch):
    real = jax.nn.dot_product_attention

    def on_cpu(*arrays, implementation, **settings):
        assert implementation == "cudnn"
        return real(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)


def test_rows_of_one_segment_match_a_plain_computation():
    query, key, value, _ = cases.inputs(3, 16, 4, 2, 8)
    segments = (np.arange(16)[None] < np.array([16, 9, 1])[:, None]).astype(np.int32)
    # Outputs on padding mean nothing: nothing is asked of them.
    grad = np.where(segments[..., None, None] == 1, cases.cotangent(query), np.float32(0))
    got = cases.computed((query, key, value, segments), grad, "cudnn")
    expected = list(cases.dense(query, key, value, segments, grad))
    assert np.isfinite(got[0]).all()
    got[0], expected[0] = (
        np.where(segments[..., None, None] == 1, x[0], 0) for x in (got, expected)
    )
    assert cases.error(got, expected) < 1e-6


def test_a_row_of_padding_only_is_finite():
    query, key, value, segments = cases.inputs(3, 8, 2, 2, 8)
    segments = np.where(segments > 0, 1, 0).astype(np.int32)
    assert not segments[1].any()
    results = cases.computed((query, key, value, segments), np.zeros_like(query), "cudnn")
    assert all(np.isfinite(x).all() for x in results)
