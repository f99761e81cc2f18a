"""Watches the processes of a run on several hosts, and names the one that ended it.

Each process of such a run is a pair: a guard, and the worker that it started. The worker posts its
phase and step in the store of `jax.distributed` and reads those of the others (`lifesigns`); the
guard judges them (`peers`), and ends its worker when another one fails or shows no sign of life.

A thread inside the worker could not do this: when the host of process 0 dies, jax aborts every
other process within a tenth of a second, and a broken collective may end the process too. The guard
never imports jax, survives, names the cause, and tells the other guards (`letters`) how a worker
ended that could not say so itself.
"""

import contextlib
import dataclasses
import json
import os
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

from luspo_jax.hosts import letters, lifesigns, peers
from luspo_jax.hosts.board import Board
from luspo_jax.hosts.peers import Membership, failure, name, next_start, place

_VARIABLE = "LUSPO_JAX_GUARD"  # descriptor of the channel between guard and worker, guard's port
_TICK_S = 0.25  # between two looks at its worker
MEETING = "meeting"  # phase in which a process waits for others that do something else
_GRACE_S = 5.0  # added to limits of processes that only wait, so that the cause is named first
_GOODBYE_S = 2.0  # at most, to tell other guards how it ended and to hear it of them
_LEAVE_S = 300.0  # at most, until all have come to the end of a run, as in jax
PREEMPTED = 128 + signal.SIGTERM  # exit status of a run that was asked to end and saved itself
# Beginnings of jax runtime errors.
_STATUS = re.compile(
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)


class Preempted(BaseException):
    """The run was asked to end, and has saved itself; no `except Exception` holds it up."""


# --- In the worker: messages to the guard. Without a guard they do nothing. -----------------------

_guard: socket.socket | None = None
_port = 0  # of the guard
_signs: lifesigns.Signs | None = None
_telling = threading.Lock()
_here = {"phase": "start", "step": 0}
_state = {"status": "running", "message": ""}
_since = time.monotonic()  # of the phase


def join(membership: Membership, store: lifesigns.TextStore) -> None:
    """Starts the watch: from now on this process and the others watch each other.

    Args:
      membership: its place in the run.
      store: where all processes post; see `luspo_jax.hosts.store`.
    """
    global _signs
    if _guard is None:
        return
    _tell(join=dataclasses.asdict(membership))
    known = {
        "process": membership.index,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "attempt": membership.attempt,
        "guard": (membership.host, _port),
    }

    def post():
        return known | _here | _state | {"phase_s": round(time.monotonic() - _since, 1)}

    _signs = lifesigns.Signs(store, membership.index, post, _tell)


def leave() -> None:
    """Ends the watch at the end of a run, together with the others."""
    if _signs is not None:
        _signs.leave(_LEAVE_S)


def may_be_aborted(message: str) -> None:
    """Sets the message for an abort of this process between now and joining.

    jax raises no error when processes fail to meet: it aborts the process.
    """
    _tell(note=message)


def at_step(step: int) -> None:
    """Reports the current rollout step, counted from 1."""
    _here["step"] = step
    _report(step=step)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks what this process is doing; an inner phase interrupts the outer one.

    Threads beside the main one mark nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = _here["phase"]
    _enter(name)
    yield
    # Only if nothing was raised: after a failure, the failed phase is of interest.
    _enter(outer)


def failed(error: BaseException, message: str) -> None:
    """Reports why this process is about to end.

    An error of a collective mostly means that another process has died: the guard then waits until
    that process is named.
    """
    _state["message"], _state["status"] = message, "broken" if _is_collective(error) else "failed"
    _tell(**_state)
    if _signs is not None:
        _signs.now()  # the store may end with this process


def guarded() -> bool:
    """Returns whether this process is a worker, or was started to be one."""
    return _guard is not None or _VARIABLE in os.environ


def work(main: Callable[[], int]) -> NoReturn:
    """Runs `main` in the worker, tells the guard how it ended, and exits."""
    global _guard, _port
    channel, _port = map(int, os.environ.pop(_VARIABLE).split(","))
    _guard = socket.socket(fileno=channel)
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
        try:
            if _signs is not None and _state["status"] == "broken":
                # Its signs of life, and on process 0 the store, last until the cause is found: the
                # guard ends this process then.
                threading.Event().wait()
        finally:
            os._exit(status)  # jax would wait at exit for processes that may be dead


def watch(command: Sequence[str]) -> int:
    """Starts `command`, which calls `work`, and watches it until it ends.

    Returns:
      Its exit status, or 1 if it was ended because of another process.
    """
    box, (here, there) = letters.Box(), socket.socketpair()
    worker = subprocess.Popen(
        command,
        env=os.environ | {_VARIABLE: f"{there.fileno()},{box.port}"},
        pass_fds=(there.fileno(),),
    )
    there.close()
    return _Guard(worker, here, box).watch()


def _end_with_guard(channel: socket.socket) -> None:
    with contextlib.suppress(OSError):
        channel.recv(1)
    os._exit(1)


def _enter(phase: str) -> None:
    global _since
    _here["phase"], _since = phase, time.monotonic()
    _report(phase=phase)


def _report(**news: Any) -> None:
    _tell(**news)
    if _signs is not None:
        _signs.hurry()


def _tell(**news: Any) -> None:
    if _guard is not None:
        with contextlib.suppress(OSError), _telling:
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


class _Guard:
    """The parent of one worker."""

    def __init__(self, worker: subprocess.Popen, channel: socket.socket, box: letters.Box):
        self._worker, self._channel, self._box = worker, channel, box
        self._membership: Membership | None = None
        self._peers: peers.Peers | None = None
        self._board: Board | None = None
        self._post = {
            "process": None, "host": socket.gethostname(), "pid": worker.pid, "attempt": "",
            "phase": "start", "phase_s": 0.0, "step": 0, "beat": 0,
            "status": "running", "message": "", "guard": None,
        }  # fmt: skip
        self._phase_since = time.monotonic()
        self._next_ask = self._next_show = 0.0
        self._turned = time.monotonic()
        self._num_sent = 0
        self._exit: int | None = None  # of the worker; −n if signal n ended it
        self._wait_until: float | None = None  # deadline for another process to be named
        self._left = False  # the run is over for all
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
                self._hear()
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
            self._take(json.loads(line))

    def _take(self, news: dict[str, Any]) -> None:
        if "join" in news:
            self._join(Membership(**news.pop("join")))
        if self._peers and news.pop("asks", False):
            self._peers.asks()
        if self._peers and "posts" in news:
            self._peers.read(news.pop("posts"))
        if "phase" in news:
            self._phase_since = time.monotonic()
        if news.get("status") == "broken" and self._peers:
            self._await_cause()
        self._note = news.pop("note", self._note)
        self._left = news.pop("left", self._left)
        self._post.update(news)

    def _join(self, membership: Membership) -> None:
        self._membership, self._peers = membership, peers.Peers(membership)
        self._post |= {
            "process": membership.index,
            "attempt": membership.attempt,
            "guard": (membership.host, self._box.port),
        }
        if membership.index == 0:
            self._board = Board(membership.folder)

    def _hear(self) -> None:
        """Handles what other guards have sent."""
        if self._peers is None:
            return
        for message in self._box.read(self._membership.secret):
            if self._peers.hear(message["post"], message["number"]) and message["asks"]:
                self._send([message["post"]["guard"]], within_s=0.0)

    def _turn(self) -> int | None:
        """Checks the worker and the others; an exit status ends the watch."""
        if self._exit is None:
            self._exit = self._worker.poll()
            if self._exit is not None:
                self._listen()
                return self._after_exit()
        now = time.monotonic()
        if self._peers and now - self._turned > 3 * peers.BEAT_S:
            self._peers.forgive(now - self._turned)  # this host slept and heard nobody
        self._turned = now
        self._show(now)
        cause = (None if self._left else self._judged(now)) or self._hang(now)
        if cause is not None:
            return self._stop(cause)
        if self._wait_until is not None and now > self._wait_until:
            return self._give_up()
        return None

    def _judged(self, now: float) -> str | None:
        """Returns why the others end this process; asks those that are silent, now and then."""
        if self._peers is None:
            return None
        if now >= self._next_ask:
            self._next_ask = now + peers.BEAT_S
            self._send(self._peers.unheard(), within_s=0.0, asks=True)
        return self._peers.look(alone=self._exit is not None)

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
                self._say(failure(self._named()))
        if self._post["status"] == "failed" or self._peers is None:
            return self._give_up()
        self._await_cause()
        return None

    def _await_cause(self) -> None:
        """Gives another process time to be named: a broken collective has its cause elsewhere."""
        if self._wait_until is None:
            self._wait_until = time.monotonic() + self._membership.dead_after_s + _GRACE_S

    def _give_up(self) -> int:
        """Ends the watch when no other process is the cause."""
        if self._post["status"] == "broken":
            self._say(self._note if self._note and not self._peers else failure(self._named()))
        self._finish("failed", self._post["message"])
        if self._exit is None:
            return 1
        return self._exit if self._exit > 0 else 128 - self._exit

    def _hang(self, now: float) -> str | None:
        limit = self._membership.phase_timeout_s if self._membership else 0
        seconds = now - self._phase_since
        waits = self._post["phase"] in ("gather", "checkpoint", "export", "wait")
        if self._post["phase"] == MEETING:  # however long: each phase of the others has a limit
            return None
        if not limit or self._wait_until or seconds <= limit + (_GRACE_S if waits else 0):
            return None
        return (
            f"{name(self._post)} hangs in {place(self._post)}: for {seconds:.0f} s, and "
            f"hosts.phase_timeout_s={limit:g}"
        )

    def _stop(self, cause: str) -> int:
        """Ends the worker, because another one failed or it hangs."""
        self._say(cause)
        self._finish("stopped", cause)
        return 1

    def _finish(self, status: str, message: str) -> None:
        """Tells all others how it ended, and ends the worker if it has not."""
        self._post |= {"status": status, "message": message}
        if self._exit is None:
            # Only this ends a worker that is stuck in a collective. Its reward workers see their
            # input close, and end.
            self._worker.kill()
            self._worker.wait()
        if self._peers is None:
            return
        until = time.monotonic() + _GOODBYE_S
        self._send(self._peers.addresses(), within_s=_GOODBYE_S / 2)
        if self._board:
            while self._peers.expected() and time.monotonic() < until:
                time.sleep(_TICK_S / 5)
                self._hear()
            if self._left:  # together: who cannot tell has ended like this one
                for post in self._peers.posts.values():
                    post["status"] = status if post["status"] == "running" else post["status"]
            self._show(time.monotonic(), at_once=True)
            self._board.finish(_GOODBYE_S)

    def _send(self, addresses: Sequence[Any], within_s: float, asks: bool = False) -> None:
        """Sends this process's post to other guards."""
        if addresses:
            self._num_sent += 1
            self._post["phase_s"] = round(time.monotonic() - self._phase_since, 1)
            message = {"number": self._num_sent, "asks": asks, "post": self._post}
            letters.send(
                addresses, letters.sealed(message, self._membership.secret), within_s=within_s
            )

    def _show(self, now: float, at_once: bool = False) -> None:
        """Has the posts of all processes written, on process 0."""
        if self._board and (at_once or now >= self._next_show):
            self._next_show = now + peers.BEAT_S
            self._post["beat"] += 1
            self._post["phase_s"] = round(now - self._phase_since, 1)
            self._board.show([self._post, *self._peers.posts.values()])

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
