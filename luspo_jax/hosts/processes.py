"""Several processes, usually one a host, that run one program on one stream of data.

Every process does the same on the host, and samples and scores only its own share of a step's
prompts. Shares are contiguous, so that what is gathered stands in the order of a run of one
process, and everything computed from it is computed alike everywhere. Process 0 alone writes files.
"""

import collections
import hashlib
import os
import pathlib
import pickle
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from luspo_jax.hosts import guard

_GATHERED_BYTES = 1 << 27  # at once, from all processes together
_VISIBLE_AFTER_S = 60.0  # that a file written by another host may take to appear


class ClusterError(RuntimeError):
    """The processes did not come together; the message says what to check."""


class AgreementError(RuntimeError):
    """Processes of one run that differ in what must be the same; names process, field, values."""


def initialize(arguments: Mapping[str, Any], *, dead_after_s: float, timeout_s: int = 300) -> None:
    """Brings the processes together; must come before any other use of jax.

    Args:
      arguments: coordinator_address, num_processes and process_id; empty to let jax find them out
        from a TPU pod, SLURM, Open MPI or Kubernetes.
      dead_after_s: after which a guard calls a process dead. jax has a heartbeat of its own,
        which ends processes without naming a cause: it is set to be slower.
      timeout_s: how long to wait for the others.

    Raises:
      ClusterError: they did not come together.
      AgreementError: their numbers of devices differ, which no collective could tell them.
    """
    # What is given is all that counts: no look at SLURM or at a cloud's metadata then.
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
    """Refuses processes that have different numbers of devices."""
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
    """This process in one line; the arguments are those of `initialize`."""
    how = f"coordinator {arguments['coordinator_address']}, by flags" if arguments else _detected()
    return (
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices "
        f"({jax.local_devices()[0].device_kind}); {how}"
    )


def _detected():
    """What jax went by; the order is that in which it looks."""
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
) -> None:
    """Brings the processes together and, where there is a workdir, under each other's watch.

    Raises:
      ClusterError, AgreementError: they did not come together, or share no workdir.
    """
    initialize(arguments, dead_after_s=dead_after_s)
    if workdir is None:
        return
    folder = pathlib.Path(workdir).absolute()
    attempt = gather(uuid.uuid4().hex)[0]
    check_shared(folder, attempt)  # before the watch: no heartbeat can be seen without it
    guard.join(
        guard.Membership(
            folder=str(folder / "processes"),
            checkpoints=str(folder / "checkpoints"),
            index=jax.process_index(),
            count=jax.process_count(),
            attempt=attempt,
            dead_after_s=dead_after_s,
            phase_timeout_s=phase_timeout_s,
        )
    )


def stop() -> None:
    """Leaves together with the others, at the end of a run."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def is_writer() -> bool:
    """Whether this process writes files and speaks on the console."""
    return jax.process_index() == 0


def share(count: int, index: int | None = None, num: int | None = None) -> slice:
    """The part of `count` things in a row that is this process's; sizes differ by one at most."""
    index = jax.process_index() if index is None else index
    num = jax.process_count() if num is None else num
    return slice(count * index // num, count * (index + 1) // num)


def gather(value: Any) -> list[Any]:
    """The `value` of every process, on every process, in their order; anything that pickles.

    With one process `[value]`, the same object. The bytes travel in parts of one size for all, a
    power of two, so that few programs are compiled and little device memory is taken.
    """
    num = jax.process_count()
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
    return np.asarray(multihost_utils.process_allgather(row))


def _pieces(size: int, num: int) -> list[tuple[int, int]]:
    """(start, width) of the parts in which `size` bytes of each of `num` processes travel."""
    largest = 1 << max(10, (_GATHERED_BYTES // num).bit_length() - 1)
    width = min(largest, 1 << max(10, (size - 1).bit_length()))
    return [(start_, width) for start_ in range(0, size, width)]


def gathered(rows: Sequence[Any]) -> list[Any]:
    """The rows of all processes' shares, one after the other."""
    return [row for part in gather(rows) for row in part]


def barrier(label: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        with guard.phase("wait"):
            multihost_utils.sync_global_devices(label)


def agree(facts: Mapping[str, Any]) -> None:
    """Compares facts that must be the same on all processes.

    Raises:
      AgreementError: on every process alike.
    """
    found = differences(gather(dict(facts)))
    if found:
        raise AgreementError("the processes of this run differ:\n" + "\n".join(found))


def differences(facts: Sequence[Mapping[str, Any]], most: int = 10) -> list[str]:
    """In what processes differ from process 0, a line each."""
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
    """Hash of every Python file under the folders, by its path from there."""
    return {
        f"source {pathlib.Path(folder).name}/{path.relative_to(folder)}": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()[:16]
        for folder in folders
        for path in sorted(pathlib.Path(folder).rglob("*.py"))
    }


def check_shared(folder: pathlib.Path, token: str) -> None:
    """Checks that all processes see what process 0 writes into a folder.

    Raises:
      AgreementError: on every process alike.
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
