"""How a guard judges the others, with made-up posts and a clock of the test's."""

import itertools

import pytest

from luspo_jax.hosts import peers


def _membership(index=0, count=3, **changes):
    values = {"dead_after_s": 30.0, "phase_timeout_s": 0.0, "attempt": "now", **changes}
    return peers.Membership(
        folder="", checkpoints="", index=index, count=count, secret="s", host="here", **values
    )


def _post(index, **changes):
    return {
        "process": index, "host": f"host-{index}", "pid": 100 + index, "attempt": "now", "beat": 1,
        "phase": "rollout", "phase_s": 0.5, "step": 7, "status": "running", "message": "",
        "guard": (f"host-{index}", 5000 + index),
    } | changes  # fmt: skip


class _Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return _Clock()


def _reads(known, clock, seconds, beating):
    """The store answers every two seconds, and only these processes post."""
    for tick in range(0, seconds, 2):
        clock.now += 2
        known.asks()
        known.read(_post(index, beat=clock.now + tick) for index in beating)


def test_beats_keep_a_process_alive_and_silence_names_it(clock):
    known = peers.Peers(_membership(), clock)
    _reads(known, clock, 100, (1, 2))
    assert known.look() is None
    _reads(known, clock, 30, (1,))
    assert known.look() is None
    _reads(known, clock, 4, (1,))
    assert known.look() == (
        "process 2 (host host-2, pid 102) is dead: no sign of life for 34 s "
        "(hosts.dead_after_s=30); it was last in phase rollout of step 7"
    )


def test_post_that_never_changes_is_no_sign_of_life(clock):
    known = peers.Peers(_membership(count=2), clock)
    for _ in range(16):
        known.read([_post(1, beat=5)])
        clock.now += 2
    known.read([_post(1, beat=5)])
    assert "process 1 (host host-1, pid 101) is dead" in known.look()


def test_posts_of_an_earlier_attempt_are_no_signs(clock):
    known = peers.Peers(_membership(), clock)
    for beat in range(16):
        known.read([_post(1, attempt="before", status="failed", beat=beat), _post(2, beat=beat)])
        assert known.look() is None
        clock.now += 2
    known.read([_post(2, beat=99)])
    assert known.look() == ("process 1 has given no sign of life for 32 s: it died at the start")


def test_failure_is_named_at_once_and_a_cause_goes_before_its_consequences(clock):
    known = peers.Peers(_membership(), clock)
    known.read([_post(1, status="broken", message="Gloo AllGather failed"), _post(2)])
    assert known.look() is None  # somebody broke the collective, and may yet be named
    known.read([_post(1, status="stopped", message="process 2 is the cause"), _post(2)])
    assert known.look() == "process 2 is the cause"
    known.read([_post(2, status="failed", message="no prompts", phase="reward")])
    assert known.look() == (
        "process 2 (host host-2, pid 102) failed in phase reward of step 7: no prompts"
    )


@pytest.mark.parametrize(("later", "earlier"), [("failed", "running"), ("done", "broken")])
def test_what_a_guard_says_last_stands_against_what_its_worker_left_in_the_store(
    clock, later, earlier
):
    known = peers.Peers(_membership(count=2), clock)
    assert known.hear(_post(1, status=later, message="killed"), 1)
    known.read([_post(1, beat=77, status=earlier)])
    assert known.posts[1]["status"] == later


@pytest.mark.parametrize("status", ["done", "preempted"])
def test_who_is_done_is_not_dead(clock, status):
    known = peers.Peers(_membership(count=2), clock)
    known.read([_post(1, status=status)])
    _reads(known, clock, 100, ())
    assert known.look() is None


def test_silence_proves_nothing_while_the_store_does_not_answer_but_of_process_0(clock):
    """Process 0 has the store: if it stays away, process 0 is what is gone."""
    known = peers.Peers(_membership(index=1), clock)
    _reads(known, clock, 10, (0, 2))
    known.asks()
    clock.now += 30
    known.asks()
    assert known.look() is None
    clock.now += 1
    assert "process 0 (host host-0, pid 100) is dead: no sign of life for 31 s" in known.look()
    other = peers.Peers(_membership(index=0), clock)
    _reads(other, clock, 10, (1, 2))
    clock.now += 100
    other.asks()
    assert other.look() is None


def test_silence_proves_nothing_while_its_own_worker_asks_nothing(clock):
    """It is stopped, or holds Python's lock: that says nothing of the others."""
    known = peers.Peers(_membership(index=1), clock)
    _reads(known, clock, 10, (0, 2))
    clock.now += 100
    assert known.look() is None
    assert "process 0 (host" in known.look(alone=True)  # it was aborted, as jax does then


def test_store_that_answers_again_gives_the_others_time_to_post(clock):
    known = peers.Peers(_membership(), clock)
    _reads(known, clock, 10, (1, 2))
    clock.now += 200
    known.read([_post(1, beat=5000.0)])
    assert known.look() is None
    _reads(known, clock, 32, (1,))
    assert "process 2 (host" in known.look()


def test_time_in_which_this_host_slept_does_not_count(clock):
    known = peers.Peers(_membership(count=2), clock)
    _reads(known, clock, 10, (1,))
    clock.now += 500
    known.forgive(500)
    known.read([_post(1, beat=1010.0 + 8)])
    assert known.look() is None


def test_guard_that_answers_keeps_its_process_alive_and_one_that_no_longer_does_names_it(clock):
    known = peers.Peers(_membership(), clock)
    _reads(known, clock, 4, (1, 2))
    for number in range(1, 60):  # the store is away
        clock.now += 2
        assert known.hear(_post(1), number)
        assert known.look() is None
    clock.now += 31
    assert "process 1 (host" in known.look()


def test_letter_that_is_sent_again_is_no_sign_of_life(clock):
    known = peers.Peers(_membership(count=2), clock)
    assert known.hear(_post(1), 3)
    assert not known.hear(_post(1), 3)
    assert not known.hear(_post(1, status="failed"), 2)
    assert not known.hear(_post(1, attempt="before"), 4)
    assert not known.hear(_post(7), 4)  # no process of this run
    assert not known.hear(_post(0), 4)  # this one
    clock.now += 31
    assert not known.hear(_post(1), 3)
    assert "process 1 (host host-1, pid 101) is dead" in known.look()


def test_each_guard_is_asked_at_the_beginning_and_when_its_process_is_silent(clock):
    known = peers.Peers(_membership(), clock)
    assert known.unheard() == known.addresses() == []
    known.read([_post(1), _post(2)])
    assert known.unheard() == known.addresses() == [("host-1", 5001), ("host-2", 5002)]
    assert known.unheard() == []
    _reads(known, clock, 16, (1,))
    assert known.unheard() == known.unheard() == [("host-2", 5002)]
    known.hear(_post(2, status="done"), 1)
    assert known.unheard() == []


def test_end_of_a_guard_is_expected_where_its_port_is_open_and_it_lives(clock):
    known = peers.Peers(_membership(), clock)
    known.read([_post(1), _post(2)])
    assert not known.expected()
    known.hear(_post(1), 1)
    assert known.expected()
    clock.now += 16
    assert not known.expected()
    known.hear(_post(1), 2)
    assert known.expected()
    known.hear(_post(1, status="stopped"), 3)
    assert not known.expected()


def test_next_start(tmp_path):
    assert peers.next_start(tmp_path / "checkpoints").endswith("starts over")
    for name in ("2", "10", "12.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert peers.next_start(tmp_path / "checkpoints").endswith("checkpoint step 10")
    assert peers.next_start("gs://bucket/run/checkpoints").endswith(
        "its last checkpoint, if it has one"
    )


def test_every_status_is_ranked():
    order = ["running", "broken", "done", "failed"]
    assert all(peers._RANK[a] < peers._RANK[b] for a, b in itertools.pairwise(order))
