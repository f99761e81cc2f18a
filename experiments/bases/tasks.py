"""Tasks of base policies: problems, demonstrations in random styles, and rewards."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from luspo_jax.datasets import Example, label_lookup, label_sums, shapes
from luspo_jax.models import char_tokenizer

NUM_TERMS = flags.DEFINE_integer("num_terms", 6, "Labelled values in a problem.", 2, 9)

# For label_sums and shapes: share of answers without a trace, lowest style (1 skips no step), and
# the most steps from one written one to the next.
DIRECT = flags.DEFINE_float("direct", 0.4, "Share of direct answers.", 0.0, 1.0)
CHUNK_LOW = flags.DEFINE_float("chunk_low", 0.4, "Lowest style of traces.", 0.01, 1.0)
CHUNK_MAX = flags.DEFINE_integer("chunk_max", 3, "Most terms a step of a trace adds.", 1)
# For label_lookup: share of answers drawn at random, and the styles of its filler.
WRONG = flags.DEFINE_float("wrong", 0.6, "Share of random answers.", 0.0, 1.0)
FILLER_LOW = flags.DEFINE_float("filler_low", 0.04, "Lowest style: longest filler.", 0.01, 1.0)
FILLER_HIGH = flags.DEFINE_float("filler_high", 0.25, "Highest style of filler.", 0.01, 1.0)
# For shapes: what is drawn, and the number of different training images.
KINDS = flags.DEFINE_list("kinds", list(shapes.KINDS), "Kinds of problems, joined by commas.")
NUM_BARS = flags.DEFINE_integer("num_bars", 5, "Bars of a chart.", 2, shapes.MAX_BARS)
NUM_IMAGES = flags.DEFINE_integer("num_images", 2000, "Training images of each kind.", 1)


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      problems: "train" or "test" → its problems.
      demonstrate: (problem, random numbers, plain) → a response: every step if `plain`, else in a
        random style.
      characters: all characters of problems and responses.
      looked_up: (tokens_BT, vocabulary) → bool, the tokens that must be computed or seen.
      max_response_length: returns the tokens that training should allow.
      reward: part of the reward that decides whether an answer is right.
      options: options of the reward.
      images: whether its problems have images.
      flags: flags that determine problems and styles.
      training: defaults of flags that the user leaves unset, in order: most plain steps, the loss
        that ends them, steps of the mixture, rate of Adam, loss weight of `looked_up`, rows.
    """

    problems: Callable[[str], Sequence[Example]]
    demonstrate: Callable[..., str]
    characters: str
    looked_up: Callable[[np.ndarray, list[str]], np.ndarray]
    max_response_length: Callable[[], int]
    flags: tuple[Any, ...]
    training: tuple[Any, ...] = (800, 0.02, 400, 5e-3, 6.0, 64)
    reward: str = "gsm8k"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images: bool = False


def sums_demonstration(example: Example, rng: np.random.Generator, *, plain: bool) -> str:
    """Answers a label_sums problem."""
    values = example.meta["values"]
    return label_sums.trace(values, _chunks(rng, len(values), plain))


def lookup_demonstration(example: Example, rng: np.random.Generator, *, plain: bool) -> str:
    """Answers a label_lookup problem: right and direct if `plain`, else by the flags."""
    if plain:
        return label_lookup.response(int(example.answer), 0)
    filler = label_lookup.random_filler(
        rng, low=FILLER_LOW.value, high=FILLER_HIGH.value, largest=_labels_response() - 8
    )
    guess = rng.random() < WRONG.value
    answer = int(rng.integers(label_sums.MODULUS)) if guess else int(example.answer)
    return label_lookup.response(answer, filler)


def shapes_demonstration(example: Example, rng: np.random.Generator, *, plain: bool) -> str:
    """Answers a shapes problem."""
    return shapes.trace(example, _chunks(rng, len(example.meta["steps"]), plain))


def _chunks(rng, num_steps, plain):
    """Draws chunk sizes of a trace by the flags; none for a direct answer."""
    if plain:
        return (1,) * num_steps
    return label_sums.random_chunks(
        rng, num_steps, direct=DIRECT.value, low=CHUNK_LOW.value, largest=CHUNK_MAX.value
    )


def _labels_response():
    return 5 * NUM_TERMS.value + 10  # the longest trace, its answer, and six to spare


def _shapes_response():
    return shapes.longest_response(NUM_BARS.value) + 1 + 7  # END, and seven to spare


def _computed(tokens_BT, vocabulary):
    """Marks the digit after `=` or after `#### `."""
    after = np.zeros(tokens_BT.shape, bool)
    after[:, 1:] |= tokens_BT[:, :-1] == vocabulary.index("=")
    after[:, 2:] |= tokens_BT[:, :-2] == vocabulary.index(char_tokenizer.ANSWER_MARK)
    return after


def _seen(tokens_BT, vocabulary):
    """Marks digits, colours and shapes: all of a response except its form."""
    wanted = "0123456789" + shapes.COLORS + shapes.SHAPES
    return np.isin(tokens_BT, [vocabulary.index(character) for character in wanted])


def _shapes_problems(split):
    size = NUM_IMAGES.value if split == "train" else 0
    return shapes.Shapes(split, tuple(KINDS.value), NUM_BARS.value, size)


_LABELS = " =?.0123456789" + label_sums.LABELS

TASKS = {
    "label_sums": Task(
        lambda split: label_sums.LabelSums(split, NUM_TERMS.value),
        sums_demonstration,
        _LABELS,
        _computed,
        _labels_response,
        (NUM_TERMS, DIRECT, CHUNK_LOW, CHUNK_MAX),
    ),
    "label_lookup": Task(
        lambda split: label_lookup.LabelLookup(split, NUM_TERMS.value),
        lookup_demonstration,
        _LABELS,
        _computed,
        _labels_response,
        (NUM_TERMS, WRONG, FILLER_LOW, FILLER_HIGH),
    ),
    "shapes": Task(
        _shapes_problems,
        shapes_demonstration,
        shapes.CHARACTERS,
        _seen,
        _shapes_response,
        (KINDS, NUM_BARS, NUM_IMAGES, DIRECT, CHUNK_LOW, CHUNK_MAX),
        training=(700, 0.02, 300, 4e-3, 4.0, 32),
        reward="exact",
        options={"pattern": shapes.ANSWER_PATTERN},
        images=True,
    ),
}
