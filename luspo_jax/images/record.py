"""Records of images that are not read yet, and ImageError with its reasons."""

import dataclasses
from collections.abc import Callable

import numpy as np

# Reason → what it covers.
REASONS = {
    "missing": "there is no such file, or no bytes in the cell",
    "empty": "no bytes, or a width or height of zero",
    "not_an_image": "no format that is read",
    "corrupt": "an image that breaks off or cannot be decoded",
    "huge": "a header that announces more pixels than `max_source_pixels`, or a file of more than "
    "1 GiB: nothing is decoded",
    "animated": "several frames",
    "video": "a video",
    "aspect_ratio": "one side more than 200 times the other",
    "mode": "pixels that have no agreed meaning as colours",
    "timeout": "stopped at the time limit",
    "memory": "more memory than a worker may use",
    "crashed": "the process that decoded it died",
    "misfit": "images that do not fit the model or the tokens of a prompt",
}


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image that is not read yet.

    Attributes:
      place: file and row in words.
      read: returns a file's bytes, or uint8 pixels [height, width, 3]; raises ImageError, "missing"
        or "huge".
    """

    place: str
    read: Callable[[], bytes | np.ndarray]


class ImageError(ValueError):
    """A refused image, or images that do not fit; the message names the numbers.

    Attributes:
      reason: a key of REASONS.
      detail: what was found.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
