"""By how much two clocks differ, as servers say."""

import time
import types

import pytest

from luspo_jax.hosts import server_clock
from tests.bucket_cases import bucket_of


@pytest.fixture(params=["gs", "s3"])
def bucket(request, bucket_ports, monkeypatch, tmp_path):
    """An empty folder of a bucket of either kind."""
    return bucket_of(request.param, bucket_ports[request.param], monkeypatch, tmp_path)


def test_one_host_has_one_clock(bucket):
    assert server_clock.ahead_s(bucket.url) == 0.0


@pytest.mark.parametrize("ahead", [-3600.0, 50.0])
def test_a_clock_that_differs(bucket, ahead, monkeypatch):
    # Of this module only: requests are signed with the time.
    shifted = types.SimpleNamespace(time=lambda: time.time() + ahead)
    monkeypatch.setattr(server_clock, "time", shifted)
    assert server_clock.ahead_s(bucket.url) == pytest.approx(ahead, abs=1.5)


def test_without_an_answer_nothing_is_known(bucket):
    assert server_clock.ahead_s(f"{bucket.url.split(':')[0]}://not-there/x") is None
