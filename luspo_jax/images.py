"""Images for the vision tower: settings of the image processor, decoding in processes, a cache.

A file is decoded by a worker process with a time limit and a memory limit, so that a damaged or
hostile one is refused by name and costs the run nothing else. See `luspo_jax.datasets.pixels` for
the arithmetic and the reasons of refusals.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import queue
import selectors
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax.datasets.images import StoredImage
from luspo_jax.datasets.pixel_worker import ALARMS, answer
from luspo_jax.datasets.pixels import REASONS, ImageError, Patching
from luspo_jax.hosts import files
from luspo_jax.rewards.worker import WALL_FACTOR, read_frame, write_frame

_GRACE = 5.0  # seconds past the limit after which a silent worker is killed from outside
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
_READ = (
    *("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels", "size"),
    *("resample", "rescale_factor", "image_mean", "image_std", "do_normalize", "do_rescale"),
)
_MUST_BE_TRUE = ("do_resize", "do_convert_rgb")  # otherwise images fit no patches, or no channels
_NAMES_ONLY = ("image_processor_type", "processor_class", "feature_extractor_type")


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """What an image goes through; hashable.

    Attributes:
      patching: size limits, patches, and whether every image is blanked.
      temporal_patch_size: frames of a patch; a still image fills them all.
      rescale_factor, mean, std: of the values, (u · rescale_factor − mean) / std in float32.
      text_blank: (height, width) of a white image that each problem without images is given, as
        in the ablation of arXiv:2602.05261 §5.4; None for none.
    """

    patching: Patching = dataclasses.field(default_factory=Patching)
    temporal_patch_size: int = 2
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    text_blank: tuple[int, int] | None = None

    def __post_init__(self):
        low, high = self.patching.min_pixels, self.patching.max_pixels
        if not 0 < low <= high:
            raise ValueError(f"min_pixels={low} must be positive and at most max_pixels={high}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"image_mean={self.mean} and image_std={self.std} must be of 3 colours"
            )
        if self.text_blank is not None and min(self.text_blank) < 1:
            raise ValueError(f"text_blank={self.text_blank} must be a height and a width in pixels")

    @property
    def hash(self) -> str:
        """Sixteen hex digits that change with anything that changes a patch."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def read_settings(
    folder: str | pathlib.Path,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    blank: bool = False,
    text_blank: tuple[int, int] | None = None,
    **limits,
) -> ImageSettings:
    """The settings in `preprocessor_config.json` of a model's folder.

    Args:
      folder: the model's.
      min_pixels, max_pixels: in place of the file's.
      blank, text_blank: as in `Patching` and `ImageSettings`.
      **limits: other fields of `Patching`, in place of the file's.

    Raises:
      FileNotFoundError: the folder has no such file.
      ValueError: another processor, or a field that is unknown or has a value that is not read.
    """
    path = pathlib.Path(folder) / "preprocessor_config.json"
    nested = path.with_name("processor_config.json")  # as transformers 5 writes it
    if path.is_file():
        values = json.loads(path.read_text())
    elif nested.is_file():
        path, values = nested, json.loads(nested.read_text()).get("image_processor") or {}
    else:
        raise FileNotFoundError(
            f"{path} does not exist: a model that reads images needs its image processor's settings"
        )
    _check_fields(values, path)
    size = values.get("size") or {}
    patching = {
        "patch_size": values.get("patch_size"),
        "merge_size": values.get("merge_size"),
        "resample": values.get("resample"),
        "min_pixels": _first(min_pixels, values.get("min_pixels"), size.get("shortest_edge")),
        "max_pixels": _first(max_pixels, values.get("max_pixels"), size.get("longest_edge")),
        "blank": blank,
        **limits,
    }
    return ImageSettings(
        Patching(**{name: value for name, value in patching.items() if value is not None}),
        text_blank=text_blank,
        **_values(values),
    )


def _first(*values):
    return next((value for value in values if value is not None), None)


def _check_fields(values: Mapping[str, Any], path: pathlib.Path) -> None:
    kind = values.get("image_processor_type", _PROCESSORS[0])
    if kind not in _PROCESSORS:
        raise ValueError(
            f"{path}: image_processor_type {kind!r} is not read; known: {', '.join(_PROCESSORS)}"
        )
    for name in _MUST_BE_TRUE:
        if values.get(name) is False:
            raise ValueError(f"{path}: {name}=false is not supported: leave it out")
    known = {*_READ, *_MUST_BE_TRUE, *_NAMES_ONLY}
    strange = sorted(k for k, v in values.items() if k not in known and v is not None)
    sizes = sorted({*(values.get("size") or {})} - {"shortest_edge", "longest_edge"})
    if strange or sizes:
        raise ValueError(f"{path}: fields that are not read: {', '.join([*strange, *sizes])}")


def _values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ImageSettings that say what becomes of a value."""
    found: dict[str, Any] = {}
    if values.get("temporal_patch_size") is not None:
        found["temporal_patch_size"] = values["temporal_patch_size"]
    if values.get("do_rescale") is False:
        found["rescale_factor"] = 1.0
    elif values.get("rescale_factor") is not None:
        found["rescale_factor"] = values["rescale_factor"]
    if values.get("do_normalize") is False:
        return found | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for name in ("mean", "std"):
        if values.get(f"image_{name}") is not None:
            found[name] = tuple(values[f"image_{name}"])
    return found


@functools.lru_cache(maxsize=8)
def value_table(settings: ImageSettings) -> np.ndarray:
    """float32 [3, 256]: what each uint8 value of each colour becomes, rounded as NumPy does it."""
    scaled = (np.arange(256, dtype=np.uint8) * settings.rescale_factor).astype(np.float32)
    mean, std = (np.array(x, np.float32)[:, None] for x in (settings.mean, settings.std))
    table = ((scaled - mean) / std).astype(np.float32)
    table.setflags(write=False)  # cached, hence shared
    return table


def write_limits(folder: str | pathlib.Path, *, min_pixels: int = 0, max_pixels: int = 0) -> None:
    """Sets size limits in the settings of a model's folder; 0 leaves one as it is."""
    edges = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = pathlib.Path(folder) / name
        if not path.is_file() or not any(edges.values()):
            continue
        stored = json.loads(path.read_text())
        values = stored if name.startswith("pre") else stored.get("image_processor") or {}
        for field, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if edges[edge]:
                values[field] = edges[edge]
                if edge in (values.get("size") or {}):
                    values["size"][edge] = edges[edge]
        files.write_text(path, json.dumps(stored, indent=2) + "\n")


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the vision tower takes it.

    Attributes:
      pixels: uint8 [n, 3, patch, patch], the patches in the processor's order.
      grid_thw: (1, rows, columns) of patches.
      sha: of content and settings: two images with one sha have the same patches.
      settings: what was done to it.
    """

    pixels: np.ndarray
    grid_thw: tuple[int, int, int]
    sha: str
    settings: ImageSettings

    @property
    def num_tokens(self) -> int:
        """Tokens that stand for it in a prompt: its patches / merge_size²."""
        return len(self.pixels) // self.settings.patching.merge_size**2

    def patches(self) -> np.ndarray:
        """float32 [n, 3 · temporal · patch · patch], the processor's `pixel_values`."""
        table, frames = value_table(self.settings), self.settings.temporal_patch_size
        colours = [table[c][self.pixels[:, c]] for c in range(3)]
        stacked = np.stack(colours, axis=1)[:, :, None]
        shape = (*stacked.shape[:2], frames, *stacked.shape[3:])
        return np.broadcast_to(stacked, shape).reshape(len(self.pixels), -1)


@dataclasses.dataclass(frozen=True)
class ImageRefusal:
    """An image that was refused.

    Attributes:
      reason: a key of `luspo_jax.datasets.pixels.REASONS`.
      place: file and row.
      detail: what was found.
    """

    reason: str
    place: str
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: image refused as {self.reason} ({self.detail})"


class ImagePreparer:
    """Prepares images: reads, decodes in worker processes, keeps the latest.

    Args:
      settings: what images go through.
      workers: processes that decode; by default one a core, at most 8.
      time_limit: seconds of processor time for one image; by the clock, three times as long.
      memory_limit: bytes of address space a worker may use; None for no limit.
      cache_bytes: bytes of patches kept in memory, the latest used.

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
        self._pool = _Pool((settings.patching, time_limit, memory_limit), size)
        self._cache = _Cache(cache_bytes)

    def prepare(self, images: Sequence[StoredImage]) -> list[PreparedImage | ImageRefusal]:
        """Each image prepared or refused, in order; nothing that a file holds raises."""
        results = list(self._pool.map(self._one, images))
        for image in results:
            if isinstance(image, ImageRefusal):
                self.refused[image.reason] += 1
        return results

    def of_problems(
        self, problems: Sequence[Sequence[StoredImage]]
    ) -> list[tuple[PreparedImage, ...] | ImageRefusal]:
        """The images of each problem, or the first refusal among them.

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
            # Pixels that this program drew need no protection from their file.
            local = isinstance(data, np.ndarray)
            found = answer(data, self.settings.patching) if local else self._pool.ask(data)
            self._cache.put(sha, found)
        if found[0] == "refused":
            return ImageRefusal(found[1], image.place, found[2])
        return PreparedImage(found[1], found[2], sha, self.settings)

    def close(self) -> None:
        """End the worker processes; the next image would start new ones."""
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
    """Answers of workers by sha, the latest used, up to a number of bytes of patches."""

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
        # What failed for want of time or memory may succeed the next time.
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


class _Pool:
    """Threads that read files and caches, and the processes that decode for them."""

    def __init__(self, settings: tuple, size: int):
        self._settings, self._size = settings, size
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(size):
            self._idle.put(None)

    def map(self, function, items):
        """`function` of each item, in order."""
        if len(items) < 2 or self._size < 2:
            return map(function, items)
        with concurrent.futures.ThreadPoolExecutor(self._size) as threads:
            return list(threads.map(function, items))

    def ask(self, data: bytes) -> tuple:
        """The answer to a file's bytes, as `pixel_worker.answer`."""
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive():
                worker = _Worker(*self._settings)
            return worker.ask(data)
        finally:
            self._idle.put(worker if worker is not None and worker.alive() else None)

    def close(self) -> None:
        """End every worker."""
        for _ in range(self._size):
            worker = self._idle.get()
            if worker is not None:
                worker.end()
            self._idle.put(None)


class _Worker:
    """One worker process."""

    def __init__(self, patching: Patching, time_limit: float, memory_limit: int | None):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)
        }
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-c"),
                "from luspo_jax.datasets.pixel_worker import main; main()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C does not reach it: it ends with its input
        )
        self._limit = time_limit
        self.end = weakref.finalize(self, _kill, self._process)
        write_frame(self._process.stdin.fileno(), (patching, time_limit, memory_limit))

    def alive(self) -> bool:
        """Whether it can take an image."""
        return self._process.poll() is None

    def ask(self, data: bytes) -> tuple:
        """Its answer; it is ended where it gives none."""
        wait = WALL_FACTOR * self._limit + _GRACE
        try:
            write_frame(self._process.stdin.fileno(), data)
            if self._answers_within(wait):
                return read_frame(self._process.stdout.fileno())
        except (EOFError, OSError):
            code = self._process.wait()
            self.end()
            if -code in ALARMS:
                return ("refused", "timeout", f"stopped at its limit of {self._limit:g} s")
            return ("refused", "crashed", f"the process that decoded it ended with code {code}")
        except BaseException:
            self.end()  # it may hold an answer that nobody will take
            raise
        self.end()
        return ("refused", "timeout", f"killed: no answer within {wait:g} s")

    def _answers_within(self, seconds: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return bool(selector.select(seconds))


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()


__all__ = [
    "REASONS",
    "ImagePreparer",
    "ImageRefusal",
    "ImageSettings",
    "PreparedImage",
    "read_settings",
    "value_table",
]
