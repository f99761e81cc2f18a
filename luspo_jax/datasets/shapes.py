"""Small drawn images with questions that need the image: a procedural task for vision models.

It mixes four kinds of problem, each with its own image size (in pixels, width × height):

| kind | image | question | answer | full trace |
| --- | --- | --- | --- | --- |
| bars | chart of N bars, 28·N × 56 | `abcd?` | sum of heights modulo 5 | `a3=3 b4=2 c1=3 d0=3` |
| dots | six cells, 168 × 28 | `nR?` | number of red dots | `aR=1 b-=1 cG=1 …` |
| color | four shapes, 112 × 28 | `S?` | colour of the square | `aCB bSR`, up to the square |
| length | rods over six cells, 168 × 28 | `lG?` | cells under the green one | `a-=0 bG=1 …` |

Steps go from left to right, letter by letter: the item and the running result. A response may
answer at once, `#### 3`, or first write some of the steps: the fewer it skips, the longer it is and
the easier each step, as in `label_sums`. Colours are R, G, B, Y; shapes are C(ircle), S(quare),
T(riangle), X. Answers are one character; `ANSWER_PATTERN` finds them.

One number fixes a problem's content (its question and the shapes that matter), another its look
(positions, sizes and colours that do not matter). A hash splits contents, one in eight for the
test, so no test problem occurs in training with any look. No file is read, and the same numbers
give the same pixels on every machine.
"""

import dataclasses
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from luspo_jax.datasets import label_sums, shape_drawing
from luspo_jax.datasets.example import DataError, Example
from luspo_jax.datasets.shape_drawing import CELLS, COLORS, EMPTY, SHAPES

ANSWER_PATTERN = r"####\s*(\S)"  # option `pattern` of the reward `exact`
MAX_BARS = 6
# All characters of problems and traces, besides the answer mark "####".
CHARACTERS = " =-?0123456789" + label_sums.LABELS[:MAX_BARS] + "nl" + COLORS + SHAPES
SIZES = {"train": 4096, "test": 512}  # problems of each kind, unless `size` says otherwise

_CODES = 1 << 20  # more than any kind has contents
_LOOKS = 512
_ENDS = tuple(ends for ends in itertools.combinations(range(CELLS + 1), 2) if ends != (0, CELLS))
_COLOR_PAIRS = tuple(itertools.permutations(COLORS, 2))
_ARRANGEMENTS = tuple(itertools.permutations(SHAPES))


@dataclasses.dataclass(frozen=True)
class Content:
    """A problem's question and picture.

    Attributes:
      question: its text.
      answer: one character.
      steps: the full steps of a response before its answer.
      shown: input to the drawing function of its kind.
    """

    question: str
    answer: str
    steps: tuple[str, ...]
    shown: tuple


def bars(code: int, num_bars: int) -> Content:
    """Asks for the sum of bar heights modulo 5; the code's base-5 digits are the heights."""
    values = label_sums.digits(code, num_bars)
    labels = label_sums.LABELS[:num_bars]
    sums = np.cumsum(values) % label_sums.MODULUS
    steps = (f"{label}{v}={s}" for label, v, s in zip(labels, values, sums, strict=True))
    return Content(labels + "?", str(sums[-1]), tuple(steps), values)


def dots(code: int, num_bars: int) -> Content:
    """Asks for the number of dots of a colour; a cell is empty, of that colour or of one other."""
    pair, cells = divmod(code, 3**CELLS)
    asked, other = _COLOR_PAIRS[pair]
    row = tuple((EMPTY, asked, other)[cells // 3**place % 3] for place in range(CELLS))
    return _counted("n", row, asked)


def color(code: int, num_bars: int) -> Content:
    """Asks for the colour of one of four shapes."""
    code, asked = divmod(code, len(SHAPES))
    arrangement, colors = divmod(code, len(COLORS) ** len(SHAPES))
    cells = tuple(
        (shape, COLORS[colors // len(COLORS) ** place % len(COLORS)])
        for place, shape in enumerate(_ARRANGEMENTS[arrangement])
    )
    place = [shape for shape, _ in cells].index(SHAPES[asked])
    seen = zip(label_sums.LABELS, cells[: place + 1], strict=False)
    steps = tuple(label + shape + colour for label, (shape, colour) in seen)
    return Content(f"{SHAPES[asked]}?", cells[place][1], steps, cells)


def length(code: int, num_bars: int) -> Content:
    """Asks for the number of cells a rod covers, alone or over another along the whole scale."""
    code, below = divmod(code, 2)
    pair, ends = divmod(code, len(_ENDS))
    (asked, other), (start, end) = _COLOR_PAIRS[pair], _ENDS[ends]
    row = [other if below else EMPTY] * CELLS
    row[start:end] = asked * (end - start)
    return _counted("l", tuple(row), asked)


def _counted(word, row, asked):
    """Builds the content that asks for the cells of a colour; `row` is the colour of each cell."""
    sums = np.cumsum([colour == asked for colour in row])
    seen = zip(label_sums.LABELS, row, sums, strict=False)
    steps = tuple(f"{label}{colour}={total}" for label, colour, total in seen)
    return Content(f"{word}{asked}?", str(sums[-1]), steps, row)


@dataclasses.dataclass(frozen=True)
class _Kind:
    content: Callable[[int, int], Content]
    num_contents: Callable[[int], int]
    draw: Callable[..., np.ndarray]


KINDS = {
    "bars": _Kind(bars, lambda n: label_sums.MODULUS**n, shape_drawing.bars),
    "dots": _Kind(dots, lambda n: 3**CELLS * len(_COLOR_PAIRS), shape_drawing.dots),
    "color": _Kind(
        color,
        lambda n: len(_ARRANGEMENTS) * len(COLORS) ** len(SHAPES) * len(SHAPES),
        shape_drawing.shapes,
    ),
    "length": _Kind(length, lambda n: len(_ENDS) * len(_COLOR_PAIRS) * 2, shape_drawing.rods),
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """One split of the task: a random-access sequence of `Example`, the same on every machine.

    Kinds alternate. `meta["images"]` refers to an example's image, which is drawn on request.

    Attributes:
      split: "train" or "test".
      kinds: the kinds to mix, names of KINDS.
      num_bars: bars of a chart, 2 to 6.
      size: problems of each kind; 0 for 4,096 of train, 512 of test. A kind with fewer contents
        repeats them with another look.
      seed: determines the order of the problems, not their split.
    """

    split: str
    kinds: Sequence[str] = tuple(KINDS)
    num_bars: int = 5
    size: int = 0
    seed: int = 0

    def __post_init__(self):
        label_sums.check_split(self.split)
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise DataError(f"kinds must be some of {tuple(KINDS)}, not {tuple(self.kinds)}")
        if not 2 <= self.num_bars <= MAX_BARS:
            raise DataError(f"num_bars must be from 2 to {MAX_BARS}, not {self.num_bars}")
        most = _LOOKS * min(len(self._members(kind)) for kind in self.kinds)
        if not 0 <= self.size <= most:
            raise DataError(f"size must be from 0 to {most}, not {self.size}")
        object.__setattr__(self, "kinds", tuple(self.kinds))

    def __len__(self) -> int:
        return len(self.kinds) * (self.size or SIZES[self.split])

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        place, turn = divmod(index % len(self), len(self.kinds))
        kind = self.kinds[turn]
        members = self._members(kind)
        look, place = divmod(place, len(members))
        code = int(members[place])
        return example(kind, code, look, num_bars=self.num_bars, split=self.split)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def _members(self, kind: str) -> np.ndarray:
        num_contents = KINDS[kind].num_contents(self.num_bars)
        return label_sums.split_codes(num_contents, self.split, self.seed)


def example(kind: str, code: int, look: int, *, num_bars: int, split: str) -> Example:
    """Returns the problem with this content and look."""
    content = KINDS[kind].content(code, num_bars)
    number = (look * len(KINDS) + tuple(KINDS).index(kind)) * _CODES + code
    image = {"row": number, "generated": "shapes", "kind": kind, "code": code, "look": look}
    return Example(
        id=number,
        problem=content.question,
        answer=content.answer,
        meta={
            "task": "shapes",
            "split": split,
            "kind": kind,
            "steps": list(content.steps),
            "images": [image | ({"num_bars": num_bars} if kind == "bars" else {})],
        },
    )


def draw(reference: dict[str, Any]) -> np.ndarray:
    """Draws the image of an element of `meta["images"]`: uint8 [height, width, 3]."""
    kind, code, look = (reference[name] for name in ("kind", "code", "look"))
    content = KINDS[kind].content(code, reference.get("num_bars", MAX_BARS))
    return KINDS[kind].draw(content.shown, shape_drawing.Look((code, look)))


def trace(problem: Example, chunks: Sequence[int]) -> str:
    """Formats a right response that writes the last step of each chunk of steps.

    For the steps a3=3, b4=2, c1=3 and chunks (2, 1): `b4=2 c1=3 #### 3`.

    Args:
      problem: an example of this task.
      chunks: sizes of consecutive chunks, which sum to the number of steps; empty for a direct
        answer. `label_sums.random_chunks` draws them.

    Raises:
      ValueError: the chunks do not cover the steps exactly.
    """
    steps = problem.meta["steps"]
    if chunks and (min(chunks) < 1 or sum(chunks) != len(steps)):
        raise ValueError(f"chunks {tuple(chunks)} do not cover {len(steps)} steps")
    written = (steps[end - 1] + " " for end in itertools.accumulate(chunks))
    return "".join(written) + f"#### {problem.answer}"


def blind_accuracy(problems: Iterable[Example]) -> dict[str, float]:
    """Returns the accuracy without the image: of the best constant answer to each question text.

    Maps kind to accuracy on its problems, and "all" to accuracy on all.
    """
    answers: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for problem in problems:
        answers[problem.meta["kind"], problem.problem][problem.answer] += 1
    total, best = Counter(), Counter()
    for (kind, _), counts in answers.items():
        for name in (kind, "all"):
            total[name] += counts.total()
            best[name] += max(counts.values())
    return {name: best[name] / total[name] for name in total}


@functools.cache
def longest_response(num_bars: int = 5) -> int:
    """Returns the length of the longest full trace in characters, `####` counted as one."""
    steps = {
        "bars": 5 * num_bars,
        "dots": 5 * CELLS,
        "color": 4 * len(SHAPES),
        "length": 5 * CELLS,
    }
    return max(steps.values()) + len("#") + len(" 3")
