"""Worker processes that decode: their limits, their deaths, their end."""

import os
import signal
import subprocess
import sys
import time

import psutil

from luspo_jax.images.pixels import Patching
from luspo_jax.images.pool import Worker
from luspo_jax.images.preparer import ImagePreparer, PreparedImage
from luspo_jax.images.settings import ImageSettings
from tests.images.image_cases import SETTINGS, WHOLE, encoded, gradient, stored, white_png


def test_an_image_over_its_limits_ends_its_worker_only():
    slow = white_png(9_900)  # a second of processor time
    with ImagePreparer(SETTINGS, workers=1, time_limit=0.25) as preparer:
        first, again = preparer.prepare([stored(slow), stored(slow)])
        # A machine that is busy with other things may miss the clock's limit, three times as long.
        tries = (preparer.prepare([stored(WHOLE)])[0] for _ in range(10))
        assert any(isinstance(image, PreparedImage) for image in tries)
    assert (first.reason, again.reason) == ("timeout", "timeout")
    assert "limit of 0.25 s" in first.detail
    large = ImageSettings(Patching(max_source_pixels=10**10))
    with ImagePreparer(large, workers=1, memory_limit=1 << 30) as preparer:
        first, second = preparer.prepare([stored(white_png(25_000)), stored(WHOLE)])
    assert first.reason == "memory"
    assert isinstance(second, PreparedImage)


def test_a_worker_that_dies_is_named_and_replaced():
    worker = Worker(Patching(), 5.0, None)
    os.kill(worker._process.pid, signal.SIGKILL)
    assert worker.ask(WHOLE) == (
        *("refused", "crashed"),
        "the process that decoded it ended with code -9",
    )
    assert not worker.alive()
    with ImagePreparer(SETTINGS, workers=1) as preparer:
        preparer.prepare([stored(WHOLE)])
        idle = preparer._pool._idle.get()
        preparer._pool._idle.put(idle)
        idle._process.kill()
        idle._process.wait(10)
        (found,) = preparer.prepare([stored(encoded(gradient(90, 60)))])
        assert isinstance(found, PreparedImage)


_PARENT = """
import time
from luspo_jax.images.pixels import Patching
from luspo_jax.images.pool import Worker
worker = Worker(Patching(), 5.0, None)
worker.ask(b"no image")
print(worker._process.pid, flush=True)
time.sleep(60)
"""


def test_workers_die_with_their_parent():
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_closing_ends_the_workers_and_the_next_image_starts_one():
    preparer = ImagePreparer(SETTINGS, workers=1)
    preparer.prepare([stored(WHOLE)])
    idle = preparer._pool._idle.get()
    preparer._pool._idle.put(idle)
    preparer.close()
    assert not psutil.pid_exists(idle._process.pid)
    (found,) = preparer.prepare([stored(encoded(gradient(61, 60)))])
    assert isinstance(found, PreparedImage)
    preparer.close()
