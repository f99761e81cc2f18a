"""Watches the processes of a run on several hosts, and names the one that ended it.

Each process of such a run is a pair: a guard, and the worker that it started. The guard never
imports jax. It writes the worker's heartbeat file `processes/<i>.json`, reads those of the others,
and ends its worker when another one fails or shows no sign of life.

A thread inside the worker could not do this: when the host of process 0 dies, jax aborts every
other process within a tenth of a second, and a broken collective may end the process too. The guard
survives and names the cause.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from luspo_jax.hosts import files

BEAT_S = 2.0  # between two writes of a heartbeat file, and two looks at the others'
_VARIABLE = "LUSPO_JAX_GUARD"  # descriptor of the channel between guard and worker
_NEWS_S = 0.5  # until a new phase is in the file
_TICK_S = 0.25  # between two looks at its worker
MEETING = "meeting"  # phase in which a process waits for others that do something else
_GRACE_S = 5.0  # added to limits of processes that only wait, so that the cause is named first
PREEMPTED = 128 + signal.SIGTERM  # exit status of a run that was asked to end and saved itself
# Beginnings of jax runtime errors.
_STATUS = re.compile(
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)


class Preempted(BaseException):
    """The run was asked to end, and has saved itself; no `except Exception` holds it up."""


@dataclasses.dataclass(frozen=True)
class Membership:
    """What a worker tells its guard once it knows its place in the run.

    Attributes:
      folder: of the heartbeat files; on storage that all processes share.
      checkpoints: folder of the checkpoints, to say where a run resumes.
      index, count: this process, and the number of processes.
      attempt: identifies this start of the run, the same on all processes; heartbeat files of
        earlier starts are ignored.
      dead_after_s: seconds without a new beat after which a process counts as dead.
      phase_timeout_s: the longest time that a phase may take; 0 for no limit.
    """

    folder: str
    checkpoints: str
    index: int
    count: int
    attempt: str
    dead_after_s: float
    phase_timeout_s: float


# --- In the worker: messages to the guard. Without a guard they do nothing. -----------------------

_guard: socket.socket | None = None
_here = {"phase": "start", "step": 0}


def join(membership: Membership) -> None:
    """Starts the watch: from now on this process and the others watch each other."""
    _tell(join=dataclasses.asdict(membership))


def may_be_aborted(message: str) -> None:
    """Sets the message for an abort of this process between now and joining.

    jax raises no error when processes fail to meet: it aborts the process.
    """
    _tell(note=message)


def at_step(step: int) -> None:
    """Reports the current rollout step, counted from 1."""
    _here["step"] = step
    _tell(step=step)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks what this process is doing; an inner phase interrupts the outer one.

    Threads beside the main one mark nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _here["phase"] = _here["phase"], name
    _tell(phase=name)
    yield
    # Only if nothing was raised: after a failure, the failed phase is of interest.
    _here["phase"] = outer
    _tell(phase=outer)


def failed(error: BaseException, message: str) -> None:
    """Reports why this process is about to end.

    An error of a collective mostly means that another process has died: the guard then waits until
    that process is named.
    """
    _tell(status="broken" if _is_collective(error) else "failed", message=message)


def guarded() -> bool:
    """Returns whether this process is a worker, or was started to be one."""
    return _guard is not None or _VARIABLE in os.environ


def work(main: Callable[[], int]) -> NoReturn:
    """Runs `main` in the worker, tells the guard how it ended, and exits."""
    global _guard
    _guard = socket.socket(fileno=int(os.environ.pop(_VARIABLE)))
    _guard.set_inheritable(False)
    # The guard sends nothing: the channel becomes readable when the guard is gone.
    threading.Thread(target=_end_with_guard, args=(_guard,), daemon=True).start()
    status = 1
    try:
        status = main()
        if status == 0:
            _tell(status="done")
    except BaseException as error:
        traceback.print_exc()
        failed(error, f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # jax would wait at exit for processes that may be dead


def watch(command: Sequence[str]) -> int:
    """Starts `command`, which calls `work`, and watches it until it ends.

    Returns:
      Its exit status, or 1 if it was ended because of another process.
    """
    here, there = socket.socketpair()
    worker = subprocess.Popen(
        command,
        env=os.environ | {_VARIABLE: str(there.fileno())},
        pass_fds=(there.fileno(),),
    )
    there.close()
    return _Guard(worker, here).watch()


def _end_with_guard(channel: socket.socket) -> None:
    with contextlib.suppress(OSError):
        channel.recv(1)
    os._exit(1)


def _tell(**news: Any) -> None:
    if _guard is not None:
        with contextlib.suppress(OSError):
            _guard.sendall(json.dumps(news).encode() + b"\n")


def _is_collective(error: BaseException | None) -> bool:
    """Returns whether an error or its cause comes from the runtime that connects processes."""
    while error is not None:
        # A broken collective raises either of these, at whichever line waits for it.
        runtime = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
        if (runtime or _STATUS.match(str(error))) and "RESOURCE_EXHAUSTED" not in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- In the guard. --------------------------------------------------------------------------------


class Peers:
    """The heartbeat files of the other processes, and the time of their last change.

    Beats are compared with one another and timed by this process's own clock: clocks of different
    hosts are never compared.
    """

    def __init__(self, membership: Membership, clock: Callable[[], float] = time.monotonic):
        self._us, self._clock = membership, clock
        now = clock()
        others = [i for i in range(membership.count) if i != membership.index]
        self._seen: dict[int, tuple[Any, float]] = {i: (None, now) for i in others}
        self._last: dict[int, dict[str, Any]] = {}

    def look(self, trust_silence: bool = True) -> str | None:
        """Returns why the run must end, in words; None if it need not.

        Silence proves nothing if this process cannot write to the folder either.
        """
        for index in self._seen:
            self._read(index)
        for status, verdict in (("failed", _failure), ("stopped", lambda post: post["message"])):
            for post in self._last.values():
                if post["status"] == status:
                    return verdict(post)
        silent = filter(None, map(self._silence, self._seen))
        return next(silent, None) if trust_silence else None

    def _read(self, index: int) -> None:
        post = read_post(pathlib.Path(self._us.folder) / f"{index}.json")
        if post is None or post.get("attempt") != self._us.attempt:
            return
        self._last[index] = post
        if post["beat"] != self._seen[index][0]:
            self._seen[index] = (post["beat"], self._clock())

    def _silence(self, index: int) -> str | None:
        post, silent = self._last.get(index), self._clock() - self._seen[index][1]
        if silent <= self._us.dead_after_s or (post and post["status"] in ("done", "preempted")):
            return None
        if post is None:
            return (
                f"process {index} has given no sign of life in {self._us.folder} for {silent:.0f} "
                "s: it died at the start, or the workdir is not on storage that all processes share"
            )
        return (
            f"{name(post)} is dead: no sign of life for {silent:.0f} s "
            f"(hosts.dead_after_s={self._us.dead_after_s:g}); it was last in {place(post)}"
        )


def read_post(path: pathlib.Path) -> dict[str, Any] | None:
    """Reads a heartbeat file; None if there is none or it is unreadable."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def name(post: dict[str, Any]) -> str:
    """Names the process of a heartbeat file."""
    return f"process {post['process']} (host {post['host']}, pid {post['pid']})"


def place(post: dict[str, Any]) -> str:
    """Says what the process was doing."""
    return f"phase {post['phase']} of step {post['step']}"


def _failure(post):
    return f"{name(post)} failed in {place(post)}: {post['message']}"


def next_start(checkpoints: str | os.PathLike) -> str:
    """Says what the same command would do next."""
    folder = pathlib.Path(checkpoints)
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    what = f"continues from checkpoint step {max(steps)}" if steps else "starts over"
    return f"the same command, run again on all processes, {what}"


class _Guard:
    """The parent of one worker."""

    def __init__(self, worker: subprocess.Popen, channel: socket.socket):
        self._worker, self._channel = worker, channel
        self._membership: Membership | None = None
        self._peers: Peers | None = None
        self._post = {
            "process": None, "host": socket.gethostname(), "pid": worker.pid, "attempt": "",
            "phase": "start", "phase_s": 0.0, "step": 0, "beat": 0,
            "status": "running", "message": "",
        }  # fmt: skip
        self._phase_since, self._next_look = time.monotonic(), 0.0
        self._last_write = self._next_write = 0.0
        self._exit: int | None = None  # of the worker; −n if signal n ended it
        self._wait_until: float | None = None  # deadline for another process to be named
        self._muted = False  # the heartbeat file could not be written
        self._signal: int | None = None
        self._note = ""  # what an abort before joining means
        self._buffer, self._told = b"", True  # the worker's messages, and whether more may come

    def watch(self) -> int:
        """Watches until the worker has ended or was ended; returns the exit status."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the worker as well
        signal.signal(signal.SIGTERM, self._forward)
        self._channel.setblocking(False)
        status = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            while status is None:
                if self._told:
                    selector.select(_TICK_S)
                    self._listen()
                else:
                    time.sleep(_TICK_S)
                status = self._turn()
        return status

    def _listen(self) -> None:
        """Handles all messages of the worker so far."""
        while self._told:
            try:
                received = self._channel.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                received = b""
            self._told = bool(received)
            self._buffer += received
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            news = json.loads(line)
            if "join" in news:
                self._join(Membership(**news.pop("join")))
            if "phase" in news:
                self._phase_since = time.monotonic()
            self._note = news.pop("note", self._note)
            self._post.update(news)
            self._next_write = min(self._next_write, self._last_write + _NEWS_S)

    def _join(self, membership: Membership) -> None:
        self._membership, self._peers = membership, Peers(membership)
        self._post |= {"process": membership.index, "attempt": membership.attempt}

    def _turn(self) -> int | None:
        """Checks the worker and, now and then, the others; an exit status ends the watch."""
        if self._exit is None:
            self._exit = self._worker.poll()
            if self._exit is not None:
                self._listen()
                return self._after_exit()
        now = time.monotonic()
        if now >= self._next_write:
            self._write()
        if now < self._next_look:
            return None
        self._next_look = now + BEAT_S
        cause = (self._peers.look(not self._muted) if self._peers else None) or self._hang(now)
        if cause is not None:
            return self._stop(cause)
        if self._wait_until is not None and now > self._wait_until:
            return self._give_up()
        return None

    def _after_exit(self) -> int | None:
        """Handles a worker that ended by itself."""
        if self._exit == 0:
            self._finish("done", "")
            return 0
        if self._exit == PREEMPTED:
            self._finish("preempted", "asked to end, and saved")
            return PREEMPTED
        if self._post["status"] == "running":
            aborted = self._exit == -signal.SIGABRT  # mostly by jax, because process 0 is gone
            self._post |= {
                "status": "broken" if aborted else "failed",
                "message": _ending(self._exit, self._signal),
            }
            if not aborted:
                self._say(_failure(self._named()))
        if self._post["status"] == "failed" or self._peers is None:
            return self._give_up()
        self._wait_until = time.monotonic() + self._membership.dead_after_s + _GRACE_S
        self._next_look = 0.0
        return None

    def _give_up(self) -> int:
        """Ends the watch when no other process is the cause."""
        if self._post["status"] == "broken":
            self._say(self._note if self._note and not self._peers else _failure(self._named()))
        self._finish("failed", self._post["message"])
        return self._exit if self._exit > 0 else 128 - self._exit

    def _hang(self, now: float) -> str | None:
        limit = self._membership.phase_timeout_s if self._membership else 0
        seconds = now - self._phase_since
        waits = self._post["phase"] in ("gather", "checkpoint", "export", "wait")
        if self._post["phase"] == MEETING:  # however long: each phase of the others has a limit
            return None
        if not limit or self._exit is not None or seconds <= limit + (_GRACE_S if waits else 0):
            return None
        return (
            f"{name(self._post)} hangs in {place(self._post)}: for {seconds:.0f} s, and "
            f"hosts.phase_timeout_s={limit:g}"
        )

    def _stop(self, cause: str) -> int:
        """Ends the worker, because another one failed or it hangs."""
        self._say(cause)
        self._finish("stopped", cause)
        if self._exit is None:
            # Only this ends a worker that is stuck in a collective. Its reward workers see their
            # input close, and end.
            self._worker.kill()
            self._worker.wait()
        return 1

    def _finish(self, status: str, message: str) -> None:
        self._post |= {"status": status, "message": message}
        self._write()

    def _named(self) -> dict[str, Any]:
        index = self._post["process"]
        return self._post | {"process": "that has not joined yet" if index is None else index}

    def _say(self, cause: str) -> None:
        where = f"; {next_start(self._membership.checkpoints)}" if self._membership else ""
        sys.stderr.write(f"{cause}{where}\n")
        sys.stderr.flush()

    def _forward(self, number: int, _frame: Any) -> None:
        self._signal = number
        self._worker.send_signal(number)

    def _write(self) -> None:
        """Writes the heartbeat file, whole or not at all; the worker reports a full disk."""
        self._last_write = time.monotonic()
        self._next_write = self._last_write + BEAT_S
        if self._membership is None:
            return
        self._post["beat"] += 1
        self._post["phase_s"] = round(time.monotonic() - self._phase_since, 1)
        path = pathlib.Path(self._membership.folder) / f"{self._membership.index}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps(self._post) + "\n", durable=False)
            self._muted = False
        except OSError:
            self._muted = True


def _ending(code: int, forwarded: int | None) -> str:
    """Says how a process ended that could not report it."""
    if code > 0:
        return f"it ended with exit status {code}"
    signals = {
        signal.SIGKILL: "by hand, by a scheduler, or because the host ran out of memory",
        signal.SIGABRT: "by a library that gave up; its log says more",
        signal.SIGTERM: "by a scheduler or by hand",
    }
    why = signals.get(-code, "its log may say more")
    received = ", which its guard received" if forwarded == -code else ""
    return f"killed by {signal.Signals(-code).name} ({why}){received}"
