"""Figures are readable on any page: contrasts by WCAG, colours by simulated colour blindness."""

import itertools

import matplotlib.colors
import numpy as np
import PIL.Image
import pytest

from luspo_jax.hosts import figure_style

# Machado, Oliveira, Fernandes (2009), severity 1: linear RGB as it is seen.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def _linear(color):
    rgb = np.array(matplotlib.colors.to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _contrast(one, other):
    low, high = sorted(_linear(c) @ [0.2126, 0.7152, 0.0722] for c in (one, other))
    return (high + 0.05) / (low + 0.05)


def _oklab(linear):
    """Ottosson's OKLab, in which distances are about as they are seen."""
    cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    mixed = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(mixed) @ np.cbrt(np.array(cones) @ np.clip(linear, 0, 1))


def test_contrast_of_black_on_white_is_21():
    assert _contrast("black", "white") == pytest.approx(21)
    assert _contrast("#777777", "white") == pytest.approx(4.48, abs=0.01)  # as WCAG's examples say


def test_text_has_4_5_to_1():
    texts = [figure_style.INK, figure_style.SOFT_INK]
    texts += [figure_style.text_color(color) for color in figure_style.LINES]
    assert min(_contrast(text, figure_style.CARD) for text in texts) >= 4.5


def test_lines_have_3_to_1():
    lines = [*figure_style.LINES, figure_style.EDGE, *figure_style.shades(5)]
    assert min(_contrast(line, figure_style.CARD) for line in lines) >= 3


@pytest.mark.parametrize("kind", BLINDNESS)
def test_lines_differ_to_the_colour_blind(kind):
    seen = [_oklab(np.array(BLINDNESS[kind]) @ _linear(color)) for color in figure_style.LINES]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.09


def test_twenty_one_styles_differ():
    styles = [tuple(figure_style.style(k).values()) for k in range(21)]
    assert len(set(styles)) == 21
    assert figure_style.style(21) == figure_style.style(0)


def test_objectives_have_their_colours_where_all_are_objectives():
    luspo, gspo = figure_style.looks(["LUSPO", "gspo"])
    assert (luspo["color"], gspo["color"]) == (figure_style.LINES[0], figure_style.LINES[1])
    assert figure_style.looks(["gspo", "mine"]) == [figure_style.style(0), figure_style.style(1)]


@pytest.mark.parametrize(
    ("heights", "moved"),
    [
        ([0.0, 20.0], [0.0, 20.0]),
        ([10.0, 10.0], [5.0, 15.0]),
        ([14.0, 10.0, 100.0], [17.0, 7.0, 100.0]),
        ([0.0, 9.0, 18.0], [-1.0, 9.0, 19.0]),
    ],
)
def test_labels_are_spread_by_no_more_than_they_must(heights, moved):
    shifts = figure_style.spread(heights, 10.0)
    np.testing.assert_allclose(np.add(heights, shifts), moved)


def test_no_two_spread_labels_overlap():
    rng = np.random.default_rng(0)
    for _ in range(50):
        heights = rng.uniform(0, 60, size=8)
        places = np.add(heights, figure_style.spread(list(heights), 7.0))
        assert np.diff(np.sort(places)).min() > 7.0 - 1e-9
        assert (np.argsort(places) == np.argsort(heights)).all()


def test_a_card_covers_all_but_its_corners(tmp_path):
    plt = figure_style.pyplot()
    figure, axis = plt.subplots(figsize=(3, 2), layout="constrained")
    axis.plot([0, 1], [0, 1], label="one")
    axis.plot([0, 1], [0, 0.99], label="other")
    figure_style.label_ends(axis)
    assert [text.get_text() for text in axis.texts] == ["one", "other"]
    one, other = (text.get_window_extent() for text in axis.texts)
    assert not one.overlaps(other)
    target = figure_style.save(figure, tmp_path / "card.png")
    assert not plt.fignum_exists(figure.number)
    with PIL.Image.open(target) as image:
        alpha = np.array(image.convert("RGBA"))[..., 3]
    assert alpha[0, 0] == alpha[-1, -1] == 0
    assert alpha.mean() > 0.97 * 255
    assert list(tmp_path.iterdir()) == [target]
