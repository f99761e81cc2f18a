"""Shows the responses of a run's steps, which may be in progress; nothing of it is changed:

`python -m experiments.show RUN [--step=N] [filters] [--html=FILE]`

RUN is the --workdir of a run, a folder or gs://… or s3://…. A summary of the step comes first, then
its groups: the prompt, and each response with length, reward by part, advantage, whether it was cut
at the limit, and status. Filters combine: a response must pass all. `--longest` and `--shortest`
apply to what the others leave, and `--limit` to what these leave. A problem's verdict is "all
right", "some right" or "all wrong"; `--changed` shows the problems whose verdict is another than
when they were last asked. Of held-out problems a run keeps figures alone; `experiments.evaluate`
stores its responses.
"""

import pathlib
import sys

from absl import flags

from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or address of the run; or RUN alone.")
_STEP = flags.DEFINE_list("step", [], "Steps: N, FIRST-LAST, last; unset = last.")
_HTML = flags.DEFINE_string("html", "", "Write a page to this file instead of printing.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing --html page.")
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Responses of a step to show; 0 = all, unset = 16, or 4096 on a page.", 0
)
_CHARS = flags.DEFINE_integer(
    "chars", None, "Characters of a text to show; 0 = all, unset = 1200, or 4000 on a page.", 0
)
_LONGEST = flags.DEFINE_integer("longest", 0, "Only the so many longest, longest first.", 0)
_SHORTEST = flags.DEFINE_integer("shortest", 0, "Only the so many shortest, shortest first.", 0)
_TRUNCATED = flags.DEFINE_bool("truncated", None, "Only those cut at the limit; --no…: the others.")
_ADVANTAGE = flags.DEFINE_enum("advantage", None, ["pos", "neg", "zero"], "Only of this sign.")
_STATUS = flags.DEFINE_enum(
    "status", None, ["ok", "unparsed", "timeout", "error"], "Only with this status of the reward."
)
_BELOW = flags.DEFINE_list("below", [], "Only if reward, or a part of it, is below: NAME:NUMBER,…")
_ABOVE = flags.DEFINE_list("above", [], "Only if reward, or a part of it, is above: NAME:NUMBER,…")
_FIND = flags.DEFINE_string("find", "", "Only responses with this text in them, in any case.")
_PROBLEM = flags.DEFINE_list("problem", [], "Only these problems, by id.")
_CHANGED = flags.DEFINE_bool("changed", False, "Only problems whose verdict changed.")
_AGAINST = flags.DEFINE_integer(
    "against", None, "With --changed: compare with this step, not the last that asked the problem."
)


def main() -> None:
    """Prints the steps, or writes the page."""
    from experiments.responses import reading

    if _HTML.value:
        from experiments.responses import page

        path = pathlib.Path(_HTML.value)
        page.check_place(path, overwrite=_OVERWRITE.value)
    filters = _filters()
    run = reading.found(_WORKDIR.value)
    try:
        steps = reading.chosen(run, _STEP.value)
    except ValueError as error:
        raise command.UsageError(str(error)) from error
    if _HTML.value:
        shown = page.write(path, run, steps, filters, chars=_chars(4000), against=_AGAINST.value)
        print(f"{path}: {_counted(shown, 'response')} of {_counted(len(steps), 'step')}")
        return
    from experiments.responses import terminal
    from experiments.responses.view import view

    console = terminal.console()
    for number in steps:
        with run.steps[number].open("rb") as file:
            step = view(run, number, file, filters, against=_AGAINST.value)
            terminal.show(step, console, chars=_chars(1200))


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _chars(usual: int) -> int:
    return usual if _CHARS.value is None else _CHARS.value


def _filters():
    """Returns the filters of the flags.

    Raises:
      UsageError: a flag cannot be read, or needs another.
    """
    from experiments.responses.selection import Filters, bound

    if _AGAINST.value is not None and not _CHANGED.value:
        raise command.UsageError("--against needs --changed")
    wrong = [text for text in _PROBLEM.value if not text.strip().removeprefix("-").isdecimal()]
    if wrong:
        raise command.UsageError(f"--problem={wrong[0]}: give ids of problems, whole numbers")
    usual = 4096 if _HTML.value else 16
    return Filters(
        truncated=_TRUNCATED.value,
        advantage=_ADVANTAGE.value or "",
        status=_STATUS.value or "",
        bounds=[
            *(bound(text, above=False) for text in _BELOW.value),
            *(bound(text, above=True) for text in _ABOVE.value),
        ],
        find=_FIND.value,
        problems=[int(text) for text in _PROBLEM.value],
        changed=_CHANGED.value,
        longest=_LONGEST.value,
        shortest=_SHORTEST.value,
        limit=usual if _LIMIT.value is None else _LIMIT.value,
    )


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",), positional="workdir"))
