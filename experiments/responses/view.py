"""What is shown of a step: the same words and figures in the terminal and on a page."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from experiments.command import UsageError
from experiments.responses import reading, selection, texts
from experiments.responses.reading import Response, Row, Step, Stored
from experiments.responses.selection import Filters

PHRASE = 200  # characters of a phrase that holds a text, such as an answer


@dataclasses.dataclass(frozen=True)
class GroupView:
    """A problem and those of its responses that are shown.

    Attributes:
      title: which problem.
      facts: phrases about all of its responses.
      prompt, answer: its texts; None if unknown.
      verdicts: of all its responses, in order.
      responses: to show, with their texts.
    """

    title: str
    facts: Sequence[str]
    prompt: str | None
    answer: str | None
    verdicts: Sequence[bool | None]
    responses: Sequence[Response]


@dataclasses.dataclass(frozen=True)
class StepView:
    """A step.

    Attributes:
      number: of the step.
      title: run and step.
      facts: (name, value) of its summary.
      notes: what is to be said about the file.
      shown: which of its responses follow, in words.
      accuracy: the part of the reward that counts as accuracy; None if unknown.
      find: text that was searched for.
      num_shown: responses that follow.
      num_matching: responses that pass the filters; more than follow if there is a limit.
      longest: tokens of the longest response of the step; 0 if unknown.
      groups: read from the file one by one.
    """

    number: int
    title: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    shown: str
    accuracy: str | None
    find: str
    num_shown: int
    num_matching: int
    longest: int
    groups: Iterator[GroupView]


def view(
    run: Stored, number: int, file: BinaryIO, filters: Filters, *, against: int | None = None
) -> StepView:
    """Reads a step and returns what is to be shown of it.

    Args:
      run: the run.
      number: of the step.
      file: of the step, open until the groups have been read.
      filters: what to show.
      against: with `filters.changed`, the earlier step to compare with; None for the last one in
        which a problem was asked.

    Raises:
      UsageError: filters that the step's responses cannot answer.
    """
    step = reading.read(file, number, filters.wants)
    selection.check_names(step, filters)
    part = run.accuracy or _only_part(step)
    before = _before(run, step, part, against) if filters.changed else {}
    in_groups = selection.changed(step, part, before) if filters.changed else None
    chosen = selection.select(step, filters, in_groups)
    shown = selection.limited(chosen, filters.limit)
    matching, here = (sum(map(len, found)) for found in (chosen, shown))
    lengths = [row.response.length for row in step.rows if row.response.length is not None]
    return StepView(
        number=number,
        title=f"{run.folder.resolve().name}, step {number}",
        facts=[*summary(step, part), *_held_out(run, number)],
        notes=step.notes,
        shown="; ".join([*_shown(step, matching, here, filters), *_asked(step, before, filters)]),
        accuracy=part,
        find=filters.find,
        num_shown=here,
        num_matching=matching,
        longest=max(lengths, default=0),
        groups=_groups(file, step, shown, part, before),
    )


def summary(step: Step, part: str | None) -> list[tuple[str, str]]:
    """Returns (name, value) of a step's figures over all of its responses."""
    rows = [row.response for row in step.rows]
    by_group = selection.groups(step.rows)
    plural = "s" * (len(by_group) != 1)
    facts = [("responses", f"{len(rows):,} in {len(by_group):,} group{plural}")]
    names = dict.fromkeys(name for r in rows for name in r.parts or ())
    means = {n: _mean([r.value(n) for r in rows]) for n in ("reward", *names)}
    if means["reward"] is not None:
        parts = ", ".join(f"{n} {figure(v)}" for n, v in means.items() if n != "reward")
        facts.append(("reward", f"mean {figure(means['reward'])}" + f" ({parts})" * bool(parts)))
    right, judged = selection.pass_rate(step.rows, part)
    if judged:
        facts.append(("accuracy", f"{right / judged:.1%} by {part}: {right:,} of {judged:,}"))
        facts.append(("groups", _verdicts(by_group, part)))
    lengths = [r.length for r in rows if r.length is not None]
    if lengths:
        facts.append(("length", _lengths(lengths)))
    cut = [r.truncated for r in rows if r.truncated is not None]
    if cut:
        facts.append(("truncated", f"{sum(cut) / len(cut):.1%}: {sum(cut):,} of {len(cut):,}"))
    known = [r.advantage for r in rows if r.advantage is not None]
    if known:
        counts = {"+": "pos", "−": "neg", "zero": "zero"}
        signs = (f"{sum(map(selection.SIGNS[n], known)):,} {s}" for s, n in counts.items())
        facts.append(("advantage", ", ".join(signs)))
    statuses = _counts(r.status for r in rows)
    if set(statuses) - {"ok", None}:
        facts.append(("status", ", ".join(f"{n:,} {s or '?'}" for s, n in statuses.items())))
    return facts


def response_facts(response: Response, part: str | None) -> list[tuple[str, str]]:
    """Returns (kind, phrase) of a response; the kind decides its colour alone."""
    right = response.right(part)
    verdict = {True: ("right", "right"), False: ("wrong", "wrong"), None: ("unknown", "no verdict")}
    length = "?" if response.length is None else f"{response.length:,}"
    facts = [
        ("index", "#?" if response.sample_id is None else f"#{response.sample_id}"),
        verdict[right],
        ("length", f"{length} token{'s' * (length != '1')}"),
        ("reward", f"reward {figure(response.reward)}"),
        *(("part", f"{name} {figure(value)}") for name, value in (response.parts or {}).items()),
        (sign(response.advantage), f"advantage {signed(response.advantage)}"),
    ]
    if response.truncated:
        facts.append(("truncated", "TRUNCATED"))
    elif response.truncated is None:
        facts.append(("unknown", "truncated ?"))
    if response.status != "ok":
        facts.append(("status", f"status {response.status or '?'}"))
    if response.prediction is not None:
        facts.append(("prediction", f"read as {response.prediction}"))
    return facts


def sign(advantage: float | None) -> str:
    """Returns the key of SIGNS that holds; `unknown` for None and NaN."""
    if advantage is None:
        return "unknown"
    return next((name for name, is_ in selection.SIGNS.items() if is_(advantage)), "unknown")


def signed(advantage: float | None) -> str:
    """Formats an advantage with its sign."""
    plus = {"pos": "+", "zero": ""}.get(sign(advantage), "")
    return plus + figure(advantage)


def figure(value: float | None) -> str:
    """Formats a number in four digits, with a true minus."""
    return "?" if value is None else f"{value:.4g}".replace("-", "−")


def _groups(file, step, shown, part, before) -> Iterator[GroupView]:
    everything = dict(enumerate(selection.groups(step.rows)))
    for rows in shown:
        whole = everything[rows[0].group]
        responses = [reading.load(file, row) for row in rows]
        first = responses[0]
        problem = "?" if first.prompt_id is None else str(first.prompt_id)
        facts = _group_facts(whole, part)
        if first.prompt_id in before:
            then, right, judged = before[first.prompt_id]
            facts.append(f"in step {then}: {right} of {judged} right")
        if len(rows) < len(whole):
            facts.append(f"{len(rows)} of {len(whole)} responses shown")
        prompt = first.prompt
        yield GroupView(
            title=f"problem {problem}",
            facts=facts,
            prompt=prompt and texts.with_images_named(prompt, first.images or ()),
            answer=first.answer,
            verdicts=[row.response.right(part) for row in whole],
            responses=responses,
        )


def _group_facts(rows: Sequence[Row], part: str | None) -> list[str]:
    right, judged = selection.pass_rate(rows, part)
    facts = [f"{right} of {judged} right" if judged else "no verdict"]
    if judged < len(rows) and judged:
        facts.append(f"{len(rows) - judged} without verdict")
    lengths = [row.response.length for row in rows if row.response.length is not None]
    if lengths:
        facts.append(f"{min(lengths):,} … {max(lengths):,} tokens, mean {np.mean(lengths):,.1f}")
    reward = _mean([row.response.value("reward") for row in rows])
    if reward is not None:
        facts.append(f"mean reward {figure(reward)}")
    return facts


def _only_part(step: Step) -> str | None:
    """Returns the part of the reward if there is one alone: then it must be accuracy."""
    names = {name for row in step.rows for name in row.response.parts or ()}
    return names.pop() if len(names) == 1 else None


def _before(run: Stored, step: Step, part: str | None, against: int | None):
    if part is None:
        raise UsageError(
            f"--changed: {run.folder / 'run.json'} does not say which part of the reward is "
            "accuracy, and there are several"
        )
    earlier = sorted((number for number in run.steps if number < step.number), reverse=True)
    if against is not None:
        if against not in earlier:
            raise UsageError(
                f"--against={against}: {run.folder} holds no responses of it before step "
                f"{step.number}"
            )
        earlier = [against]
    asked = {row.response.prompt_id for row in step.rows} - {None}
    return reading.verdicts(run, asked, part, earlier)


def _held_out(run: Stored, number: int) -> list[tuple[str, str]]:
    found = reading.held_out(run, number)
    return [("held out", f"{name} {value:.1%}") for name, value in found.items()]


def _shown(step: Step, matching: int, here: int, filters: Filters) -> Iterator[str]:
    """Says how many responses follow, why, and how to see the others."""
    total = len(step.rows)
    if filters.words:
        yield f"{matching:,} of {total:,} responses match: {filters.words}"
    if here < matching:
        yield f"the first {here:,} of {matching:,} shown, --limit=0 shows all"
    elif not filters.words:
        yield f"all {total:,} responses shown"


def _asked(step: Step, before: Mapping[int, Any], filters: Filters) -> Iterator[str]:
    """Says how many problems could be compared."""
    if filters.changed:
        total = len({row.response.prompt_id for row in step.rows})
        yield f"{len(before):,} of {total:,} problems were asked before"


def _verdicts(by_group, part: str | None) -> str:
    rates = (selection.pass_rate(rows, part) for rows in by_group)
    counts = _counts(selection.verdict(*rate) if rate[1] else "no verdict" for rate in rates)
    order = ("all right", "some right", "all wrong", "no verdict")
    return ", ".join(f"{counts[name]:,} {name}" for name in order if name in counts)


def _lengths(lengths: Sequence[int]) -> str:
    median, high = np.percentile(lengths, [50, 95])
    return (
        f"mean {np.mean(lengths):,.1f}, median {median:,.0f}, 95th percentile {high:,.0f}, "
        f"max {max(lengths):,} tokens"
    )


def _counts(values) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
