"""Lists the tasks of reasoning-gym, or shows one: its options, its levels, and some items.

    python -m experiments.tasks
    python -m experiments.tasks --task=countdown --options="{'level': 2}"
    python -m experiments.tasks --write=docs/tasks.md

The last measures every task and writes the tables of docs/tasks.md: minutes.
"""

import ast
import dataclasses
import pathlib
import statistics
import sys
import time
import types
from typing import Any

from absl import flags

from experiments import command
from experiments.verdicts.page import table, write_section
from luspo_jax.datasets import overlap
from luspo_jax.datasets.reasoning_gym import reasoning_gym
from luspo_jax.rewards import gym_tasks

_TASK = flags.DEFINE_string("task", "", "The task to show; empty lists all.")
_OPTIONS = flags.DEFINE_string("options", "{}", "Its options, as {'level': 2}.")
_SHOW = flags.DEFINE_integer("show", 3, "Items shown.", 1)
_WRITE = flags.DEFINE_string("write", "", "Write the tables into this Markdown file.")

_DRAWN, _SECONDS = 50, 0.25  # items drawn of each task, and processor time spent on them at most
_COMMAND = "    python -m experiments.tasks --write=docs/tasks.md"
_SPLITS = ("chain_sum", "gcd", "letter_counting", "spell_backward", "coin_flip")
_ASKED = 500  # problems of each split that are compared


def group(task: str) -> str:
    """Returns the group that the package puts a task into."""
    return gym_tasks.generator(task, {}).category


def levels(task: str) -> dict[str, list]:
    """Returns attribute of the task's curriculum → its value at each level; empty without one."""
    attributes = gym_tasks.attributes(task)
    return {name: list(attribute.levels) for name, attribute in attributes.items()}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What items of a task are like, drawn under its default options.

    Attributes:
      words: of a question, the median.
      milliseconds: of processor time to draw an item, the mean.
      drawn: items drawn.
      different: different questions among them.
    """

    words: int
    milliseconds: float
    drawn: int
    different: int


def measure(task: str, drawn: int = _DRAWN, seconds: float = _SECONDS) -> Measured:
    """Draws items of a task until there are enough or time is up."""
    gym_tasks.item(task, {}, 1)  # word lists are read once
    questions, start = [], time.process_time()
    for number in range(2, drawn + 2):
        try:
            questions.append(gym_tasks.item(task, {}, number)["question"])
        except Exception:
            continue  # some tasks give up on a draw; the dataset draws again
        if time.process_time() - start > seconds:
            break
    spent = 1e3 * (time.process_time() - start) / len(questions)
    words = round(statistics.median(len(question.split()) for question in questions))
    return Measured(words, spent, len(questions), len(set(questions)))


def all_tasks() -> str:
    """Returns the table of all tasks, by group."""
    rows = []
    for name in sorted(gym_tasks.names(), key=lambda name: (group(name), name)):
        found, steps = measure(name), levels(name).values()
        high = str(max(map(len, steps)) - 1) if steps else "–"
        share = f"{found.different} of {found.drawn}"
        rows.append(
            [group(name), _marked(name), high, found.words, f"{found.milliseconds:.2g}", share]
        )
    head = ["group", "task", "highest level", "words", "ms an item", "different questions"]
    return table(head, rows)


def _marked(task: str) -> str:
    return f"`{task}`{' *' if task in gym_tasks.HASH_SEEDED else ''}"


def shared(task: str) -> tuple[int, int, int]:
    """Counts test questions that are asked in training too, of `_ASKED` in each split.

    Returns:
      (by the package with seeds 42 and 43, by the package with seeds a million apart, here).
    """
    own = [reasoning_gym(split, task=task, size=_ASKED) for split in ("train", "test")]
    return (
        _whole(_package(task, 42), _package(task, 43)),
        _whole(_package(task, 42), _package(task, 1_000_042)),
        _whole(*own),
    )


def _package(task: str, seed: int) -> list:
    import reasoning_gym as package

    items = package.create_dataset(task, seed=seed, size=_ASKED)
    return [types.SimpleNamespace(id=n, problem=item["question"]) for n, item in enumerate(items)]


def _whole(trained, held_out) -> int:
    return len(overlap(held_out, trained).at_least(1))


def all_shared() -> str:
    """Returns the table of questions that two splits share."""
    head = ["task", "package, seeds 42 and 43", "package, seeds 42 and 1,000,042", "here"]
    return table(head, [[f"`{task}`", *shared(task)] for task in _SPLITS])


def one(task: str, options: dict[str, Any], show: int) -> str:
    """Describes a task: options with defaults, levels, and items with their answers."""
    gym_tasks.check(task, options)
    config = gym_tasks.generator(task, options).config
    lines = [f"{task} ({group(task)})", "options:"]
    lines += [
        f"  {field.name} = {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in ("seed", "size")
    ]
    lines += ["levels:"] if levels(task) else ["levels: none"]
    lines += [
        f"  {name}: {', '.join(f'{k} = {value}' for k, value in enumerate(values))}"
        for name, values in levels(task).items()
    ]
    for example in reasoning_gym("train", task=task, **options)[:show]:
        lines += ["", f"--- {example.id}", example.problem, f"=> {example.answer}"]
    return "\n".join(lines)


def main() -> None:
    """Shows one task, lists all, or writes the tables."""
    try:
        gym_tasks.version()
    except ValueError as error:
        raise command.UsageError(str(error)) from error
    if _WRITE.value:
        page = pathlib.Path(_WRITE.value)
        write_section(
            page, "Splits", f"Written by\n\n{_COMMAND}\n\n{_SPLITS_TEXT}\n\n{all_shared()}"
        )
        write_section(
            page, "All tasks", f"Written by\n\n{_COMMAND}\n\n{_ALL_TEXT}\n\n{all_tasks()}"
        )
        return
    if not _TASK.value:
        for name in gym_tasks.names():
            steps = levels(name).values()
            print(f"{name} ({f'levels 0 to {max(map(len, steps)) - 1}' if steps else 'no levels'})")
        return
    try:
        options = ast.literal_eval(_OPTIONS.value)
        print(one(_TASK.value, options, _SHOW.value))
    except (SyntaxError, TypeError, ValueError) as error:
        raise command.UsageError(f"--task={_TASK.value}, --options{error}") from error


_SPLITS_TEXT = f"""\
A hash of a question decides its split, one in four for the test; a hash of seed and place decides
which items are drawn. So train and test share no question, under any seeds and options, even where
a task has few; a question may occur several times within a split. The package itself draws an item
from seed + index. Below: how many of {_ASKED} test questions are also among {_ASKED} training
questions, compared by `luspo_jax.datasets.overlap`."""

_ALL_TEXT = f"""\
Under default options: the highest `level` of the curriculum, words of a question (median),
processor time to draw an item, and different questions among {_DRAWN} items (fewer where they took
longer than {_SECONDS:g} seconds). The test split draws four items for each of its problems.

\\* its items follow the order of Python's sets: start commands with `PYTHONHASHSEED=0`."""

if __name__ == "__main__":
    sys.exit(command.call(main))
