"""Reads the responses that a run stored, line by line: a step may be larger than memory."""

import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from luspo_jax.hosts import fetched
from luspo_jax.hosts.buckets import is_bucket
from luspo_jax.hosts.fetched import RunCopy
from luspo_jax.metrics import MetricsError, read_metrics
from luspo_jax.rewards.record import FAILURES

_NAME = re.compile(r"step_(\d+)\.jsonl")
# The ids are most of a line and are not shown. In a JSON text a quote follows a backslash, so only
# the field itself can match.
_TOKENS = re.compile(rb'"tokens": \[[\d, ]*\], ')
_PROBLEM = re.compile(rb'\{"prompt_id": (\d+),')
_LISTED = 20  # steps that a message lists


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """A stored response, `luspo_jax.metrics.RolloutRecord`; None for what its line lacks."""

    prompt_id: int | None = None
    sample_id: int | None = None
    prompt: str | None = None
    response: str | None = None
    answer: str | None = None
    reward: float | None = None
    parts: Mapping[str, float] | None = None
    status: str | None = None
    prediction: str | None = None
    advantage: float | None = None
    length: int | None = None
    truncated: bool | None = None
    images: Sequence[str] | None = None

    @property
    def judged(self) -> bool:
        """Whether it has a verdict."""
        return self.status not in FAILURES

    def right(self, part: str | None) -> bool | None:
        """Whether the part of the reward that is accuracy is right; None if nothing says so."""
        if part is None or not self.judged or part not in (self.parts or {}):
            return None
        return self.parts[part] > 0.5

    def value(self, name: str) -> float | None:
        """Returns the reward, or one part of it; None without a verdict."""
        if not self.judged:
            return None
        return self.reward if name == "reward" else (self.parts or {}).get(name)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    **{name: lambda v: type(v) is int for name in ("prompt_id", "sample_id", "length")},
    **{name: lambda v: isinstance(v, str) for name in ("prompt", "response", "answer", "status")},
    **{name: _number for name in ("reward", "advantage")},
    "parts": _numbers,
    "prediction": lambda v: v is None or isinstance(v, str),
    "truncated": lambda v: isinstance(v, bool),
    "images": _names,
}
_OPTIONAL = {"images"}  # runs of text and older ones have none


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What is kept of each response of a step while others are read.

    Attributes:
      offset: of its line in the file.
      group: its group, 0 … in order of the file.
      response: without its texts.
      wanted: whether it passes the filters that look at one response.
    """

    offset: int
    group: int
    response: Response
    wanted: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """The rows of a step in order, and what is to be said about the file."""

    number: int
    rows: Sequence[Row]
    notes: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Stored:
    """The steps whose responses a run has stored so far.

    Attributes:
      folder: of the run.
      steps: step → file, by step.
      config: fields of its configuration; empty if run.json cannot be read.
    """

    folder: pathlib.Path
    steps: Mapping[int, pathlib.Path]
    config: Mapping[str, Any]

    @property
    def accuracy(self) -> str | None:
        """The part of the reward that counts as accuracy; None if run.json does not say."""
        parts = [n.removeprefix("reward.parts.") for n in self.config if "reward.parts." in n]
        return self.config.get("eval.metric") or (parts[0] if len(parts) == 1 else None)


class _Fetched(Mapping):
    """The steps of a run in a bucket; the file of one is downloaded when it is asked for."""

    def __init__(self, copy: RunCopy):
        names = ((_NAME.fullmatch(n.removeprefix("rollouts/")), n) for n in copy.names)
        self._names = dict(sorted((int(match[1]), name) for match, name in names if match))
        self._copy = copy

    def __getitem__(self, step: int) -> pathlib.Path:
        self._copy.fetch(self._names[step])
        return self._copy.folder / self._names[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def found(workdir: str) -> Stored:
    """Finds the responses of a run by its folder or its address in a bucket.

    Raises:
      FileNotFoundError: as `stored`. BucketError: the bucket cannot be read.
    """
    if not is_bucket(workdir):
        return stored(pathlib.Path(workdir))
    copy = RunCopy(workdir)
    copy.fetch("run.json", "metrics.jsonl", "evaluation.json")
    copy.folder.mkdir(parents=True, exist_ok=True)
    with fetched.addressed():
        return stored(copy.folder, _Fetched(copy))


def stored(folder: pathlib.Path, steps: Mapping[int, pathlib.Path] | None = None) -> Stored:
    """Finds the responses of a run, which may be in progress.

    Args:
      folder: of the run.
      steps: step → file; None for those in the folder.

    Raises:
      FileNotFoundError: the folder holds no run, or no responses yet; says why.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: name the --workdir of a run")
    if steps is None:
        matches = ((_NAME.fullmatch(p.name), p) for p in (folder / "rollouts").glob("step_*.jsonl"))
        steps = dict(sorted((int(match[1]), path) for match, path in matches if match))
    config = _config(folder)
    if steps:
        return Stored(folder, steps, config)
    if config.get("output.dump_every") == 0:
        why = "the run stores none (output.dump_every=0)"
    elif (folder / "run.json").exists():
        why = "the run has not finished a step that stores them"
    elif (folder / "evaluation.json").exists():
        why = "this is an evaluation, and its generations/ are read by experiments.evaluate"
    else:
        why = "is this the --workdir of a run?"
    raise FileNotFoundError(f"no responses at {folder / 'rollouts'}: {why}")


def chosen(run: Stored, names: Sequence[str]) -> list[int]:
    """Returns the steps that a flag names: numbers, FIRST-LAST, or `last`; the last one for none.

    Raises:
      FileNotFoundError: no responses of a step; the message lists the steps that there are.
      ValueError: what is no step.
    """
    if not names:
        return [max(run.steps)]
    found: list[int] = []
    for name in names:
        if name == "last":
            found.append(max(run.steps))
            continue
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", name)
        if not match:
            raise ValueError(f"--step={name}: give a number, FIRST-LAST, last, or a list of these")
        first, last = int(match[1]), int(match[2] or match[1])
        inside = [step for step in run.steps if first <= step <= last]
        if not inside:
            raise FileNotFoundError(
                f"--step={name}: {run.folder} holds no responses of it; there are: "
                f"{_listed(list(run.steps))}"
            )
        found += inside
    return list(dict.fromkeys(found))


def read(file: BinaryIO, number: int, wanted: Callable[[Response], bool]) -> Step:
    """Reads a step, and keeps no text of it.

    Args:
      file: open at its beginning.
      number: of the step.
      wanted: the filters that look at one response.
    """
    rows: list[Row] = []
    damaged: list[str] = []
    missing: collections.Counter[str] = collections.Counter()
    group, key, seen = -1, None, set()
    for line_number, offset, line in _lines(file):
        try:
            response, lacks = parse(line)
        except ValueError as error:
            damaged.append(f"line {line_number} ({error})")
            continue
        missing.update(lacks)
        here = (response.prompt_id, response.prompt)
        if group < 0 or here != key or response.sample_id in seen:
            group, key, seen = group + 1, here, set()
        seen |= {response.sample_id} - {None}
        light = dataclasses.replace(
            response, prompt=None, response=None, answer=None, prediction=None, images=None
        )
        rows.append(Row(offset, group, light, wanted(response)))
    return Step(number, rows, list(_notes(damaged, missing, len(rows))))


def load(file: BinaryIO, row: Row) -> Response:
    """Reads a response of an open file again, with its texts."""
    file.seek(row.offset)
    return parse(file.readline())[0]


def parse(line: bytes) -> tuple[Response, list[str]]:
    """Returns the response of a line, and the names of the fields that it lacks.

    Raises:
      ValueError: the line is no response; the message says why.
    """
    try:
        values = json.loads(_TOKENS.sub(b"", line, count=1))
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else ", cut off"
        raise ValueError(f"no JSON{cut}") from error
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    for name, check in _CHECKS.items():
        if name in values and not check(values[name]):
            raise ValueError(f"{name} is {json.dumps(values[name])[:40]}")
    known = {name: values[name] for name in _CHECKS if name in values}
    if not known:
        raise ValueError("none of the fields of a response")
    return Response(**known), [n for n in _CHECKS if n not in known and n not in _OPTIONAL]


def verdicts(run: Stored, problems: set[int], part: str, steps: Sequence[int]):
    """Finds how problems were answered when they were last asked.

    Args:
      run: the run.
      problems: their ids.
      part: of the reward, that is accuracy.
      steps: to look in; the first that holds a problem counts.

    Returns:
      problem → (step, right, judged).
    """
    found: dict[int, tuple[int, int, int]] = {}
    for step in steps:
        missing = problems - found.keys()
        if not missing:
            break
        right, judged = collections.Counter(), collections.Counter()
        with run.steps[step].open("rb") as file:
            for _, _, line in _lines(file):
                match = _PROBLEM.match(line)
                if match and int(match[1]) not in missing:
                    continue
                try:
                    response, _ = parse(line)
                except ValueError:
                    continue
                verdict = response.right(part)
                if response.prompt_id in missing and verdict is not None:
                    right[response.prompt_id] += verdict
                    judged[response.prompt_id] += 1
        found |= {problem: (step, right[problem], judged[problem]) for problem in judged}
    return found


def held_out(run: Stored, step: int) -> dict[str, float]:
    """Returns the held-out accuracies of a step by name; none if the run has not written them."""
    try:
        rows = [r for r in read_metrics(run.folder / "metrics.jsonl") if r["step"] == step]
    except (OSError, MetricsError):  # of a run in progress, or not the concern of this command
        return {}
    return {
        name.removeprefix("val-core/"): value
        for row in rows
        for name, value in row.items()
        if name.startswith("val-core/") and math.isfinite(value)
    }


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Yields (number, offset, line) of each line that is not blank."""
    offset = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, offset, line
        offset += len(line)


def _notes(damaged, missing, total) -> Iterator[str]:
    if damaged:
        shown = "; ".join(damaged[:5]) + ("; …" if len(damaged) > 5 else "")
        many = "lines are" if len(damaged) > 1 else "line is"
        yield f"{len(damaged)} {many} no response and left out: {shown}"
    for name, count in missing.items():
        yield f"{count} of {total} responses have no {name}: it is shown as ?"
    if not total:
        yield "no response can be read"


def _config(folder: pathlib.Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _listed(steps: list[int]) -> str:
    """Lists steps, those in a row as FIRST-LAST."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in ranges]
    if len(shown) > _LISTED:
        shown = [*shown[: _LISTED // 2], "…", *shown[-_LISTED // 2 :]]
    return ", ".join(shown)
