"""Tasks of the package reasoning-gym: an item by task, options and number, the same everywhere.

A dataset draws an item here for its question; the worker that scores a response draws it again, so
that metadata of any kind (tuples, dates, boards) reaches the scorer without a way through JSON.
The package is imported when the first item is drawn, which takes about a second.
"""

import copy
import dataclasses
import functools
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any

from luspo_jax.hosts.values import Number, nearest, refusal

PACKAGE = "reasoning-gym"
NUMBERS = 2**32 - 1  # numpy's seeds, which some tasks use, end here

# Options that every task takes besides its own.
_LEVEL_OPTIONS = ("level", "levels", "level_mode")
_MODES = ("inclusive", "upper_bound")

# Fields of a task's configuration that belong to the dataset, not to the item.
_PLACE = ("seed", "size")

# Tasks that draw from the seed when they are constructed, once for all items. The second of five
# items: the first would use one random stream for two draws, and fewer leave out kinds of `acre`.
_CONSTRUCTED = frozenset({"acre", "gsm_symbolic", "list_functions"})
_FEW, _SECOND = 5, 1

# Tasks whose items follow the order of a set of texts, which differs from process to process.
HASH_SEEDED = frozenset(
    (
        *("intermediate_integration", "isomorphic_strings", "knight_swap", "list_functions"),
        *("polynomial_multiplication", "ransom_note", "word_ladder"),
    )
)

# Task → why it is refused.
UNUSABLE = {
    "codeio": "its programs use random numbers that no seed fixes",
    "game_of_life_halting": "its scorer gives every answer the full score",
}

# Not tasks: they join others, which options of the dataset do.
_JOINTS = ("composite",)


class TaskError(ValueError):
    """A task or its options are not usable; the message continues a field: `.min_terms=…`."""


def version() -> str:
    """Returns the version of the package, on which items and scores depend.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"the package {PACKAGE} is not installed: pip install 'luspo_jax[tasks]'"
        ) from None


def names() -> list[str]:
    """Returns the names of all tasks that can be used."""
    left_out = {*_JOINTS, *UNUSABLE}
    return [name for name in sorted(_factory().DATASETS) if name not in left_out]


def check(task: str, options: Mapping[str, Any]) -> None:
    """Refuses an unknown task, and options that it does not take.

    Raises:
      TaskError: with the option, the task and the remedy.
    """
    if isinstance(task, str) and task in UNUSABLE:
        raise TaskError(f".task={task!r} cannot be used: {UNUSABLE[task]} ({PACKAGE} {version()})")
    if not isinstance(task, str) or task not in names():
        raise TaskError(f".task={task!r} does not exist: {nearest(task, names())}")
    if task in HASH_SEEDED and not os.environ.get("PYTHONHASHSEED", "").isdecimal():
        raise TaskError(
            f".task={task!r} draws other items in every process unless the environment fixes "
            "Python's order of sets: start the command with PYTHONHASHSEED=0"
        )
    generator(task, options)


def generator(task: str, options: Mapping[str, Any]) -> Any:
    """Returns the package's dataset for a task; it is shared: do not change it."""
    return _generator(task, as_text(options))


def attributes(task: str) -> Mapping[str, Any]:
    """Returns attribute → definition of a task's curriculum; empty if it has none."""
    factory = _factory()
    return factory.create_curriculum(task).attributes if task in factory.CURRICULA else {}


def as_text(options: Mapping[str, Any]) -> str:
    """Returns options as one JSON text, equal for equal options.

    Raises:
      TaskError: a value that is no text, number, truth value or list or mapping of these.
    """
    try:
        return json.dumps(dict(options), sort_keys=True)
    except TypeError as error:
        raise TaskError(f": values must be texts, numbers, lists or sections ({error})") from None


def item(task: str, options: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Draws the item with a number: {"question", "answer", "metadata"}.

    Args:
      task: one of `names()`.
      options: of the task, as `check` accepts them.
      number: from 1 to NUMBERS.

    Raises:
      TaskError: as `check`.
      Exception: whatever the package raises when a draw fails, as some of its tasks do at times.
    """
    shared = generator(task, options)
    if task in _CONSTRUCTED:
        config = dataclasses.replace(shared.config, seed=number - 1, size=_FEW)
        return type(shared)(config=config)[_SECOND]
    seeded = copy.copy(shared)  # its word lists and tables are shared
    seeded.config = copy.copy(shared.config)
    seeded.seed = seeded.config.seed = number
    return seeded[0]


def grade(task: str, options: Mapping[str, Any], entry: Mapping[str, Any], answer: str) -> float:
    """Returns the task's own score of an answer to an item of `item`; 1 if it is right."""
    scorer = generator(task, options)
    return float(scorer.score_answer(answer, copy.deepcopy(dict(entry))))


@functools.lru_cache(maxsize=32)
def _generator(task: str, text: str) -> Any:
    """Constructs a task's dataset from its options; word lists make this slow for some."""
    dataset, kind = _factory().DATASETS[task]
    config = _config(task, kind, json.loads(text))
    try:
        return dataset(config=config)
    except Exception as error:  # the package checks values by `assert`, or not at all
        raise TaskError(_refused(task, error)) from error


def _config(task: str, kind: type, options: dict[str, Any]) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind) if f.name not in _PLACE}
    level = {name: options.pop(name) for name in _LEVEL_OPTIONS if name in options}
    for name, value in options.items():
        if name not in known:
            near = nearest(name, [*known, *_LEVEL_OPTIONS])
            raise TaskError(f".{name}: task {task!r} has no such option; {near}")
        options[name] = _typed(task, known[name], value)
    try:
        config = kind(**{**_at_level(task, **level), **options}, seed=1, size=_FEW)
        if hasattr(config, "validate"):
            config.validate()
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(_refused(task, error)) from error
    return config


def _typed(task: str, field: dataclasses.Field, value: Any) -> Any:
    """Returns the value of an option as the task's configuration has it, where that is plain."""
    if field.type in (bool, int, float, str):
        problem = refusal(f".{field.name}", value, field.type)
        if problem:
            raise TaskError(f"{problem} (task {task!r})")
    if isinstance(field.default, tuple) and isinstance(value, list):
        return tuple(value)
    return value


def _refused(task: str, error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return f": task {task!r} refuses these values: {said}"


def _at_level(
    task: str, level: int | None = None, levels: Any = None, level_mode: str = _MODES[0]
) -> dict[str, Any]:
    """Returns the values that a task's curriculum gives at a level.

    Args:
      task: the task.
      level: of every attribute of the curriculum, which keep to the highest that they have; None
        for each attribute's own default.
      levels: attribute → its level, in place of `level`.
      level_mode: whether ranges hold all levels up to this one, or the highest step alone.
    """
    factory = _factory()
    if level is None and not levels:
        return {}
    if task not in factory.CURRICULA:
        raise TaskError(f".level: task {task!r} has no levels, only options of its own")
    if level_mode not in _MODES:
        raise TaskError(f".level_mode={level_mode!r}: choose one of {', '.join(_MODES)}")
    curriculum = factory.create_curriculum(task)
    sizes = {name: len(a.levels) for name, a in curriculum.attributes.items()}
    if level is not None:
        _check_level(".level", level, max(sizes.values()), task)
        curriculum.set_global_level(level)
    for name, value in _section(levels, task).items():
        if name not in sizes:
            raise TaskError(f".levels.{name}: not of task {task!r}; {nearest(name, sizes)}")
        _check_level(f".levels.{name}", value, sizes[name], task)
        curriculum.set_attr_level(name, value)
    made = curriculum.generate_configuration(context=_context(level_mode))
    return {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name not in _PLACE}


def _section(levels: Any, task: str) -> Mapping[str, Any]:
    if levels is None:
        return {}
    if not isinstance(levels, Mapping):
        raise TaskError(f".levels={levels!r} must be a section: attribute → level (task {task!r})")
    return levels


def _check_level(name: str, value: Any, count: int, task: str) -> None:
    problem = refusal(name, value, int, Number(0, count - 1))
    if problem:
        raise TaskError(f"{problem} (task {task!r})")


def _context(mode: str) -> Any:
    from reasoning_gym.coaching.base_curriculum import (
        DefaultCurriculumContext,
        RangeAttributeMode,
    )

    return DefaultCurriculumContext(mode=RangeAttributeMode(mode))


@functools.cache
def _factory() -> Any:
    """Imports the package, and returns the module that knows its tasks."""
    version()
    import reasoning_gym.factory  # its import is slow, and needs the extra

    return reasoning_gym.factory
