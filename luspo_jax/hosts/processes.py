"""Several processes, usually one per host, that run one program on one stream of data.

Every process does the same host work, but samples and rewards only its own share of a step's
prompts. Gathered results are put in the order of a one-process run, and all processes compute the
same from them. Only process 0 writes files. If processes differ in what they do (`hosts.roles`),
all of this is meant of those that do the same, `members`.
"""

import collections
import contextlib
import contextvars
import functools
import hashlib
import os
import pathlib
import pickle
import secrets
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from luspo_jax import sharding
from luspo_jax.hosts import guard, letters, store

_members: contextvars.ContextVar[tuple[int, ...] | None] = contextvars.ContextVar("members")
_GATHERED_BYTES = 1 << 27  # per collective, over all processes
_VISIBLE_AFTER_S = 60.0  # time that a file written by another host may take to appear


class ClusterError(RuntimeError):
    """The processes did not meet; the message says what to check."""


class AgreementError(RuntimeError):
    """Processes of one run differ in what must be equal; names process, field and values."""


def initialize(arguments: Mapping[str, Any], *, dead_after_s: float, timeout_s: int = 300) -> None:
    """Connects the processes; must come before any other use of jax.

    Args:
      arguments: coordinator_address, num_processes and process_id; if empty, jax detects them from
        a TPU pod, SLURM, Open MPI or Kubernetes.
      dead_after_s: seconds after which a guard calls a process dead. jax's own heartbeat ends
        processes without naming a cause, so it is set to be slower.
      timeout_s: seconds to wait for the others.

    Raises:
      ClusterError: the processes did not meet.
      AgreementError: they have different numbers of devices, which no collective could report.
    """
    # Arguments replace detection: no query of SLURM or of a cloud's metadata.
    method = {"cluster_detection_method": "deactivate"} if arguments else {}
    guard.may_be_aborted(_not_joined(arguments, timeout_s, "jax gave up"))
    try:
        jax.distributed.initialize(
            **arguments,
            **method,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=max(100, int(4 * dead_after_s)),
        )
    except (RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ClusterError(_not_joined(arguments, timeout_s, first)) from None
    check_devices(collections.Counter(device.process_index for device in jax.devices()))


def check_devices(numbers: Mapping[int, int]) -> None:
    """Refuses processes with different numbers of devices."""
    if len(set(numbers.values())) > 1:
        listed = ", ".join(f"process {i} has {n}" for i, n in sorted(numbers.items()))
        raise AgreementError(f"all processes must have the same number of devices: {listed}")


def _not_joined(arguments, timeout_s, text):
    if not arguments:
        return (
            f"--distributed=auto could not start ({text}): where there is no TPU pod, SLURM, Open "
            "MPI or Kubernetes job, give --coordinator, --num_processes and --process_id"
        )
    index, num, place = (
        arguments[name] for name in ("process_id", "num_processes", "coordinator_address")
    )
    return (
        f"process {index} of {num} could not meet the others at {place} within {timeout_s} s "
        f"({text}): start all of them, check that the port of process 0 is free and can be "
        "reached, and that no two have the same --process_id"
    )


def describe(arguments: Mapping[str, Any]) -> str:
    """Describes this process in one line; the arguments are those of `initialize`."""
    how = f"coordinator {arguments['coordinator_address']}, by flags" if arguments else _detected()
    return (
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices "
        f"({jax.local_devices()[0].device_kind}); {how}"
    )


def _detected():
    """Says what jax detected, in jax's own order of detection."""
    marks = {
        "OMPI_MCA_orte_hnp_uri": "Open MPI",
        "SLURM_JOB_ID": "SLURM",
        "TPU_WORKER_HOSTNAMES": "a TPU pod",
        "KUBERNETES_SERVICE_HOST": "Kubernetes",
    }
    found = next((label for variable, label in marks.items() if variable in os.environ), None)
    return f"found through {found or 'a TPU pod'}"


def start(
    arguments: Mapping[str, Any],
    workdir: str | os.PathLike | None,
    *,
    dead_after_s: float,
    phase_timeout_s: float,
    shared: bool = True,
    checkpoints: str | None = None,
) -> None:
    """Connects the processes and, with a workdir, starts the mutual watch.

    Args:
      arguments: of `initialize`.
      workdir: process 0 writes `processes/*.json` there, for people to read; None watches nobody.
      dead_after_s, phase_timeout_s: of `guard.Membership`.
      shared: whether the workdir must be one folder for all processes, which is checked. The watch
        itself needs none.
      checkpoints: where they are, if not in the workdir; may be the address of a bucket.

    Raises:
      ClusterError, AgreementError: they did not meet, or do not share the workdir.
      StoreError: this jax does not let processes post signs of life.
    """
    initialize(arguments, dead_after_s=dead_after_s)
    if workdir is None:
        return
    folder = pathlib.Path(workdir).absolute()
    attempt, secret = gather((uuid.uuid4().hex, secrets.token_hex()))[0]
    if shared:
        check_shared(folder, attempt)
    guard.join(
        guard.Membership(
            folder=str(folder / "processes"),
            checkpoints=checkpoints or str(folder / "checkpoints"),
            index=jax.process_index(),
            count=jax.process_count(),
            attempt=attempt,
            secret=secret,
            host=letters.host_towards(store.coordinator()),
            dead_after_s=dead_after_s,
            phase_timeout_s=phase_timeout_s,
        ),
        store.Store(f"luspo_jax/{attempt}"),
    )


def stop() -> None:
    """Disconnects together with the others, at the end of a run."""
    if jax.distributed.is_initialized():
        guard.leave()
        jax.distributed.shutdown()


def is_writer() -> bool:
    """Returns whether this process writes files and prints to the console."""
    return jax.process_index() == 0


def everyone() -> tuple[int, ...]:
    """Returns the indices of all processes."""
    return tuple(range(jax.process_count()))


def members() -> tuple[int, ...]:
    """Returns the processes that share, gather and wait together: all, unless inside `among`."""
    return _members.get(None) or everyone()


@contextlib.contextmanager
def among(group: tuple[int, ...]) -> Iterator[None]:
    """Inside, `members` are these processes; each of them must come here, and no other."""
    token = _members.set(group)
    try:
        yield
    finally:
        _members.reset(token)


def share(count: int, index: int | None = None, num: int | None = None) -> slice:
    """Returns this process's slice of `count` things; sizes differ by at most one.

    They are dealt in turn, so that each gets its part of the old and of the new, or of the long and
    of the short, where things are in such an order. `merged` undoes it.
    """
    index = members().index(jax.process_index()) if index is None else index
    num = len(members()) if num is None else num
    return slice(index, count, num)


def merged(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Returns all members' shares put together again, in the order from which they were dealt.

    Raises:
      ValueError: parts of sizes that no deal gives.
    """
    whole = [None] * sum(map(len, parts))
    for index, part in enumerate(parts):
        whole[index :: len(parts)] = part
    return whole


def gather(value: Any) -> list[Any]:
    """Returns the `value` of every member, on every member, in their order; it must pickle.

    One process returns `[value]`, the same object. The bytes travel in parts of one size for all, a
    power of two, so that few programs are compiled and little device memory is used.
    """
    num = len(members())
    if num == 1:
        return [value]
    with guard.phase("gather"):
        return _gather(value, num)


def _gather(value, num):
    data = np.frombuffer(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL), np.uint8)
    length = np.array([len(data)], np.uint64).view(np.uint8)  # jax has no 64-bit integers here
    lengths = [int(row.view(np.uint64)[0]) for row in _all_rows(length)]
    parts: list[list[np.ndarray]] = [[] for _ in range(num)]
    for start_, width in _pieces(max(lengths), num):
        piece = np.zeros(width, np.uint8)
        own = data[start_ : start_ + width]
        piece[: len(own)] = own
        for index, row in enumerate(_all_rows(piece)):
            parts[index].append(row[: max(0, lengths[index] - start_)])
    return [pickle.loads(np.concatenate(part).tobytes()) for part in parts]


def _all_rows(row: np.ndarray) -> np.ndarray:
    group = members()
    return np.asarray(_whole(group)(sharding.stacked(row, group)).addressable_data(0))


@functools.cache
def _whole(group):
    return jax.jit(lambda x: x, out_shardings=sharding.across(group).sharding(()))


def _pieces(size: int, num: int) -> list[tuple[int, int]]:
    """Returns (start, width) of the parts in which each of `num` processes sends `size` bytes."""
    largest = 1 << max(10, (_GATHERED_BYTES // num).bit_length() - 1)
    width = min(largest, 1 << max(10, (size - 1).bit_length()))
    return [(start_, width) for start_ in range(0, size, width)]


def gathered(rows: Sequence[Any]) -> list[Any]:
    """Returns the rows of all members' shares, in the order from which they were dealt."""
    return merged(gather(rows))


def barrier(label: str, phase: str = "wait") -> None:
    """Waits until every member has reached this call.

    Args:
      label: of the call.
      phase: for the guard.

    Raises:
      AgreementError: they have reached different calls.
    """
    num = len(members())
    if num > 1:
        with guard.phase(phase):
            found = _gather(label, num)
        if len(set(found)) > 1:
            raise AgreementError(f"processes {members()} wait at different places: {found}")


def agree(facts: Mapping[str, Any]) -> None:
    """Checks that facts are equal on all members.

    Raises:
      AgreementError: on every one if they differ.
    """
    found = differences(gather(dict(facts)))
    if found:
        raise AgreementError("the processes of this run differ:\n" + "\n".join(found))


def differences(facts: Sequence[Mapping[str, Any]], most: int = 10) -> list[str]:
    """Lists in which facts processes differ from process 0, one per line."""
    lines = [
        f"  - process {index}: {name} is {theirs.get(name, 'absent')!r}, and "
        f"{facts[0].get(name, 'absent')!r} on process 0"
        for index, theirs in enumerate(facts)
        for name in sorted({*theirs, *facts[0]})
        if theirs.get(name, "absent") != facts[0].get(name, "absent")
    ]
    more = len(lines) - most
    return lines[:most] + ([f"  - and {more} more"] if more > 0 else [])


def source_hashes(*folders: str | os.PathLike) -> dict[str, str]:
    """Returns the hash of every Python file under the folders, by relative path."""
    return {
        f"source {pathlib.Path(folder).name}/{path.relative_to(folder)}": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()[:16]
        for folder in folders
        for path in sorted(pathlib.Path(folder).rglob("*.py"))
    }


def check_shared(folder: pathlib.Path, token: str) -> None:
    """Checks that all processes see a file that process 0 writes into a folder.

    Raises:
      AgreementError: on every process if one does not.
    """
    if jax.process_count() == 1:
        return
    mark, trouble = folder / f".shared-{token}", ""
    if is_writer():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            trouble = f"process 0 cannot write there: {error}"
    barrier("shared")
    until = time.monotonic() + _VISIBLE_AFTER_S
    while not mark.exists() and not trouble and time.monotonic() < until:
        time.sleep(0.2)
    blind = [str(index) for index, sees in enumerate(gather(mark.exists())) if not sees]
    trouble = gather(trouble)[0]
    if is_writer():
        mark.unlink(missing_ok=True)
    if blind or trouble:
        raise AgreementError(
            f"--workdir={folder} must be on storage that all processes share: "
            + (trouble or f"what process 0 wrote there is not seen by process {', '.join(blind)}")
        )
