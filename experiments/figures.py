"""Figures of a run, by kind, each one file in its folder."""

import pathlib

from experiments.drawing import lengths, pressure, reading, summary, tokens
from luspo_jax.hosts import figure_style

KINDS = ("summary", "lengths", "tokens", "pressure")


def run_figure(workdir: pathlib.Path, kind: str = "summary") -> pathlib.Path:
    """Draws a run to KIND.png in its folder; returns the path.

    Args:
      workdir: of the run; for `tokens` also of a sweep.
      kind: `summary`: reward, length and held-out accuracy over steps (of a supervised run: losses,
        the length of answers, how many are the demonstrated ones). `lengths`: the distribution of
        lengths, from `rollouts/`. `tokens`: accuracy against tokens. `pressure`: length pressure
        against the change that followed.

    Raises:
      FileNotFoundError: the folder holds no run, or not what the figure needs.
      ValueError: the run measured no length pressure.
    """
    workdir = pathlib.Path(workdir)
    if kind == "summary":
        figure = summary.draw(reading.run_rows(workdir), workdir.name)
    elif kind == "lengths":
        reading.run_rows(workdir)
        figure = lengths.draw(reading.responses(workdir))
    elif kind == "tokens":
        figure = tokens.draw(tokens.read(workdir))
    else:
        every = reading.configuration(workdir).get("length.every", 1)
        figure = pressure.draw(reading.run_rows(workdir), every)
    return figure_style.save(figure, workdir / f"{kind}.png")
