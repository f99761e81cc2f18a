"""Draws the documentation's figures from recorded numbers: `python -m experiments.redraw`.

Numbers are kept in docs/figures/ and beside the figures of studies, so nothing is run.
`--record_run` takes a run's numbers over first, `--record_sweep` a sweep's.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import flags

from experiments import command
from experiments.drawing import benches, chart, lengths, pressure, reading, summary, tokens
from luspo_jax.hosts import figure_style, files
from luspo_jax.metrics import json_line, read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs/figures"
STUDIES = ROOT / "experiments/studies"

_ONLY = flags.DEFINE_multi_string("only", [], "Part of a figure's path; may be repeated.")
_RUN = flags.DEFINE_string("record_run", None, "A quickstart run that measured length pressure.")
_SWEEP = flags.DEFINE_string("record_sweep", None, "A sweep, for accuracy against tokens.")
_VARIANTS = flags.DEFINE_multi_string("variant", [], "Of the sweep, as NAME or NAME=LABEL.")


def main() -> None:
    """Records what is asked for, draws, and prints the paths."""
    if _RUN.value:
        record_run(pathlib.Path(_RUN.value), RECORDS)
    if _SWEEP.value:
        record_sweep(pathlib.Path(_SWEEP.value), _VARIANTS.value, RECORDS)
    for target, draw in figures().items():
        if all(part in str(target) for part in _ONLY.value):
            print(figure_style.save(draw(), target).relative_to(ROOT))


def figures() -> dict[pathlib.Path, Callable]:
    """Returns file → what makes its figure, of all whose numbers are recorded."""
    docs = ROOT / "docs"
    found = {
        docs / "quickstart.png": lambda: summary.draw(_rows(), "configs/quickstart.py"),
        docs / "figures/lengths.png": lambda: lengths.draw(_responses()),
        docs / "figures/pressure.png": lambda: pressure.draw(_rows(), _every()),
        docs / "figures/tokens.png": lambda: tokens.draw(_paths()),
        docs / "head_memory.png": lambda: benches.head_memory(_json(RECORDS / "head_memory.json")),
        docs / "long_context.png": lambda: benches.long_context(
            _json(RECORDS / "long_context.json")
        ),
    }
    for record in sorted(STUDIES.glob("*/*.json")):
        if record.with_suffix(".png").is_file():
            found[record.with_suffix(".png")] = _of_study(record)
    return found


def _of_study(record):
    if record.parent.name == "length_control":
        from experiments.studies.length_control import figure

        return lambda: figure.draw(figure.Recorded(_json(record)))
    return lambda: chart.draw(chart.loads(record.read_text(encoding="utf-8")))


def record_run(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Keeps what the figures show of a run: its drawn metrics, and lengths and rewards by step."""
    every = reading.configuration(workdir)["length.every"]
    kept = [
        {name: value for name, value in row.items() if _is_drawn(name)}
        for row in reading.run_rows(workdir)
    ]
    text = "".join(json_line(row.pop("step"), _short(row)) for row in kept)
    files.write_text(folder / "quickstart.jsonl", text)
    steps = [
        {
            "step": step.step,
            "lengths": step.lengths_B.tolist(),
            "rewards": [float(f"{reward:g}") for reward in step.rewards_B],
            "truncated": step.truncated,
        }
        for step in reading.responses(workdir)
    ]
    lines = ",\n".join(json.dumps(step, separators=(",", ":")) for step in steps)
    stored = f'{{"every": {every}, "steps": [\n{lines}\n]}}\n'
    files.write_text(folder / "quickstart_lengths.json", stored)


def _is_drawn(name):
    first, *rest = name.split("/")
    return name in (
        "step", "reward", "response_length/mean", "length/correct_mean", "length/incorrect_mean",
        "rollout/generated_tokens",
    ) or first in ("val-core", "val-aux") or (
        name.startswith("length/pressure/") and len(rest) == 2
    )  # fmt: skip


def _short(row: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in row.items() if name != "nonfinite"}


def record_sweep(workdir: pathlib.Path, variants: Sequence[str], folder: pathlib.Path) -> None:
    """Keeps the paths of a sweep's variants, of those that are named or of all."""
    found = tokens.read(workdir)
    names = [text.partition("=") for text in variants] or [(name, "", "") for name in found]
    stored = {
        label or name: [
            [[float(f"{x:.6g}") for x in values] for values in path] for path in found[name]
        ]
        for name, _, label in names
    }
    files.write_text(folder / "tokens.json", json.dumps(stored, ensure_ascii=False) + "\n")


def _json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _rows():
    return list(read_metrics(RECORDS / "quickstart.jsonl"))


def _every():
    return _json(RECORDS / "quickstart_lengths.json")["every"]


def _responses():
    return [
        reading.Responses(
            step["step"], np.array(step["lengths"]), np.array(step["rewards"]), step["truncated"]
        )
        for step in _json(RECORDS / "quickstart_lengths.json")["steps"]
    ]


def _paths():
    return {
        name: [tuple(np.array(values) for values in path) for path in paths]
        for name, paths in _json(RECORDS / "tokens.json").items()
    }


if __name__ == "__main__":
    sys.exit(command.call(main))
