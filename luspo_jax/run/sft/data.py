"""Loads the demonstrations of a configuration: those to train on, and those held out."""

import dataclasses
from collections.abc import Sequence

from luspo_jax.datasets import DataError, Example, Report, Selection
from luspo_jax.datasets.demonstrations import GENERATED, Columns, read_demonstrations, split_off
from luspo_jax.hosts.values import ConfigError
from luspo_jax.prompts import Renderer
from luspo_jax.prompts.demonstrations import (
    Demonstration,
    DemonstrationStream,
    Marked,
    Marking,
    demonstrations,
    length_counts,
    named_rows,
)
from luspo_jax.run.model import Model
from luspo_jax.run.sft.sections import DemonstrationSettings, SftSettings


@dataclasses.dataclass(frozen=True)
class SftData:
    """Demonstrations in tokens.

    Attributes:
      stream: to train on.
      held_out: those whose loss is measured, perhaps none.
      asked: those of them whose prompts are answered.
      reports: how the rows of each file were used: of training, then of held-out rows.
      described: what came of them, in words, by name.
      template_hash: changes with anything that changes a prompt.
    """

    stream: DemonstrationStream
    held_out: list[Demonstration]
    asked: list[Demonstration]
    reports: tuple[Report, ...]
    described: dict[str, str]
    template_hash: str


def load_data(settings: SftSettings, model: Model) -> SftData:
    """Loads the demonstrations of `settings.data`.

    Raises:
      ConfigError: the template does not fit the tokenizer.
      DataError: a file or row that cannot be used, or nothing to train on.
    """
    data, evaluation = settings.data, settings.eval
    how = _marking(data, model)
    (train, held_out), reports = _examples(settings)
    trained = demonstrations(train, how, reports[0].source)
    measured = Marked([])
    if len(held_out):
        wanted = [held_out[i] for i in range(min(len(held_out), evaluation.num_examples))]
        measured = demonstrations(wanted, how, reports[-1].source)
    described = {"training": _described(reports[0], trained)}
    if measured.kept:
        described["held out"] = _described(reports[-1], measured) + _shared(trained, measured)
    asked = measured.kept[: evaluation.num_generations]
    return SftData(
        DemonstrationStream(trained.kept, seed=settings.seed),
        measured.kept,
        asked,
        reports,
        described,
        how.renderer.hash,
    )


def _marking(data: DemonstrationSettings, model: Model) -> Marking:
    try:
        renderer = Renderer(
            model.tokenizer,
            "chat" if data.messages_column else data.template,
            data.system_prompt,
            enable_thinking=data.enable_thinking,
            template_chat=None if data.messages_column else data.template_chat,
        )
    except ValueError as error:
        field = "messages_column" if data.messages_column else "template"
        raise ConfigError(f"data.{field}: {error}") from None
    if renderer.columns:
        raise ConfigError(
            f"data.template={data.template!r} names the column {{{renderer.columns[0]}}}: of a "
            "demonstration only {problem}, its prompt, is read"
        )
    return Marking(
        renderer,
        model.stop_token_ids,
        turns=data.turns,
        train_on_prompt=data.train_on_prompt,
        max_length=data.max_length,
        too_long=data.too_long,
    )


def _examples(
    settings: SftSettings,
) -> tuple[tuple[Sequence[Example], Sequence[Example]], tuple[Report, ...]]:
    """Returns (examples to train on, held-out ones), and the reports of their sources."""
    data = settings.data
    if data.name != "file":
        parts = [GENERATED[data.name](split) for split in ("train", "test")]
        return tuple(parts), tuple(
            Report(data.name, f"generator ({split})", "", len(part), len(part))
            for split, part in zip(("train", "test"), parts, strict=True)
        )
    columns = Columns(data.prompt_column, data.response_column, data.messages_column)
    held = Selection(data.subset, data.filter, drop_bad_rows=data.drop_bad_rows)
    taken = dataclasses.replace(held, limit=data.limit, streaming=data.streaming)
    examples, report = _read(("path", data.path, data.split), columns, taken)
    if data.held_out_path:
        place = "held_out_path", data.held_out_path, data.held_out_split
        held_out, other = _read(place, columns, held)
        return (examples, held_out), (report, other)
    if data.held_out_fraction:
        return split_off(examples, data.held_out_fraction, settings.seed), (report,)
    return (examples, []), (report,)


def _read(place, columns, selection):
    field, path, split = place
    try:
        return read_demonstrations(path, columns, split, selection)
    except DataError as error:
        raise DataError(f"data.{field}: {error}") from None


def _shared(trained: Marked, measured: Marked) -> str:
    """Says how many held-out prompts are trained on: their figures flatter."""
    known = {one.prompt.tokens.tobytes() for one in trained.kept}
    count = sum(one.prompt.tokens.tobytes() in known for one in measured.kept)
    return f"; PROMPTS OF {count:,} OF THEM ARE TRAINED ON" * bool(count)


def _described(report: Report, marked: Marked) -> str:
    counts = length_counts(marked.kept)
    answers = sum(one.answer_length for one in marked.kept) / len(marked.kept)
    text = (
        f"{len(marked.kept):,} demonstrations of {report.source} ({report.rows:,} rows), "
        f"{counts['tokens']:,} tokens, {counts['trained']:,} of them trained, answers of "
        f"{answers:.1f} on average; the longest has {counts['longest']:,}"
    )
    text += f"; {marked.dropped:,} too long, left out" * bool(marked.dropped)
    text += f"; {marked.cut:,} too long, cut" * bool(marked.cut)
    text += f" (rows {named_rows(marked.long)})" * bool(marked.long)
    text += f"; {report.filtered:,} rows left out by data.filter" * bool(report.filtered)
    return text + f"; {report.unusable:,} unusable rows left out" * bool(report.unusable)
