"""The thread that posts and reads, with a store that the test holds."""

import json
import threading
import time

import pytest

from luspo_jax.hosts import lifesigns, peers


class _Store:
    """Posts of process 1 are there from the beginning."""

    def __init__(self):
        self.posts = {1: json.dumps({"process": 1, "beat": 4})}
        self.put_at, self.error, self.met = [], None, []
        self.open = threading.Event()
        self.open.set()

    def put(self, index, text):
        self.open.wait(10.0)
        if self.error:
            raise self.error
        self.put_at.append(time.monotonic())
        self.posts[index] = text

    def texts(self):
        return list(self.posts.values())

    def meet(self, label, timeout_s):
        if self.error:
            raise self.error
        self.met.append((label, timeout_s))


class _Signs:
    def __init__(self):
        self.store, self.told = _Store(), []
        self.doing = {"process": 0, "phase": "start"}
        self.signs = lifesigns.Signs(
            self.store, 0, lambda: dict(self.doing), lambda **news: self.told.append(news)
        )

    def posted(self):
        return json.loads(self.store.posts[0])

    def of(self, name):
        return [news[name] for news in self.told if name in news]


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(peers, "BEAT_S", 0.2)
    monkeypatch.setattr(lifesigns, "_NEWS_S", 0.02)
    made = _Signs()
    yield made
    made.store.open.set()
    made.store.error = None
    made.signs.leave(1.0)


def _until(condition):
    until = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_beats_grow_and_the_guard_hears_of_the_others(made):
    _until(lambda: len(made.store.put_at) >= 3)
    assert made.posted()["phase"] == "start"
    assert made.posted()["beat"] >= 3
    _until(lambda: len(made.of("posts")) >= 2)
    assert made.of("posts")[0] == [{"process": 1, "beat": 4}]  # its own is left out
    assert made.of("asks")


def test_news_are_posted_before_the_next_beat(made, monkeypatch):
    monkeypatch.setattr(peers, "BEAT_S", 60.0)
    made.signs.now()
    made.doing["phase"] = "reward"
    made.signs.hurry()
    _until(lambda: made.posted()["phase"] == "reward")


def test_last_word_is_in_the_store_when_now_returns(made, monkeypatch):
    monkeypatch.setattr(peers, "BEAT_S", 60.0)
    for number in range(20):
        made.doing["message"] = number
        made.signs.now()
        assert made.posted()["message"] == number


def test_store_that_hangs_holds_the_worker_up_no_longer_than_allowed(made):
    made.store.open.clear()
    started = time.monotonic()
    made.signs.now(within_s=0.3)
    assert 0.25 < time.monotonic() - started < 3.0


def test_store_that_fails_is_asked_again_and_raises_nothing(made):
    _until(lambda: made.of("posts"))
    made.store.error = RuntimeError("UNAVAILABLE: failed to connect")
    made.signs.now()
    told, asked = len(made.of("posts")), len(made.of("asks"))
    _until(lambda: len(made.of("asks")) >= asked + 3)
    assert len(made.of("posts")) == told
    made.store.error = None
    _until(lambda: len(made.of("posts")) > told)


def test_leaving_waits_for_all_and_ends_the_signs(made):
    made.signs.leave(5.0)
    assert made.store.met == [("end", 5.0)]
    assert made.told[-1] == {"left": True} or {"left": True} in made.told
    beats = len(made.store.put_at)
    time.sleep(0.5)
    assert len(made.store.put_at) == beats
    made.signs.now()  # returns


def test_who_could_not_meet_the_others_does_not_say_that_they_left(made):
    made.store.error = RuntimeError("ABORTED: a task died")
    made.signs.leave(5.0)
    assert made.of("left") == []
