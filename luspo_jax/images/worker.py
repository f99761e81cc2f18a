"""The process that decodes image files, so that a bad image can end nothing else.

It reads its settings and then images from standard input, and answers each on standard output. The
kernel ends it when an image exceeds its limit (alarms keep their default action). It ends when its
input closes, so it outlives the run by at most one image's limit.
"""

import os
import resource
import signal

import numpy as np
import PIL.Image

from luspo_jax.hosts.workers import read_frame, set_alarms, write_frame
from luspo_jax.images.pixels import Patching, prepared
from luspo_jax.images.record import ImageError


def answer(data: bytes | np.ndarray, patching: Patching) -> tuple:
    """Returns ("ok", patches, grid), or ("refused", reason, detail)."""
    try:
        return ("ok", *prepared(data, patching))
    except ImageError as error:
        return ("refused", error.reason, error.detail)
    except MemoryError:
        return ("refused", "memory", "resizing it ran out of memory")


def main() -> None:
    """Answers images until the input closes."""
    tasks, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # a decoder's prints must not mix with the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    PIL.Image.MAX_IMAGE_PIXELS = None  # sizes are checked against max_source_pixels
    patching, time_limit, memory_limit = read_frame(tasks)
    answer(np.zeros((56, 56, 3), np.uint8), patching)  # complete all imports before the first limit
    if memory_limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    while True:
        try:
            data = read_frame(tasks)
        except EOFError:
            return
        set_alarms(time_limit)
        found = answer(data, patching)
        # Disarmed before answering, so that each image gets either an answer or a death.
        set_alarms(0)
        write_frame(answers, found)
