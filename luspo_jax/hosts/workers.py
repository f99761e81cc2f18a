"""Shared by a worker process and its owner: frames through pipes, and the time limit of a task.

The kernel ends a worker whose alarm rings: alarms keep their default action, which no Python code
can catch, delay or swallow.
"""

import os
import pickle
import signal
import struct

ALARMS = (signal.SIGPROF, signal.SIGALRM)
WALL_FACTOR = 3  # wall-clock limit of a task, as a multiple of its limit
_HEADER = struct.Struct(">I")
_LARGEST = 1 << 28  # bytes of a frame; a longer one is not ours


def write_frame(descriptor: int, payload) -> None:
    """Sends one pickled object."""
    body = pickle.dumps(payload)
    view = memoryview(_HEADER.pack(len(body)) + body)
    while view:
        view = view[os.write(descriptor, view) :]


def read_frame(descriptor: int):
    """Reads the next object; EOFError if the other side has closed."""
    (size,) = _HEADER.unpack(_read_exactly(descriptor, _HEADER.size))
    if size > _LARGEST:
        raise ValueError(f"a frame of {size} bytes")
    return pickle.loads(_read_exactly(descriptor, size))


def _read_exactly(descriptor: int, size: int) -> bytes:
    chunks = []
    while size:
        chunk = os.read(descriptor, min(size, 1 << 20))
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def set_alarms(seconds: float) -> None:
    """Starts the time limit of a task; 0 clears it.

    The limit is on processor time, so that a busy machine decides as an idle one does. A sleeping
    task is stopped later, by the wall clock.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * seconds)
