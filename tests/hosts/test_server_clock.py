"""By how much two clocks differ, as servers say."""

import time

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
    plain = time.time
    monkeypatch.setattr(server_clock.time, "time", lambda: plain() + ahead)
    if bucket.url.startswith("s3"):  # a request's signature tells the time, and boto's clock is ours
        monkeypatch.undo()
        monkeypatch.setattr(server_clock, "time", type("", (), {"time": lambda: plain() + ahead}))
    assert server_clock.ahead_s(bucket.url) == pytest.approx(ahead, abs=1.5)


def test_without_an_answer_nothing_is_known(bucket):
    assert server_clock.ahead_s(f"{bucket.url.split(':')[0]}://not-there/x") is None
