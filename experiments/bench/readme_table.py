"""Writes README.md's table of one RL step from what `experiments.bench.rl_step` measured.

`python -m experiments.bench.readme_table --json=SYNTHETIC.json,SMOLLM2.json` writes it between the
marks in README.md.
"""

import json
import pathlib
import sys

from absl import flags

from experiments import command
from experiments.bench import step_markdown

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"

_JSON = flags.DEFINE_list("json", [], "Files of experiments.bench.rl_step, in the order shown.")


def main() -> None:
    """Writes the section into README.md."""
    if not _JSON.value:
        raise command.UsageError("--json names the files of what was measured")
    records = [json.loads(pathlib.Path(path).read_text(encoding="utf-8")) for path in _JSON.value]
    text = README.read_text(encoding="utf-8")
    README.write_text(
        step_markdown.with_section(text, step_markdown.section(records)), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(command.call(main))
