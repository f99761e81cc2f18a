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
        rows = reading.run_rows(workdir)
        if not any(pressure.TAKEN in row for row in rows):
            raise FileNotFoundError(f"no length pressure in {workdir}: set length.every")
        figure = pressure.draw(rows, reading.configuration(workdir).get("length.every", 1))
    return figure_style.save(figure, workdir / f"{kind}.png")
