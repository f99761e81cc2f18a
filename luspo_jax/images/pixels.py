"""Turns an image file into uint8 patches, as transformers' Qwen2VLImageProcessor cuts them.

Pillow and NumPy only: worker processes import this module and nothing heavier. The arithmetic is
the processor's, bit for bit (a test compares the two). It is repeated here because importing
transformers costs a worker 0.7 s and 40 MB, the class is renamed every few releases, and its result
is float32 where uint8 carries the same information.

It also does the work of Qwen's own loader (`qwen_vl_utils`): an RGBA image is laid on white, any
other mode is converted by Pillow (transparency of palettes and of grey images is dropped), and an
EXIF orientation is not applied. One deviation: 16-bit grey is scaled to 8 bits, where Pillow's
conversion clips it and leaves an almost white image.
"""

import dataclasses
import io
import math
import warnings

import numpy as np
import PIL.Image

from luspo_jax.images.record import ImageError

MAX_ASPECT_RATIO = 200
# Never EPS or WMF, which Pillow hands to other programs.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_PNG = b"\x89PNG\r\n\x1a\n"
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")


@dataclasses.dataclass(frozen=True)
class Patching:
    """How images are resized and cut.

    Attributes:
      patch_size: side of a patch, in pixels.
      merge_size: patches per side that the tower merges into one token.
      min_pixels, max_pixels: limits of a resized image.
      resample: Pillow's filter; 3 is bicubic.
      max_source_pixels: limit of a file, by its header.
      blank: makes every image white, keeping its size.
    """

    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    resample: int = 3
    max_source_pixels: int = 100_000_000
    blank: bool = False


def prepared(data: bytes | np.ndarray, patching: Patching) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns (patches uint8 [n, 3, patch, patch], grid (1, rows, columns)) of an image.

    Patches come in merge × merge blocks; blocks, and patches within a block, go row by row.

    Args:
      data: a file's bytes, or uint8 [height, width, 3].
      patching: how to resize and cut.

    Raises:
      ImageError: the image is refused.
    """
    if isinstance(data, bytes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, about sizes checked here
            image = _decoded(data, patching)
    else:
        image = _from_array(data)
    height, width = smart_size(image.height, image.width, patching)
    image = image.resize((width, height), resample=patching.resample)
    pixels_HWC = np.asarray(image)
    if patching.blank:
        pixels_HWC = np.full_like(pixels_HWC, 255)
    return _cut(pixels_HWC, patching)


def smart_size(height: int, width: int, patching: Patching) -> tuple[int, int]:
    """Returns the resized (height, width): multiples of a merged patch, within the limits.

    Raises:
      ImageError: the aspect ratio is above 200.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ImageError(
            "aspect_ratio",
            f"{width} × {height} pixels: one side is {ratio:.0f} times the other, more than "
            f"{MAX_ASPECT_RATIO}",
        )
    factor = patching.patch_size * patching.merge_size
    least, most = patching.min_pixels, patching.max_pixels
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > most:
        beta = math.sqrt((height * width) / most)
        tall = max(factor, math.floor(height / beta / factor) * factor)
        wide = max(factor, math.floor(width / beta / factor) * factor)
    elif tall * wide < least:
        beta = math.sqrt(least / (height * width))
        tall = math.ceil(height * beta / factor) * factor
        wide = math.ceil(width * beta / factor) * factor
    return tall, wide


def _cut(pixels_HWC: np.ndarray, patching: Patching) -> tuple[np.ndarray, tuple[int, ...]]:
    height, width, channels = pixels_HWC.shape
    patch, merge = patching.patch_size, patching.merge_size
    rows, columns = height // patch, width // patch
    blocks = pixels_HWC.reshape(
        rows // merge, merge, patch, columns // merge, merge, patch, channels
    )
    # Block row, block column, row and column in the block, channel, pixel row, pixel column.
    cut = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, patch, patch)
    return np.ascontiguousarray(cut), (1, rows, columns)


def _from_array(pixels: np.ndarray) -> PIL.Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ImageError(
            "mode", f"pixels must be uint8 [height, width, 3], not {pixels.dtype} {pixels.shape}"
        )
    _check_size(pixels.shape[1], pixels.shape[0])
    return PIL.Image.fromarray(pixels)


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise ImageError("empty", f"{width} × {height} pixels")


def _decoded(data: bytes, patching: Patching) -> PIL.Image.Image:
    """Decodes a file's bytes to an RGB image; any decoder exception becomes an ImageError."""
    _check_signature(data)
    try:
        with _opened(data, patching.max_source_pixels) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ImageError("animated", f"{image.format} with {image.n_frames} frames")
            image.load()
            return _rgb(image)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("memory", "decoding it ran out of memory") from error
    except Exception as error:  # decoders of damaged files raise any kind of error
        raise ImageError("corrupt", f"{type(error).__name__}: {error}"[:300]) from error


def _check_signature(data: bytes) -> None:
    """Refuses files that Pillow would only call unidentified, under a better name."""
    if not data:
        raise ImageError("empty", "no bytes")
    if data[:8] == _PNG and data[12:16] == b"IHDR" and len(data) >= 24:
        sides = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
        _check_size(*sides)
    mp4 = data[4:8] == b"ftyp" and data[8:12] not in _STILL_BRANDS
    avi = data[:4] == b"RIFF" and data[8:12] == b"AVI "
    if mp4 or avi or data[:4] in (b"\x1a\x45\xdf\xa3", b"\x00\x00\x01\xba"):
        raise ImageError("video", "videos are not read: give single images")


def _opened(data: bytes, max_source_pixels: int) -> PIL.Image.Image:
    """Opens an image and reads its header without decoding."""
    PIL.Image.init()
    formats = [name for name in _FORMATS if name in PIL.Image.OPEN]
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=formats)
    except PIL.Image.DecompressionBombError as error:
        raise ImageError("huge", str(error)) from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError("not_an_image", f"{len(data)} bytes of no known image format") from error
    width, height = image.size
    _check_size(width, height)
    if width * height > max_source_pixels:
        raise ImageError(
            "huge",
            f"{width} × {height} = {width * height:,} pixels, more than max_source_pixels = "
            f"{max_source_pixels:,}",
        )
    return image


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "RGBA":
        white = PIL.Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError(
                "mode", f"integers from {values.min()} to {values.max()}, not of 16 bits"
            )
        return PIL.Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("mode", "floating-point pixels")
    return image.convert("RGB")
