"""Images for the tests: stored ones, drawn ones, and files that are hard to read."""

import io
import struct
import zlib

import numpy as np
import PIL.Image

from luspo_jax.images.record import StoredImage
from luspo_jax.images.settings import ImageSettings

SETTINGS = ImageSettings()


def stored(data, place="data.parquet, row 3"):
    return StoredImage(place, lambda: data)


def gradient(width, height):
    """The image that the fingerprints are of."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return (np.stack([7 * x + 3 * y, 5 * x + 11 * y, x + 2 * y], axis=-1) % 256).astype(np.uint8)


def encoded(image, form="PNG", **options):
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png_header(width, height, bits=8, rows=b""):
    """A PNG that says what size it has and holds hardly any pixels, grey."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def white_png(side):
    """A square of one bit a pixel: small, quickly made, and slow to prepare."""
    row = b"\0" + b"\xff" * (-(-side // 8))
    return png_header(side, side, bits=1, rows=row * side)


WHOLE = encoded(gradient(80, 60))
