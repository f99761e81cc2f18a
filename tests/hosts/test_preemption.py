"""SIGTERM: at once where nothing is lost, else when asked; processes agree."""

import os
import signal
import threading

import pytest

from luspo_jax.hosts import preemption, processes
from luspo_jax.hosts.guard import Preempted


def _ask():
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_interrupts_where_it_may_and_is_remembered_elsewhere():
    with preemption.Notice() as notice:
        assert not notice.agreed()
        _ask()
        assert notice.received
        assert notice.agreed()
        with pytest.raises(Preempted), notice.interruptible():
            pytest.fail("asked before: nothing is begun")
    with preemption.Notice() as notice:
        with pytest.raises(Preempted), notice.interruptible():
            _ask()
        _ask()  # a second signal does not disturb what is saved now


def test_the_old_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.Notice():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_of_several_processes_none_is_interrupted_and_one_is_enough(monkeypatch):
    monkeypatch.setattr(processes, "members", lambda: (0, 1))
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, True])
    with preemption.Notice() as notice:
        assert notice.agreed()
        with notice.interruptible():
            _ask()
        assert notice.received


def test_a_thread_listens_to_nothing():
    found = []

    def work():
        with preemption.Notice() as notice:
            found.append(notice.agreed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
