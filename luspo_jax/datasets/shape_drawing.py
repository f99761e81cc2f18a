"""Draws the task `shapes` pixel by pixel in NumPy, so that no library version changes an image."""

import dataclasses
import functools

import numpy as np

COLORS = "RGBY"
SHAPES = "CSTX"
CELLS = 6  # per row, for dots and rods
EMPTY = "-"  # a cell without a colour
CELL = 28  # pixels: one merged token of Qwen's tower

_PAINT = {"R": (214, 48, 40), "G": (34, 150, 62), "B": (44, 92, 214), "Y": (238, 190, 30)}
_INK = (70, 70, 70)
_GRID = (208, 208, 208)
_UNIT = 13  # pixels of bar height per unit


@dataclasses.dataclass(frozen=True)
class Look:
    """A fixed sequence of draws for all parts of an image that its problem does not determine.

    Attributes:
      seed: whole numbers; equal numbers give equal draws under every version of NumPy, since the
        raw bits of PCG64 are part of its interface.
    """

    seed: tuple[int, ...]

    @functools.cached_property
    def _bits(self):
        return iter(np.random.PCG64(self.seed).random_raw(256).tolist())

    def draw(self, low: int, high: int) -> int:
        """Draws a whole number from low to high, both included."""
        return low + next(self._bits) % (high - low + 1)

    def color(self, not_this: str = "") -> tuple[int, int, int]:
        """Draws the paint of one of the colours."""
        allowed = [name for name in COLORS if name != not_this]
        return _PAINT[allowed[self.draw(0, len(allowed) - 1)]]

    def canvas(self, width: int, height: int) -> np.ndarray:
        """Returns a light canvas, uint8 [height, width, 3]."""
        shade = [self.draw(236, 255) for _ in range(3)]
        return np.full((height, width, 3), shade, np.uint8)


def bars(values: tuple[int, ...], look: Look) -> np.ndarray:
    """Draws a bar chart on a ruled ground, 28 pixels per bar; 13 pixels of height per unit."""
    width, height = CELL * len(values), 2 * CELL
    image, ground = look.canvas(width, height), height - 3
    for level in range(1, 5):
        image[ground - _UNIT * level] = _GRID
    for place, value in enumerate(values):
        half = look.draw(6, 10)
        middle = CELL * place + CELL // 2 + look.draw(-2, 2)
        image[ground - _UNIT * value : ground, middle - half : middle + half] = look.color()
    image[ground:] = _INK
    return image


def dots(row: tuple[str, ...], look: Look) -> np.ndarray:
    """Draws a row of cells, each with a dot of its colour, or empty."""
    image = look.canvas(CELL * len(row), CELL)
    for place, color in enumerate(row):
        if color != EMPTY:
            y, x = _middle(place, look)
            _fill(image, _circle(y, x, look.draw(7, 9)), _PAINT[color])
    return image


def shapes(cells: tuple[tuple[str, str], ...], look: Look) -> np.ndarray:
    """Draws four coloured shapes in a row."""
    image = look.canvas(CELL * len(cells), CELL)
    for place, (shape, color) in enumerate(cells):
        y, x = _middle(place, look)
        _fill(image, _OUTLINES[shape](y, x, look.draw(8, 10)), _PAINT[color])
    return image


def rods(row: tuple[str, ...], look: Look) -> np.ndarray:
    """Draws rods along a scale with ticks between cells, from the colour over each cell."""
    image = look.canvas(CELL * len(row), CELL)
    image[CELL - 2 :] = _INK
    for tick in range(1, len(row)):
        image[CELL - 6 : CELL, CELL * tick - 1 : CELL * tick + 1] = _INK
    half, middle = look.draw(4, 7), 12 + look.draw(-3, 2)
    for place, color in enumerate(row):
        if color != EMPTY:
            across = slice(CELL * place, CELL * (place + 1))
            image[middle - half : middle + half, across] = _PAINT[color]
    return image


def _middle(place: int, look: Look) -> tuple[int, int]:
    half = CELL // 2
    return half + look.draw(-2, 2), CELL * place + half + look.draw(-2, 2)


def _fill(image: np.ndarray, inside, paint: tuple[int, int, int]) -> None:
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    image[inside(y, x)] = paint


def _circle(y0: int, x0: int, size: int):
    return lambda y, x: (y - y0) ** 2 + (x - x0) ** 2 < size**2


def _square(y0: int, x0: int, size: int):
    return lambda y, x: np.maximum(abs(y - y0), abs(x - x0)) < size - 1


def _triangle(y0: int, x0: int, size: int):
    return lambda y, x: (y < y0 + size) & (2 * abs(x - x0) <= y - (y0 - size))


def _cross(y0: int, x0: int, size: int):
    def inside(y, x):
        near = np.maximum(abs(y - y0), abs(x - x0)) <= size
        return near & (abs(abs(y - y0) - abs(x - x0)) <= 3)

    return inside


_OUTLINES = {"C": _circle, "S": _square, "T": _triangle, "X": _cross}
