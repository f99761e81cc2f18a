"""Reads demonstrations: a file's rows of prompt and response, or of chat messages; or generated."""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax.datasets import filters, label_sums, sources
from luspo_jax.datasets.example import DataError, Example, Report
from luspo_jax.datasets.label_sums import LabelSums
from luspo_jax.datasets.rows import Row, column, rows_of
from luspo_jax.datasets.selection import ALL, Selection
from luspo_jax.datasets.table import BadRows, encodable, text
from luspo_jax.hosts import fetched
from luspo_jax.hosts.values import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns of a file of demonstrations.

    Attributes:
      prompt, response: of the two texts.
      messages: of a list of {role, content}; if set, the other two are not read.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str = ""


@fetched.addressed()
def read_demonstrations(
    path: str | pathlib.Path,
    columns: Columns,
    split: str = "train",
    selection: Selection = ALL,
) -> tuple[list[Example], Report]:
    """Reads the demonstrations of a file: each an Example whose answer is the response.

    Its id is the row, counted from 1. A chat's messages are in `meta["messages"]`; its problem is
    the last message of a user and its answer the last one of the assistant. Texts stay as they are,
    blanks at their ends included. Rows that repeat are kept: how often a text occurs is its weight.

    Args:
      path: .jsonl, .json, .csv or .parquet files, as `sources.found` reads it.
      columns: to read.
      split: of a folder or repository.
      selection: which rows are taken.

    Raises:
      DataError: no such file, or unusable rows, all in one message: file, row and column.
    """
    paths = sources.found(path, split, selection)
    keeps, bad = filters.made(selection.filter), BadRows(paths[0])
    examples, filtered = [], 0
    for place, number, row in itertools.islice(rows_of(paths, bad.add), selection.limit or None):
        try:
            if keeps is not None and not keeps.keeps(row, place):
                filtered += 1
            else:
                examples.append(_example(row, columns, number, place))
        except DataError as error:
            if keeps is not None and not (examples or filtered or selection.drop_bad_rows):
                raise  # at the first row: a filter is easily wrong
            bad.add(error)
    if bad.count and not (selection.drop_bad_rows and examples):
        raise bad.error(len(examples))
    if not examples:
        left_out = f": data.filter leaves out all {filtered:,}" * bool(filtered)
        raise DataError(f"{paths[0]}: there are no rows in it{left_out}")
    report = Report(
        "file",
        sources.described(paths),
        sources.sha256(paths),
        len(examples) + bad.count,
        len(examples),
        unusable=bad.count,
        filtered=filtered,
    )
    return examples, report


def _example(row: Row, columns: Columns, number: int, place: str) -> Example:
    if not columns.messages:
        prompt, response = (
            _cell(row, name, text, place) for name in (columns.prompt, columns.response)
        )
        return Example(number, prompt, response)
    messages = _cell(row, columns.messages, _messages, place)
    last = {m["role"]: m["content"] for m in messages}
    return Example(number, last.get("user", ""), last[ASSISTANT], {"messages": messages})


def _cell(row: Row, name: str, clean: Callable[[Any], Any], place: str) -> Any:
    _, value = column(row, (name,), place)
    try:
        cleaned = clean(value)
        return encodable(cleaned) if isinstance(cleaned, str) else cleaned
    except ValueError as error:
        raise DataError(f"{place}: column {name!r} {error}") from error


def _messages(value: Any) -> list[dict[str, str]]:
    """Converts a cell to messages that end with one of the assistant."""
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of messages, {'role': …, 'content': …}")
    messages = [_message(item, number) for number, item in enumerate(value, start=1)]
    if messages[0]["role"] == ASSISTANT:
        raise ValueError("begins with a message of the assistant: the first must ask for it")
    if messages[-1]["role"] != ASSISTANT:
        raise ValueError(
            f"ends with a message of the {messages[-1]['role']}: the last must be the assistant's, "
            "for it is what is trained on"
        )
    return messages


def _message(item: Any, number: int) -> dict[str, str]:
    if not isinstance(item, Mapping) or not {"role", "content"} <= set(item):
        has = f"has {', '.join(map(str, item))}" if isinstance(item, Mapping) else "is no object"
        raise ValueError(f"holds a message without role and content: number {number} {has}")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        raise ValueError(
            f"holds a message of the unknown role {role!r} (number {number}): "
            f"{nearest(role, ROLES)}"
        )
    if not isinstance(content, str):
        raise ValueError(
            f"holds a message whose content is not text but {type(content).__name__} (number "
            f"{number}): tool calls and images are not read"
        )
    if role == ASSISTANT and not content.strip():
        raise ValueError(f"holds an empty message of the assistant (number {number})")
    return {"role": role, "content": encodable(content)}


@dataclasses.dataclass(frozen=True)
class SumTraces(Sequence):
    """Right answers to label_sums problems that write down every step.

    Attributes:
      split: "train" or "test".
      num_terms: of a problem.
    """

    split: str
    num_terms: int = 6

    @property
    def _problems(self) -> LabelSums:
        return LabelSums(self.split, self.num_terms)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Example:
        problem = self._problems[index]
        steps = (1,) * self.num_terms
        return dataclasses.replace(problem, answer=label_sums.trace(problem.meta["values"], steps))


# Name → demonstrations of a split, made instead of read.
GENERATED: dict[str, Callable[[str], Sequence[Example]]] = {"label_sums": SumTraces}


def split_off(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Splits off a share of the rows, at least one, drawn by a seed: (the rest, the share).

    Rows with the same prompt stay together, so that none is both trained on and held out.

    Raises:
      DataError: nothing would be left to train on.
    """
    groups = collections.defaultdict(list)
    for place, example in enumerate(examples):
        given = example.meta.get("messages", [])[:-1]
        groups[repr((example.problem, given))].append(place)
    keys = list(groups)
    wanted, taken = max(1, round(fraction * len(examples))), set()
    for index in np.random.default_rng(seed).permutation(len(keys)):
        if len(taken) >= wanted:
            break
        taken.update(groups[keys[index]])
    rest = [x for place, x in enumerate(examples) if place not in taken]
    if not rest:
        raise DataError(
            f"a share of {fraction:g} of {len(examples)} rows leaves none to train on: lower it, "
            "or name a file of held-out rows"
        )
    return rest, [examples[place] for place in sorted(taken)]
