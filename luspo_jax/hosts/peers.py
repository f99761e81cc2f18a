"""What a guard knows of the other processes of its run, and how it judges them.

A *post* is what one process says of itself: who it is (process, host, pid), where it is (phase,
step), its status, and a number that grows with each sign of life. Posts come from the key-value
store, through this process's worker, and from other guards directly.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

BEAT_S = 2.0  # between two signs of life, and two looks at those of the others
# Later ones replace earlier ones: the store keeps what a killed process said last.
_RANK = {"running": 0, "broken": 1, "done": 2, "preempted": 2, "failed": 3, "stopped": 3}


@dataclasses.dataclass(frozen=True)
class Membership:
    """What a worker tells its guard once it knows its place in the run.

    Attributes:
      folder: where the guard of process 0 writes all posts, for people to read; no other guard uses
        it.
      checkpoints: folder or address of the checkpoints, to say where a run resumes.
      index, count: this process, and the number of processes.
      attempt: identifies this start of the run, the same on all processes; posts of earlier starts
        are ignored.
      secret: known to the processes of this start only; guards believe nobody without it.
      host: where the others reach this host.
      dead_after_s: seconds without a sign of life after which a process counts as dead.
      phase_timeout_s: the longest time that a phase may take; 0 for no limit.
    """

    folder: str
    checkpoints: str
    index: int
    count: int
    attempt: str
    secret: str
    host: str
    dead_after_s: float
    phase_timeout_s: float


class Peers:
    """The posts of the other processes, and the time of each one's last sign of life.

    Signs are timed by this process's own clock as they arrive: clocks of different hosts are never
    compared.
    """

    def __init__(self, membership: Membership, clock: Callable[[], float] = time.monotonic):
        self._us, self._clock = membership, clock
        now = clock()
        others = [i for i in range(membership.count) if i != membership.index]
        self._seen = dict.fromkeys(others, now)
        self._beats: dict[int, Any] = {}
        self._calls = dict.fromkeys(others, 0)  # number of the last message of each guard
        self._greeted: set[int] = set()
        self._asked = self._read = now  # the store, and its last answer
        self.posts: dict[int, dict[str, Any]] = {}

    def asks(self) -> None:
        """The worker is about to ask the store."""
        self._asked = self._clock()

    def read(self, posts: Iterable[dict[str, Any]]) -> None:
        """Takes the posts that the worker has found in the store."""
        now = self._clock()
        if now - self._read > 3 * BEAT_S:
            self.forgive(now - self._read)
        self._asked = self._read = now
        for post in posts:
            index = post["process"]
            if not self._take(post) or post["beat"] == self._beats.get(index):
                continue
            self._beats[index], self._seen[index] = post["beat"], now

    def forgive(self, pause_s: float) -> None:
        """Leaves out seconds in which nobody could be seen."""
        now = self._clock()
        self._seen = {index: min(now, seen + pause_s) for index, seen in self._seen.items()}

    def hear(self, post: dict[str, Any], number: int) -> bool:
        """Takes a post that another guard has sent; returns whether it is new."""
        index = post["process"]
        if number <= self._calls.get(index, number) or not self._take(post):
            return False
        self._calls[index], self._seen[index] = number, self._clock()
        return True

    def look(self, alone: bool = False) -> str | None:
        """Returns why the run must end, in words; None if it need not.

        Args:
          alone: the worker has ended, so that nothing comes from the store.
        """
        for status, verdict in (("failed", failure), ("stopped", lambda post: post["message"])):
            for _, post in sorted(self.posts.items()):
                if post["status"] == status:
                    return verdict(post)
        return next(filter(None, (self._silence(i, alone) for i in self._seen)), None)

    def unheard(self) -> list[tuple[str, int]]:
        """Returns the addresses of guards to ask now whether they are there.

        Each is asked once at the beginning, so that it is known whether its port is open, and then
        if its process is silent: a worker that holds Python's lock for long gives no sign of life.
        """
        due = []
        for index, post in self.posts.items():
            again = index not in self._greeted or self._is_quiet(index)
            if post["guard"] and not _ended(post) and again:
                due.append(tuple(post["guard"]))
            self._greeted.add(index)
        return due

    def addresses(self) -> list[tuple[str, int]]:
        """Returns where the guards of the others listen."""
        return [tuple(post["guard"]) for post in self.posts.values() if post["guard"]]

    def expected(self) -> bool:
        """Returns whether a guard that lives, and whose port is open, has yet to tell its end."""
        return any(
            not _ended(post) and self._calls[index] and not self._is_quiet(index)
            for index, post in self.posts.items()
        )

    def _is_quiet(self, index: int) -> bool:
        return self._clock() - self._seen[index] > self._us.dead_after_s / 2

    def _take(self, post: dict[str, Any]) -> bool:
        """Keeps a post of this start of the run, unless a later one is known."""
        index = post["process"]
        if post["attempt"] != self._us.attempt or index not in self._seen:
            return False
        known = self.posts.get(index)
        if known is None or _RANK[post["status"]] >= _RANK[known["status"]]:
            self.posts[index] = post
        return True

    def _silence(self, index: int, alone: bool) -> str | None:
        post, silent = self.posts.get(index), self._clock() - self._seen[index]
        if silent <= self._us.dead_after_s or (post and _ended(post)):
            return None
        if not self._proves(index, alone):
            return None
        if post is None:
            return (
                f"process {index} has given no sign of life for {silent:.0f} s: it died at the "
                "start"
            )
        return (
            f"{name(post)} is dead: no sign of life for {silent:.0f} s "
            f"(hosts.dead_after_s={self._us.dead_after_s:g}); it was last in {place(post)}"
        )

    def _proves(self, index: int, alone: bool) -> bool:
        """Returns whether the silence of a process proves anything.

        It does if the store answers, or if its guard has been heard before and no longer answers.
        The store is in process 0: if that does not answer, process 0 is what is gone, and nothing
        is known of the others.
        """
        if self._calls[index]:
            return True
        answers = not alone and self._clock() - self._read <= 3 * BEAT_S
        return answers or (index == 0 and (alone or self._asked > self._read))


def name(post: dict[str, Any]) -> str:
    """Names the process of a post."""
    return f"process {post['process']} (host {post['host']}, pid {post['pid']})"


def place(post: dict[str, Any]) -> str:
    """Says what the process was doing."""
    return f"phase {post['phase']} of step {post['step']}"


def failure(post: dict[str, Any]) -> str:
    """Says which process failed, where and why."""
    return f"{name(post)} failed in {place(post)}: {post['message']}"


def next_start(checkpoints: str | os.PathLike) -> str:
    """Says what the same command would do next.

    Args:
      checkpoints: their folder, or the address of a bucket, which is not looked into.
    """
    what = "continues from its last checkpoint, if it has one"
    if "://" not in str(checkpoints):
        steps = [int(p.name) for p in pathlib.Path(checkpoints).glob("*") if p.name.isdigit()]
        what = f"continues from checkpoint step {max(steps)}" if steps else "starts over"
    return f"the same command, run again on all processes, {what}"


def _ended(post):
    return _RANK[post["status"]] > 1
