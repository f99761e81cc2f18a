"""Letters between guards over real sockets of this host; strangers are not believed."""

import itertools
import socket
import time

import pytest

from luspo_jax.hosts import letters


@pytest.fixture
def box():
    made = letters.Box()
    yield made
    made.close()


def _address(box):
    return ("127.0.0.1", box.port)


def _arrived(box, secret="s", count=1, within_s=5.0):
    found, until = [], time.monotonic() + within_s
    while len(found) < count and time.monotonic() < until:
        found += box.read(secret)
        time.sleep(0.01)
    return found


def test_letters_arrive(box):
    message = {"post": {"message": "Ärger " * 3000, "step": 3}, "number": 1}
    letters.send([_address(box)] * 2, letters.sealed(message, "s"), within_s=1.0)
    assert _arrived(box, count=2) == [message, message]
    assert box.read("s") == []


def test_letter_of_a_stranger_is_left_out(box):
    genuine = letters.sealed({"status": "failed", "step": 1}, "s")
    hostile = [
        letters.sealed({"status": "failed"}, "another"),
        letters.sealed({"status": "failed"}, ""),
        genuine.replace(b"failed", b"broken"),
        genuine[:-1],
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\x00 {",
        b"x" * 1000,
        letters.sealed({"message": "x" * (1 << 17)}, "s"),  # too long
    ]
    for letter in hostile:
        letters.send([_address(box)], letter, within_s=1.0)
    letters.send([_address(box)], genuine, within_s=1.0)
    assert _arrived(box, count=2, within_s=1.0) == [{"status": "failed", "step": 1}]


def test_who_says_nothing_is_sent_away_and_holds_nobody_up(box, monkeypatch):
    monkeypatch.setattr(letters, "_PATIENCE_S", 0.3)
    with socket.create_connection(_address(box)) as silent:
        letters.send([_address(box)], letters.sealed({"n": 1}, "s"), within_s=1.0)
        assert _arrived(box) == [{"n": 1}]
        silent.settimeout(5.0)
        assert silent.recv(1) == b""


def test_crowd_that_says_nothing_delays_a_letter_and_does_not_lose_it(monkeypatch):
    monkeypatch.setattr(letters, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(letters, "_AT_ONCE", 2)
    box = letters.Box()
    crowd = [socket.create_connection(_address(box)) for _ in range(5)]
    try:
        for number in range(10):
            letters.send([_address(box)], letters.sealed({"n": number}, "s"), within_s=1.0)
        assert box.read("s") == []
        assert sorted(message["n"] for message in _arrived(box, count=10)) == list(range(10))
    finally:
        for connection in crowd:
            connection.close()
        box.close()


def test_box_that_is_full_takes_no_more(monkeypatch):
    monkeypatch.setattr(letters, "_MOST", 2)
    box = letters.Box()
    try:
        letters.send([_address(box)] * 5, letters.sealed({"n": 1}, "s"), within_s=1.0)
        time.sleep(0.3)
        assert len(box.read("s")) == 2
    finally:
        box.close()


def test_who_cannot_be_reached_costs_no_more_than_was_allowed(box):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refused = closed.getsockname()
    addresses = [refused, ("nowhere.invalid", 1), ("192.0.2.1", 9), _address(box)]
    started = time.monotonic()
    letters.send(addresses, letters.sealed({"n": 1}, "s"), within_s=0.5)
    assert time.monotonic() - started < 1.5
    assert _arrived(box) == [{"n": 1}]


def test_host_is_named_by_the_address_that_others_reach(monkeypatch):
    assert letters.host_towards("127.0.0.1:1234") == "127.0.0.1"
    assert letters.host_towards("localhost:1234") == "localhost"  # this host: by the known name
    assert letters.host_towards("[::1]:1234") in ("::1", socket.gethostname())
    assert letters.host_towards("nowhere.invalid:1234") == socket.gethostname()
    assert letters.host_towards("no port") == socket.gethostname()

    class Probe:
        def __init__(self, *kind): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...

        def connect(self, there):
            assert there == ("10.0.0.1", 1234)

        def getsockname(self):
            return ("10.0.0.7", 40000)

    monkeypatch.setattr(letters.socket, "socket", Probe)
    assert letters.host_towards("10.0.0.1:1234") == "10.0.0.7"


def test_seals_differ_by_secret_and_text():
    seals = {
        letters.sealed({"n": n}, secret).split(b" ")[0]
        for n, secret in itertools.product(range(3), "ab")
    }
    assert len(seals) == 6
