"""The process in which a verifier may hang, crash or fill memory without harm to the run.

The process reads its settings and then tasks from standard input, and answers each on standard
output. It imports the verifiers' dependencies once, then forks a child that does the scoring. When
a task exceeds its limit, the kernel ends the child (alarms keep their default action, which Python
code cannot catch, delay or swallow); the parent notes that and forks the next child, which costs
milliseconds. When the input closes, both end: nothing outlives the run by more than one task's
limit.
"""

import contextlib
import io
import os
import resource
import signal
import sys

from luspo_jax.hosts.workers import ALARMS, read_frame, set_alarms, write_frame
from luspo_jax.rewards.record import Sample, Verdict, Verifier, failed, run
from luspo_jax.rewards.registry import verifiers

_RECYCLE = 75  # exit code of a child that has done its share of tasks
_PRINTED = 10_000  # characters that a child may print


def _serve(tasks: int, verdicts: int, checks, settings) -> None:
    """Answers up to `recycle_after` tasks; disarms before each answer, kept small: see below."""
    own = os.getpid()
    for _ in range(settings["recycle_after"]):
        try:
            part, sample = read_frame(tasks)
        except EOFError:
            os._exit(0)
        set_alarms(settings["time_limit"])
        verdict = _verdict(checks[part], sample)
        if os.getpid() != own:
            os._exit(0)  # the verifier forked: its copy has no say
        # Disarmed before the answer goes out, so that a task has an answer or a death, never both.
        set_alarms(0)
        write_frame(verdicts, verdict)
    os._exit(_RECYCLE)


def _verdict(check: Verifier, sample: Sample) -> Verdict:
    """Returns the verdict; SystemExit and its like, which would end the process, become errors."""
    try:
        return run(check, sample)
    except BaseException as error:
        return failed(error)


class _Console(io.TextIOBase):
    """Standard output for verifiers: the console, up to `_PRINTED` characters."""

    def __init__(self):
        self._left = _PRINTED

    def write(self, text: str) -> int:
        if self._left > 0:
            shown = text[: self._left]
            self._left -= len(text)
            shown += "" if self._left > 0 else "\nreward worker: what it prints next is not shown\n"
            os.write(2, shown.encode(errors="replace"))
        return len(text)

    def fileno(self) -> int:
        return 2


def _child(tasks: int, verdicts: int, checks, settings) -> None:
    try:
        for alarm in ALARMS:
            signal.signal(alarm, signal.SIG_DFL)
        limit = settings["memory_limit"]
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.setrecursionlimit(4_000)
        sys.stdout = sys.stderr = _Console()
        _serve(tasks, verdicts, checks, settings)
    except BaseException as error:
        sys.stderr.write(f"reward worker: {type(error).__name__}: {error}\n")
    finally:
        os._exit(1)


def _warm_up(checks) -> None:
    """Scores once before forking, so that every child starts with the imports done."""
    for check in checks.values():
        if check.warm_up is not None:
            run(check, check.warm_up)


def main() -> None:
    """Forks children until the input closes or one dies of something other than its limit."""
    tasks, verdicts = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # a verifier's prints must not mix with the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = read_frame(tasks)
    try:
        checks = verifiers(dict.fromkeys(settings["parts"], 1.0), settings["options"])
        _warm_up(checks)
    except Exception as error:
        write_frame(verdicts, f"{type(error).__name__}: {error}")
        return
    write_frame(verdicts, None)
    while True:
        code = _fork_and_wait(tasks, verdicts, checks, settings)
        if -code in ALARMS:
            reason = f"stopped at its limit of {settings['time_limit']:g} s"
            write_frame(verdicts, Verdict(0.0, "timeout", detail=reason))
        elif code != _RECYCLE:
            sys.exit(abs(code))


def _fork_and_wait(tasks: int, verdicts: int, checks, settings) -> int:
    """Forks a child and returns its exit code; SIGTERM ends the child too and leaves no zombie."""
    # Blocked until the child's id is known.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)  # its descendants end with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _child(tasks, verdicts, checks, settings)

    def end(*_) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # just reaped
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        _kill_group(pid)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    status = os.waitpid(pid, 0)[1]
    _kill_group(pid)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return os.waitstatus_to_exitcode(status)


def _kill_group(pid: int) -> None:
    """Kills the processes that a child has left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
