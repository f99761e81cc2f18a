"""Shows the first prompts of a configuration as the model will see them, token by token:

    python -m experiments.preview --config=configs/quickstart.py
    python -m experiments.preview --config=FILE --num=10 --html=prompts.html --config.data.limit=100

Prompts are in the order of training, which the seed decides, after filter, template and chat
template; `--held_out` shows those that are held out. Tokens have two colours by turns, special ones
a third; `--ids` prints their numbers. Above stand what was read, what is left out and why, and how
long prompts are. No weights are read. Of a configuration of supervised fine-tuning it shows
demonstrations, with the tokens underlined that are trained on. `--html=FILE` writes a page instead.
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from experiments import command

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
_NUM = flags.DEFINE_integer("num", 3, "Prompts to show.", 1, 10_000)
_HELD_OUT = flags.DEFINE_bool("held_out", False, "Show held-out prompts.")
_IDS = flags.DEFINE_bool("ids", False, "Print the numbers of tokens too.")
_SURVEY = flags.DEFINE_integer("survey", 2000, "Problems whose lengths are measured at most.", 1)
_HTML = flags.DEFINE_string("html", "", "Write a page to this file instead of printing.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing --html page.")


def main() -> None:
    """Prints the prompts, or writes the page."""
    path = pathlib.Path(_HTML.value) if _HTML.value else None
    if path is not None:
        from experiments.responses import page as pages

        pages.check_place(path, overwrite=_OVERWRITE.value)
    from experiments.prompts import page, reading

    config = command.config_value(_CONFIG)
    found = reading.preview(config, _NUM.value, _SURVEY.value, held_out=_HELD_OUT.value)
    if path is not None:
        page.write(path, found, ids=_IDS.value)
        print(f"{path}: {found.title}")
        return
    from experiments.prompts import terminal
    from experiments.responses.terminal import console

    terminal.show(found, console(), ids=_IDS.value)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("config",)))
