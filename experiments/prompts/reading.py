"""Reads the prompts of a configuration, and splits them into tokens that people can read."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax import prompts
from luspo_jax.datasets import Example
from luspo_jax.run import checks
from luspo_jax.run.data import Data
from luspo_jax.run.data import load_data as load_problems
from luspo_jax.run.model import Model, load_model
from luspo_jax.run.settings import Settings, kind_of
from luspo_jax.run.sft.data import load_data as load_demonstrations

_WINDOW = 6  # tokens before one that decide how it is written
_NO_LIMIT = 2**62
_AT_ONCE = 256  # problems whose prompts are in memory at once
_QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token, or several that hold one character between them, or repeat.

    Attributes:
      ids: the tokens.
      text: what they stand for; of tokens that repeat, that of one.
      special: whether they are special tokens.
      trained: whether they are trained on, of a demonstration.
      repeats: how often the text stands there.
    """

    ids: tuple[int, ...]
    text: str
    special: bool = False
    trained: bool = False
    repeats: int = 1


@dataclasses.dataclass(frozen=True)
class Shown:
    """A prompt, or a demonstration.

    Attributes:
      title: which problem it is, and how long.
      pieces: of its tokens.
      answer: the reference answer; None where the tokens hold it.
      notes: what may be wrong with it.
    """

    title: str
    pieces: tuple[Piece, ...]
    answer: str | None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Preview:
    """What is shown of a configuration.

    Attributes:
      title: of the whole.
      facts: name → value, on the data, the template and the lengths.
      prompts: the first ones.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    prompts: tuple[Shown, ...]


def preview(config: Any, num: int, most: int, *, held_out: bool = False) -> Preview:
    """Returns the first prompts, or demonstrations, of a configuration; reads no weights.

    Training's are in the order of the run, which its seed decides; held-out ones in that of their
    file, as they are asked.

    Args:
      config: of RL or of supervised fine-tuning.
      num: prompts.
      most: problems whose lengths are measured.
      held_out: those held out instead of those of training.

    Raises:
      ConfigError, DataError, FileNotFoundError: as of a run.
    """
    if kind_of(config) is not Settings:
        return _of_demonstrations(config, num, held_out)
    checks.check(config)
    model = load_model(config, weights=False)
    data = load_problems(config, model)
    try:
        return _of_problems(config, model, data, num, most, held_out)
    finally:
        data.close()


def _of_problems(config, model: Model, data: Data, num, most, held_out) -> Preview:
    limit = config.data.max_prompt_length
    records = data.held_out[:num] if held_out else data.stream.next_prompts(num)
    examples = data.examples[held_out]
    renderer = data.held_out_renderer if held_out else data.renderer
    sizes, refused = lengths(examples, renderer, most)
    reports = [data.held_out_report] if held_out else data.reports
    facts = [
        *(("data", str(report)) for report in reports),
        ("template", f"{config.data.template!r}, {data.template_hash}"),
        ("tokenizer", f"{config.model.tokenizer or config.model.path}, {len(model.tokenizer):,}"),
        ("left out", _left_out(sizes, refused, limit, len(examples))),
        *_length_facts(list(sizes.values()), limit),
    ]
    first = f"first {len(records)} of" if records else "none of"
    kind = "held-out prompts" if held_out else "prompts, in the order of training"
    shown = tuple(_shown(n, record, model) for n, record in enumerate(records, start=1))
    return Preview(f"{first} {len(examples):,} {kind}", tuple(facts), shown)


def _of_demonstrations(config, num, held_out) -> Preview:
    settings = checks.check_sft(config)
    model = load_model(config, weights=False)
    data = load_demonstrations(settings, model)
    found = data.held_out[:num] if held_out else data.stream.take(min(num, len(data.stream)))
    total = len(data.held_out) if held_out else len(data.stream)
    kind = "held-out demonstrations" if held_out else "demonstrations, in the order of training"
    facts = [*data.described.items(), ("template", data.template_hash)]
    shown = [
        Shown(
            f"demonstration {n}  row {one.prompt.prompt_id}  {len(one.tokens):,} tokens, "
            f"{int(one.trained.sum()):,} trained" + "  CUT" * one.cut,
            pieces(one.tokens, model.tokenizer, one.trained),
            None,
        )
        for n, one in enumerate(found, start=1)
    ]
    return Preview(f"first {len(found)} of {total:,} {kind}", tuple(facts), tuple(shown))


def _shown(number: int, record: prompts.PromptRecord, model: Model) -> Shown:
    example, size = record.example, len(record.tokens)
    title = f"prompt {number}  problem {record.prompt_id}  {size:,} tokens"
    if "source" in example.meta:
        title += f"  of {example.meta['source']}"
    notes = []
    bos = model.tokenizer.bos_token_id
    if bos is not None and (record.tokens[:2] == bos).sum() == 2:
        notes.append(
            "begins with two tokens that begin a text: the template writes one, the tokenizer too"
        )
    return Shown(title, pieces(record.tokens, model.tokenizer), example.answer, tuple(notes))


def _left_out(sizes, refused, limit, total) -> str:
    long = [name for name, size in sizes.items() if size > limit]
    looked_at = len(sizes) + sum(refused.values())
    text = f"{len(long):,} of {looked_at:,} are longer than data.max_prompt_length={limit:,} tokens"
    if long:
        named = ", ".join(map(str, sorted(long, key=lambda name: -sizes[name])[:5]))
        text += f" (the longest: problems {named})"
    text += "".join(f"; {count:,} {reason}" for reason, count in refused.items())
    return text + f"; {total:,} in all" * (looked_at < total)


def _length_facts(sizes, limit) -> list[tuple[str, str]]:
    if not sizes:
        return []
    values = np.quantile(sizes, np.array(_QUANTILES) / 100, method="inverted_cdf")
    said = "  ".join(f"{q} %: {int(v):,}" for q, v in zip(_QUANTILES, values, strict=True))
    return [("tokens", f"{said}  (mean {np.mean(sizes):,.1f}, limit {limit:,})")]


def lengths(
    examples: Sequence[Example], renderer: prompts.Renderer, most: int
) -> tuple[dict[int, int], Mapping[str, int]]:
    """Returns (id → tokens of prompts, too long ones too; reason → number of refused problems).

    Args:
      examples: the problems.
      renderer: of their prompts.
      most: problems that are looked at, spread evenly.
    """
    places = np.linspace(0, len(examples), min(most, len(examples)), endpoint=False).astype(int)
    sizes, refused = {}, collections.Counter()
    for start in range(0, len(places), _AT_ONCE):
        wanted = [examples[int(place)] for place in places[start : start + _AT_ONCE]]
        for found in prompts.outcomes(wanted, renderer, max_length=_NO_LIMIT):
            if isinstance(found, prompts.Refusal):
                refused[found.reason] += 1
            else:
                sizes[found.prompt_id] = len(found.tokens)
    return sizes, refused


def pieces(
    tokens: Sequence[int], tokenizer: Any, trained: Sequence[bool] | None = None
) -> tuple[Piece, ...]:
    """Splits tokens into pieces whose texts, in order, are the text that they stand for."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    marks = iter(itertools.repeat(False) if trained is None else [bool(mark) for mark in trained])
    found: list[Piece] = []
    for ids, text in _texts([int(token) for token in tokens], tokenizer, special):
        mark = [next(marks) for _ in ids][-1]
        piece = Piece(ids, text, len(ids) == 1 and ids[0] in special, mark)
        last = found[-1] if found else None
        if last and piece.special and last.ids[0] == ids[0] and last.trained == mark:
            found[-1] = dataclasses.replace(last, ids=last.ids + ids, repeats=last.repeats + 1)
        else:
            found.append(piece)
    return tuple(found)


def _texts(tokens, tokenizer, special) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yields (tokens, their text); tokens of a part of a character come with the rest of it."""
    start = 0
    for end in range(1, len(tokens) + 1):
        before = _decoded(tokens[max(0, start - _WINDOW) : start], tokenizer)
        text = _decoded(tokens[max(0, start - _WINDOW) : end], tokenizer)
        # Some tokenizers write a token's space only after another token.
        own = text.removeprefix(before) if text.startswith(before) else None
        if own is None:
            own = _decoded(tokens[start:end], tokenizer)
        last = end == len(tokens) or tokens[end] in special or tokens[end - 1] in special
        if own.endswith("\ufffd") and not last:
            continue
        yield tuple(tokens[start:end]), own
        start = end


def _decoded(tokens, tokenizer) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
