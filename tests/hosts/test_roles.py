"""Roles of processes: who does the work, and what the others are told, each process in turn."""

import pytest

from luspo_jax.hosts import guard, processes
from luspo_jax.hosts.roles import Roles

SPLIT = Roles(train=(0, 1), rollout=(2, 3))


@pytest.fixture
def world(monkeypatch):
    """Four processes in turn: `world.at(i)` is process i, `world.told` what is sent."""

    class World:
        waits, told = [], [None] * 4

        def at(self, index):
            monkeypatch.setattr(processes.jax, "process_index", lambda: index)
            self.index = index

        def gather(self, value):
            assert processes.members() == (0, 1, 2, 3)
            if value is not None:
                self.told[self.index] = value
            return list(self.told)

    found = World()
    monkeypatch.setattr(processes.jax, "process_count", lambda: 4)
    monkeypatch.setattr(processes, "gather", found.gather)
    monkeypatch.setattr(processes, "barrier", lambda label, phase: found.waits.append(phase))
    return found


def _work(done):
    def work():
        done.append((processes.jax.process_index(), processes.members(), processes.share(6)))
        return f"of {processes.jax.process_index()}"

    return work


@pytest.mark.parametrize(("what", "who"), [("sampled", (2, 3)), ("trained", (0, 1))])
def test_work_is_done_in_one_role_and_known_in_both(world, what, who):
    done, values = [], {}
    for index in (*who, *({0, 1, 2, 3} - {*who})):
        world.at(index)
        assert (SPLIT.trains, SPLIT.samples) == (index < 2, index >= 2)
        values[index] = getattr(SPLIT, what)(_work(done), "here")
    assert done == [(who[0], who, slice(0, 6, 2)), (who[1], who, slice(1, 6, 2))]
    assert values == {i: f"of {i}" if i in who else f"of {who[0]}" for i in range(4)}
    assert world.waits == [guard.MEETING] * 4
    assert world.told.count(None) == 3  # the second has the same value, and does not send it


def test_processes_of_both_roles_do_the_work_and_meet_nobody(world):
    for roles in (Roles(), Roles((0, 1, 2, 3), (0, 1, 2, 3))):
        for index in range(4):
            world.at(index)
            done = []
            assert roles.trains
            assert roles.samples
            assert roles.sampled(_work(done), "here") == f"of {index}"
            assert roles.trained(_work(done), "here") == f"of {index}"
            assert [members for _, members, _ in done] == [(0, 1, 2, 3)] * 2
    assert world.waits == []


def test_what_is_begun_is_told_when_it_is_asked_for(world):
    for index in (2, 0):
        world.at(index)
        done = []
        wait = SPLIT.begin(_work(done), "here")
        assert len(done) == (index == 2)
        assert len(world.waits) == (index == 0)
        assert wait() == "of 2"
