"""The task of drawn shapes: every answer read back from its pixels alone, splits, traces."""

import collections
import hashlib
import json
import re

import numpy as np
import pytest

from luspo_jax.datasets import DataError, label_sums, load, shapes
from luspo_jax.datasets.images import ImageFiles, open_image
from luspo_jax.datasets.shapes import KINDS, Shapes
from luspo_jax.rewards import score

# The first problem of each kind, train: changes only if results are no longer comparable.
GOLDEN_PROBLEMS = [("abcde?", "0"), ("nY?", "2"), ("T?", "R"), ("lG?", "2")]
GOLDEN_PIXELS = "16a5625c4be35b42"

PAINT = {"R": (214, 48, 40), "G": (34, 150, 62), "B": (44, 92, 214), "Y": (238, 190, 30)}


def pixels(example):
    return np.asarray(open_image(example.meta["images"][0]))


def painted(image):
    """Boolean [height, width] of each colour."""
    return {name: (image == paint).all(axis=-1) for name, paint in PAINT.items()}


def seen_bars(image, question):
    """Heights of the bars from the pixels in each column of 28."""
    colored = np.any(list(painted(image).values()), axis=0)
    heights = [
        int(colored[:, 28 * k : 28 * k + 28].any(axis=1).sum()) for k in range(len(question) - 1)
    ]
    assert all(height % 13 == 0 for height in heights)
    return str(sum(heights) // 13 % 5)


def seen_dots(image, question):
    """Cells of 28 × 28 that hold pixels of the colour."""
    mask = painted(image)[question[1]]
    return str(sum(bool(mask[:, x : x + 28].any()) for x in range(0, 168, 28)))


def seen_color(image, question):
    """Colour of the cell whose filled pixels have the outline asked for."""
    found = {}
    for x in range(0, 112, 28):
        cell = {name: mask[:, x : x + 28] for name, mask in painted(image).items()}
        (name,) = [name for name, mask in cell.items() if mask.any()]
        found[outline(cell[name])] = name
    return found[question[0]]


def outline(mask):
    """The shape of a mask, by how much of its box and of the box's first row it fills."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if box.all():
        return "S"
    if box[0].sum() <= 3:
        return "T"
    return "X" if not box[0, box.shape[1] // 2] else "C"


def seen_length(image, question):
    """Cells that the rod of the colour covers, end to end."""
    columns = np.flatnonzero(painted(image)[question[1]].any(axis=0))
    length, rest = divmod(columns[-1] + 1 - columns[0], 28)
    assert not rest
    return str(length)


SEEN = {"bars": seen_bars, "dots": seen_dots, "color": seen_color, "length": seen_length}


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_can_be_read_from_its_pixels(kind):
    for example in Shapes("train", kinds=(kind,), size=150):
        assert SEEN[kind](pixels(example), example.problem) == example.answer, example


def test_image_sizes():
    """4 to 10 tokens of 28 × 28 pixels, and no resizing by the processor."""
    sizes = {e.meta["kind"]: pixels(e).shape for e in (Shapes("test")[i] for i in range(4))}
    assert sizes == {
        "bars": (56, 140, 3),
        "dots": (28, 168, 3),
        "color": (28, 112, 3),
        "length": (28, 168, 3),
    }


def test_splits_are_of_contents_whatever_the_look():
    contents = [
        {(e.meta["kind"], e.meta["images"][0]["code"]) for e in Shapes(split, num_bars=3, size=400)}
        for split in label_sums.SPLITS
    ]
    assert not contents[0] & contents[1]
    again = Shapes("train", kinds=("bars",), num_bars=3, size=400)
    assert len({e.meta["images"][0]["code"] for e in again}) == len(again._members("bars"))
    assert len({e.id for e in again}) == 400
    images = collections.defaultdict(set)
    for example in again:
        images[example.meta["images"][0]["code"]].add(pixels(example).tobytes())
    assert all(len(looks) >= 3 for looks in images.values())  # no look comes twice


def test_contents_of_a_kind_are_different_problems():
    for entry in KINDS.values():
        codes = range(0, entry.num_contents(4), 7)
        assert len({(c.question, c.shown) for c in (entry.content(k, 4) for k in codes)}) == len(
            codes
        )


def test_seed_orders_and_moves_nothing_between_splits():
    first, again, other = (list(Shapes("test", size=100, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert [e.id for e in first] != [e.id for e in other]
    train = {e.id % (1 << 22) for e in Shapes("train")}  # kind and content
    assert not train & {e.id % (1 << 22) for e in other}


def test_random_access():
    examples = Shapes("train", size=20)
    listed = list(examples)
    assert len(listed) == len(examples) == 80
    assert [examples[i] for i in (5, 0, 17)] == [listed[i] for i in (5, 0, 17)]
    assert examples[-1] == listed[-1]
    assert [e.meta["kind"] for e in listed[:4]] == list(KINDS)
    with pytest.raises(IndexError):
        examples[80]
    assert json.loads(json.dumps(listed[0].meta)) == listed[0].meta  # can be stored


def test_first_problems_and_their_pixels_do_not_change():
    """Golden: results are comparable only as long as a seed means the same problems."""
    first = [Shapes("train")[i] for i in range(4)]
    assert [(e.problem, e.answer) for e in first] == GOLDEN_PROBLEMS
    digest = hashlib.sha256(b"".join(pixels(e).tobytes() for e in first))
    assert digest.hexdigest()[:16] == GOLDEN_PIXELS


def test_blind_accuracy():
    """The best answers without looking, and that they are far from right."""
    found = shapes.blind_accuracy(Shapes("test", size=2_000))
    assert set(found) == {*KINDS, "all"}
    # Of all problems: 1/5, binomial(6, 1/3) at 2, 1/4, 6 of 20 rods; the best of a sample is a
    # little better, and of rods, of which the split has some 60, by more.
    expected = {"bars": 0.2, "dots": 0.329, "color": 0.25, "length": 6 / 20}
    for kind, value in expected.items():
        assert value - 0.02 < found[kind] < value + (0.1 if kind == "length" else 0.05)
    assert found["all"] < 0.3
    some = [Shapes("test")[i] for i in range(0, 40, 4)]
    counts = collections.Counter(e.answer for e in some)
    assert shapes.blind_accuracy(some)["all"] == max(counts.values()) / 10


def test_every_trace_is_right_and_covers_what_it_says():
    for example in Shapes("test", size=25):
        steps = example.meta["steps"]
        assert shapes.trace(example, ()) == f"#### {example.answer}"
        full = shapes.trace(example, (1,) * len(steps))
        assert full == "".join(step + " " for step in steps) + f"#### {example.answer}"
        assert set(full.replace("####", "")) | set(example.problem) <= set(shapes.CHARACTERS)
        assert len(full.replace("####", "#")) <= shapes.longest_response(5)
        check_steps(example, steps)
        if len(steps) > 1:
            skipping = shapes.trace(example, (2,) + (1,) * (len(steps) - 2))
            assert skipping == full[len(steps[0]) + 1 :]
    with pytest.raises(ValueError, match="do not cover"):
        shapes.trace(Shapes("test")[0], (1, 1))


def check_steps(example, steps):
    """Each step follows from the one before, and the last one leads to the answer."""
    kind = example.meta["kind"]
    if kind == "color":
        assert [step[0] for step in steps] == list("abcd"[: len(steps)])
        assert steps[-1][1:] == example.problem[0] + example.answer
        assert len({step[1] for step in steps}) == len(steps)
        return
    total = 0
    for label, step in zip("abcdef", steps, strict=False):
        found, value, so_far = re.fullmatch(r"([a-f])([\dRGBY-])=(\d)", step).groups()
        total += int(value) if kind == "bars" else value == example.problem[1]
        total %= 5 if kind == "bars" else 10
        assert (found, int(so_far)) == (label, total)
    assert str(total) == example.answer


def test_lengths_of_random_traces_vary():
    rng = np.random.default_rng(0)
    lengths = [
        len(
            shapes.trace(
                example,
                label_sums.random_chunks(
                    rng, len(example.meta["steps"]), direct=0.3, low=0.4, largest=3
                ),
            )
        )
        for example in Shapes("train", size=200)
    ]
    assert np.std(lengths) > 0.4 * np.mean(lengths)


def test_the_verifier_accepts_exactly_the_right_answer():
    options = {"exact": {"pattern": shapes.ANSWER_PATTERN}}
    for example in Shapes("test", size=5):
        for guess in "0123456789RGBY":
            reward = score({"exact": 1.0}, f"a1=2 #### {guess}", example.answer, options=options)
            assert reward.value == float(guess == example.answer)
        none = score({"exact": 1.0}, "a1=2", example.answer, options=options)
        assert none.status == "unparsed"


def test_by_name_and_through_the_readers():
    examples, report = load("shapes", split="test", kinds=("dots", "length"), size=3)
    assert (len(examples), report.examples) == (6, 6)
    (image,) = ImageFiles().images(examples[0])
    assert image.place == f"shapes, row {examples[0].id}"
    np.testing.assert_array_equal(image.read(), pixels(examples[0]))
    assert image.read().dtype == np.uint8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, r"'dev' .*train.*test"),
        ({"kinds": ("bar",)}, r"kinds must be some of .*not \('bar',\)"),
        ({"kinds": ()}, "kinds must be some of"),
        ({"kinds": ("bars", "bars")}, "kinds must be some of"),
        ({"num_bars": 7}, "num_bars must be from 2 to 6, not 7"),
        ({"size": -1}, "size must be from 0 to"),
        ({"size": 10**7}, "size must be from 0 to"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(DataError, match=message):
        Shapes(**{"split": "train"} | settings)
