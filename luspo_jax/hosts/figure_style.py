"""One look for all figures: a card, inks and lines that are told apart on any page, direct labels.

A figure is a light card with round corners, because no grey is readable as text on a white page and
on a dark one at once. Text on the card has a contrast of at least 4.5 : 1, lines and markers of
3 : 1 (WCAG 2.2, 1.4.3 and 1.4.11). The colours differ also to the three kinds of colour blindness,
and markers and dashes repeat what a colour says.
"""

import pathlib
from collections.abc import Iterable, Sequence

from luspo_jax.hosts import files

CARD = "#fbfbf8"
INK, SOFT_INK = "#24292f", "#57606a"  # text, and text of less weight
EDGE, GRID = "#818b98", "#dfe3e8"  # lines that carry a value, and those that do not
LINES = ("#0072b2", "#d55e00", "#70355e", "#1f2328", "#1392d4", "#a24019", "#4134ab")
DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.4)))
MARKERS = "osD^vPX"
RIGHT, WRONG, HELD_OUT = LINES[0], LINES[1], INK  # responses by verdict, and held-out problems
# An objective has the same colour in every figure.
OBJECTIVES = {
    "luspo": LINES[0],
    "gspo": LINES[1],
    "grpo": LINES[3],
    "dapo": LINES[2],
    "dr-grpo": LINES[5],
}
_SHADES = ("#eef3f8", "#9cc3e0", "#3c8fc6", "#0a5a94", "#0b2545")  # of a share, from 0


def rules() -> dict:
    """Returns the parameters of matplotlib that make the look."""
    from cycler import cycler

    return {
        "figure.facecolor": CARD,
        "axes.facecolor": CARD,
        "savefig.facecolor": CARD,
        "savefig.dpi": 130,
        "figure.constrained_layout.w_pad": 0.1,  # inches
        "figure.constrained_layout.h_pad": 0.1,
        "font.size": 9.5,
        "text.color": INK,
        "axes.labelcolor": SOFT_INK,
        "axes.titlecolor": INK,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.edgecolor": EDGE,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=LINES),
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": EDGE,
        "ytick.color": EDGE,
        "xtick.labelcolor": SOFT_INK,
        "ytick.labelcolor": SOFT_INK,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.handlelength": 1.8,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
        "lines.solid_capstyle": "round",
        "patch.linewidth": 0,
        "image.cmap": "luspo",
    }


def use():
    """Sets the look for this process, as in a notebook; returns `matplotlib.pyplot`."""
    import matplotlib
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    if "luspo" not in matplotlib.colormaps:
        matplotlib.colormaps.register(LinearSegmentedColormap.from_list("luspo", _SHADES))
    plt.rcParams.update(rules())
    return plt


def pyplot():
    """Returns `matplotlib.pyplot` in the look, drawing into files: for launchers."""
    import matplotlib

    matplotlib.use("Agg")
    return use()


def style(index: int) -> dict:
    """Returns colour and dashes of the line of that number: 21 of them differ."""
    return {"color": LINES[index % len(LINES)], "ls": DASHES[index // len(LINES) % len(DASHES)]}


def looks(names: Sequence[str]) -> list[dict]:
    """Returns `style` of each name; of objectives, where all are, their own colours."""
    found = [style(index) for index in range(len(names))]
    own = [OBJECTIVES.get(name.lower()) for name in names]
    if all(own) and len(set(own)) == len(own):
        found = [{"color": color, "ls": DASHES[0]} for color in own]
    return found


def shades(count: int) -> list:
    """Returns colours for an order, the first the lightest; each readable on the card."""
    import matplotlib
    import numpy as np

    use()
    return list(matplotlib.colormaps["luspo"](np.linspace(0.5, 1.0, count)))


def text_color(color) -> tuple:
    """Returns the colour of a line, darkened so that it is readable as text."""
    from matplotlib.colors import to_rgb

    return tuple(
        0.68 * line + 0.32 * ink for line, ink in zip(to_rgb(color), to_rgb(INK), strict=True)
    )


def halo(color: str = CARD, width: float = 3.0) -> list:
    """Returns what makes a text or a line stand out from what is behind it."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground=color)]


def label_ends(
    axis, lines: Iterable | None = None, *, gap: float = 1.25, size: float = 8.5
) -> None:
    """Writes each line's label at its right end, moved up or down where labels would overlap.

    Limits of the axis must be set before, and the figure needs no legend.

    Args:
      axis: of matplotlib.
      lines: of the axis; all that have a label if left out.
      gap: between two labels, in heights of a letter.
      size: of a letter in points.
    """
    chosen = [x for x in (axis.lines if lines is None else lines) if x.get_label()[:1] != "_"]
    ends = [(line, *map(float, line.get_xydata()[-1])) for line in chosen if len(line.get_xdata())]
    if not ends:
        return
    axis.figure.draw_without_rendering()
    scale = axis.figure.dpi / 72
    heights = [axis.transData.transform((x, y))[1] / scale for _, x, y in ends]
    right = max(x for _, x, _ in ends)
    for (line, _, y), shift in zip(ends, spread(heights, gap * size), strict=True):
        axis.annotate(
            line.get_label(), (right, y), xytext=(6, shift), textcoords="offset points",
            color=text_color(line.get_color()), fontsize=size, va="center", annotation_clip=False,
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Returns by how much to move each height so that neighbours are `gap` apart, and no further.

    Heights that are nearer move as one block about their mean.
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)
    blocks: list[list] = []  # [centre, members]
    for member in order:
        blocks.append([heights[member], [member]])
        while len(blocks) > 1:
            (low, under), (high, over) = blocks[-2:]
            if high - low >= gap * (len(under) + len(over)) / 2:
                break
            together = under + over
            blocks[-2:] = [[sum(heights[m] for m in together) / len(together), together]]
    moved = [0.0] * len(heights)
    for centre, members in blocks:
        for place, member in enumerate(members):
            moved[member] = centre + (place - (len(members) - 1) / 2) * gap - heights[member]
    return moved


def save(figure, target: pathlib.Path) -> pathlib.Path:
    """Writes a figure as a card with round corners, at once or not at all, and closes it."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    width, height = figure.get_size_inches()
    figure.patch.set_visible(False)
    card = FancyBboxPatch(
        (0.01, 0.01), width - 0.02, height - 0.02, boxstyle="round,pad=0,rounding_size=0.12",
        transform=figure.dpi_scale_trans, facecolor=CARD, edgecolor=GRID, linewidth=1, zorder=-10,
    )  # fmt: skip
    card.set_in_layout(False)
    figure.add_artist(card)
    for axis in figure.axes:
        axis.patch.set_visible(False)
    with files.replacing(target) as scratch:
        figure.savefig(scratch, facecolor="none")
    plt.close(figure)
    return target
