"""Writes the tables of one RL step into docs/speed.md, and lines of them into README.md.

`python -m experiments.bench.readme_table --json=SYNTHETIC.json,SMOLLM2.json` writes them between
the marks there, from what `experiments.bench.rl_step` measured.
"""

import json
import pathlib
import sys

from absl import flags

from experiments import command
from experiments.bench import step_markdown

ROOT = pathlib.Path(__file__).resolve().parents[2]

_JSON = flags.DEFINE_list("json", [], "Files of experiments.bench.rl_step, in the order shown.")


def main() -> None:
    """Writes both sections."""
    if not _JSON.value:
        raise command.UsageError("--json names the files of what was measured")
    records = [json.loads(pathlib.Path(path).read_text(encoding="utf-8")) for path in _JSON.value]
    for name, written, marks in (
        ("docs/speed.md", step_markdown.section(records), step_markdown.TABLES),
        ("README.md", step_markdown.summary(records), step_markdown.SUMMARY),
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        text = step_markdown.with_section(text, written, marks)
        (ROOT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(command.call(main))
