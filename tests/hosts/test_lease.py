"""One run holds a folder of a bucket; one that was killed loses it."""

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from luspo_jax.hosts import lease as leases
from luspo_jax.hosts.buckets import BucketError, Entry
from luspo_jax.hosts.files import PlaceError
from luspo_jax.hosts.lease import Held, Lease, held

QUICK = {"beat_s": 0.05, "lease_s": 0.6}


class Memory:
    """A bucket in memory: objects are whole, and only one creates a name."""

    url = "gs://b/run"

    def __init__(self):
        self.objects, self._one, self.away = {}, threading.Lock(), False

    def _check(self):
        if self.away:
            raise BucketError("away")

    def entries(self, below=""):
        self._check()
        return {n: Entry(len(c), 0.0, "") for n, c in list(self.objects.items()) if below in n}

    def read(self, name):
        self._check()
        return self.objects.get(name)

    def write(self, name, content):
        self._check()
        self.objects[name] = content

    def create(self, name, content):
        self._check()
        with self._one:
            return self.objects.setdefault(name, content) == content

    def delete(self, names):
        for name in names:
            self.objects.pop(name, None)


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes locks look like those of another host, whose processes cannot be seen."""
    monkeypatch.setattr(leases, "_is_gone", lambda lock: False)


def _die(lease):
    """As SIGKILL: no beat and no release."""
    lease._closed.set()
    lease._thread.join()


def test_a_live_holder_is_named(elsewhere):
    bucket = Memory()
    first = Lease(bucket, **QUICK)
    says = rf"--workdir=gs://b/run is in use by another run, on host .*, pid {os.getpid()}, since"
    with pytest.raises(PlaceError, match=says):
        Lease(bucket, **QUICK)
    first.check()
    first.close()


def test_a_released_folder_is_free_at_once(elsewhere):
    bucket = Memory()
    Lease(bucket, **QUICK).close()
    began = time.monotonic()
    second = Lease(bucket, beat_s=60, lease_s=60)
    assert time.monotonic() - began < 5
    assert held(bucket).number == 2
    second.close()
    assert held(bucket).released


def test_a_killed_holder_loses_it_after_the_lease(elsewhere):
    bucket = Memory()
    first = Lease(bucket, **QUICK)
    _die(first)
    began = time.monotonic()
    second = Lease(bucket, **QUICK)
    assert QUICK["lease_s"] <= time.monotonic() - began < 10
    second.check()
    assert len(bucket.objects) == 1
    second.close()


def test_a_holder_that_comes_back_sees_that_it_lost(elsewhere):
    bucket = Memory()
    first = Lease(bucket, **QUICK)
    _die(first)
    second = Lease(bucket, **QUICK)
    first.check()  # it does not know yet
    with pytest.raises(PlaceError, match="was taken over by host"):
        first.confirm()
    with pytest.raises(PlaceError, match="was taken over by host"):
        first.check()
    time.sleep(0.2)
    second.check()  # what the first wrote meanwhile does not count
    first.close()  # and it releases nothing
    assert not held(bucket).released
    second.close()


def test_of_several_that_wait_for_a_dead_holder_one_gets_it(elsewhere):
    bucket = Memory()
    _die(Lease(bucket, **QUICK))

    def attempt(_):
        try:
            return Lease(bucket, **QUICK)
        except PlaceError:
            return None

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        won = [lease for lease in pool.map(attempt, range(4)) if lease]
    assert len(won) == 1
    won[0].check()
    won[0].close()


def test_an_outage_is_no_death(elsewhere, monkeypatch):
    """Neither can reach the server: what does not change in that time proves nothing."""
    bucket = Memory()
    _die(Lease(bucket, **QUICK))
    slow = iter([0, 1.0])  # the second look takes longer than the lease
    real = leases.held

    def after_an_outage(place):
        time.sleep(next(slow, 0))
        return real(place)

    monkeypatch.setattr(leases, "held", after_an_outage)
    monkeypatch.setattr(leases, "_LOOK_S", 0.1)
    began = time.monotonic()
    second = Lease(bucket, **QUICK)
    assert time.monotonic() - began > 1.0 + QUICK["lease_s"]
    second.close()


def test_a_holder_survives_an_outage(elsewhere, capsys):
    bucket = Memory()
    lease = Lease(bucket, **QUICK)
    bucket.away = True
    time.sleep(0.3)
    lease.check()
    with pytest.raises(BucketError, match="away"):  # a real bucket is waited for
        lease.confirm()
    bucket.away = False
    lease.confirm()
    before = held(bucket).beat
    time.sleep(0.3)
    assert held(bucket).beat > before
    lease.close()
    assert "the lock is not renewed (away)" in capsys.readouterr().err


def test_the_lock_of_a_process_of_this_host_that_has_ended_is_free_at_once():
    bucket = Memory()
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    lease = Lease(bucket, **QUICK)
    _die(lease)
    gone = dataclasses.replace(held(bucket), pid=process.pid)
    bucket.objects = {".lock/000001.json": json.dumps(dataclasses.asdict(gone)).encode()}
    began = time.monotonic()
    Lease(bucket, beat_s=60, lease_s=60).close()
    assert time.monotonic() - began < 5
    # The same number on another machine, or in another container, says nothing.
    for change in ({"host": "other"}, {"place": "other"}):
        assert not leases._is_gone(dataclasses.replace(gone, **change))


def test_clocks_that_differ_change_nothing(elsewhere):
    """What a holder says of the time is for people."""
    bucket = Memory()
    lock = Held(7, "t", "h", 1, "p", since="1999-01-01")
    bucket.objects[".lock/000007.json"] = json.dumps(dataclasses.asdict(lock)).encode()
    began = time.monotonic()
    lease = Lease(bucket, **QUICK)
    assert QUICK["lease_s"] <= time.monotonic() - began
    assert held(bucket).number == 8
    lease.close()


def test_something_else_in_its_place_is_named():
    bucket = Memory()
    bucket.objects[".lock/000001.json"] = b"{}"
    with pytest.raises(BucketError, match=r"\.lock/000001\.json is no lock of luspo_jax"):
        held(bucket)
