"""Prepares images for the vision tower: reads, decodes in processes, caches, refuses by name.

A worker process decodes each file under time and memory limits, so that a damaged or hostile file
is refused by name and costs the run nothing else. See `luspo_jax.images.pixels` for the arithmetic
and `luspo_jax.images.record` for the reasons of refusals.
"""

import collections
import dataclasses
import hashlib
import os
import threading
from collections.abc import Sequence

import numpy as np

from luspo_jax.images.pool import Pool
from luspo_jax.images.record import ImageError, StoredImage
from luspo_jax.images.settings import ImageSettings, value_table
from luspo_jax.images.worker import answer


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image in the form that the vision tower reads.

    Attributes:
      pixels: uint8 [n, 3, patch, patch], the patches in the processor's order.
      grid_thw: (1, rows, columns) of patches.
      sha: hash of content and settings; equal hashes mean equal patches.
      settings: how it was prepared.
    """

    pixels: np.ndarray
    grid_thw: tuple[int, int, int]
    sha: str
    settings: ImageSettings

    @property
    def num_tokens(self) -> int:
        """Number of its tokens in a prompt: its patches / merge_size²."""
        return len(self.pixels) // self.settings.patching.merge_size**2

    def patches(self) -> np.ndarray:
        """Returns float32 [n, 3 · temporal · patch · patch], the processor's `pixel_values`."""
        table, frames = value_table(self.settings), self.settings.temporal_patch_size
        colours = [table[c][self.pixels[:, c]] for c in range(3)]
        stacked = np.stack(colours, axis=1)[:, :, None]
        shape = (*stacked.shape[:2], frames, *stacked.shape[3:])
        return np.broadcast_to(stacked, shape).reshape(len(self.pixels), -1)


@dataclasses.dataclass(frozen=True)
class ImageRefusal:
    """An image that was refused.

    Attributes:
      reason: a key of `luspo_jax.images.record.REASONS`.
      place: file and row.
      detail: what was found.
    """

    reason: str
    place: str
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: image refused as {self.reason} ({self.detail})"


class ImagePreparer:
    """Prepares images: reads, decodes in worker processes, caches.

    Args:
      settings: of the preparation.
      workers: number of decoding processes; by default one per core, at most 8.
      time_limit: seconds of processor time per image; wall-clock time is limited to three times
        that.
      memory_limit: bytes of address space per worker; None for no limit.
      cache_bytes: bytes of patches kept in memory, most recently used.

    Attributes:
      settings: as given.
      refused: reason → number of images refused so far.
    """

    def __init__(
        self,
        settings: ImageSettings,
        *,
        workers: int | None = None,
        time_limit: float = 10.0,
        memory_limit: int | None = 4 << 30,
        cache_bytes: int = 256 << 20,
    ):
        self.settings = settings
        self.refused: collections.Counter[str] = collections.Counter()
        size = workers or min(8, os.cpu_count() or 1)
        self._pool = Pool((settings.patching, time_limit, memory_limit), size)
        self._cache = _Cache(cache_bytes)

    def prepare(self, images: Sequence[StoredImage]) -> list[PreparedImage | ImageRefusal]:
        """Prepares or refuses each image, in order; no file content makes it raise."""
        results = list(self._pool.map(self._one, images))
        for image in results:
            if isinstance(image, ImageRefusal):
                self.refused[image.reason] += 1
        return results

    def of_problems(
        self, problems: Sequence[Sequence[StoredImage]]
    ) -> list[tuple[PreparedImage, ...] | ImageRefusal]:
        """Returns the images of each problem, or the first refusal among them.

        A problem without images gets the white one of `settings.text_blank`, if that is set.
        """
        blank = self._text_blank()
        problems = [list(images) or blank for images in problems]
        flat = self.prepare([image for images in problems for image in images])
        found, start = [], 0
        for images in problems:
            own = flat[start : start + len(images)]
            start += len(images)
            refusals = [image for image in own if isinstance(image, ImageRefusal)]
            found.append(refusals[0] if refusals else tuple(own))
        return found

    def _text_blank(self) -> list[StoredImage]:
        if self.settings.text_blank is None:
            return []
        pixels = np.full((*self.settings.text_blank, 3), 255, np.uint8)
        return [StoredImage("text_blank", lambda: pixels)]

    def _one(self, image: StoredImage) -> PreparedImage | ImageRefusal:
        try:
            data = image.read()
        except ImageError as error:
            return ImageRefusal(error.reason, image.place, error.detail)
        sha = _sha(data, self.settings)
        found = self._cache.get(sha)
        if found is None:
            # Pixels drawn by this program need no isolated decoding.
            local = isinstance(data, np.ndarray)
            found = answer(data, self.settings.patching) if local else self._pool.ask(data)
            self._cache.put(sha, found)
        if found[0] == "refused":
            return ImageRefusal(found[1], image.place, found[2])
        return PreparedImage(found[1], found[2], sha, self.settings)

    def close(self) -> None:
        """Ends the worker processes; the next image would start new ones."""
        self._pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _sha(data: bytes | np.ndarray, settings: ImageSettings) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    if isinstance(data, np.ndarray):
        digest.update(f"{data.dtype} {data.shape}".encode())
        data = np.ascontiguousarray(data).tobytes()
    digest.update(data)
    return digest.hexdigest()


class _Cache:
    """Workers' answers by sha, most recently used, limited by the bytes of their patches."""

    def __init__(self, limit: int):
        self._limit, self._bytes = limit, 0
        self._answers: collections.OrderedDict[str, tuple] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, sha: str) -> tuple | None:
        with self._lock:
            if sha in self._answers:
                self._answers.move_to_end(sha)
            return self._answers.get(sha)

    def put(self, sha: str, found: tuple) -> None:
        # A failure from lack of time or memory may succeed next time.
        if found[0] == "refused" and found[1] in ("timeout", "memory", "crashed"):
            return
        with self._lock:
            if sha not in self._answers:
                self._answers[sha] = found
                self._bytes += _size(found)
            while self._bytes > self._limit and self._answers:
                self._bytes -= _size(self._answers.popitem(last=False)[1])


def _size(found: tuple) -> int:
    return found[1].nbytes if found[0] == "ok" else 1_000
