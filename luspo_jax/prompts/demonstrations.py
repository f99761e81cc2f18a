"""Turns demonstrations into tokens and says which of them are trained on; streams them."""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax.datasets import DataError, Example
from luspo_jax.prompts.renderer import PromptRecord, Renderer
from luspo_jax.prompts.stream import draw_order

TURNS = ("last", "all")
TOO_LONG = ("drop", "cut", "refuse")
_NAMED = 10  # rows named in a message
_AT_ONCE = 1024  # demonstrations whose texts are tokenized in one call


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One sequence of tokens to train on.

    Attributes:
      prompt: what a rollout would be asked: everything before the last answer.
      tokens: int32, prompt and answer, the token that ends it included.
      trained: bool, the tokens whose log-probs are raised; never the first.
      cut: whether the end is missing, because it was too long.
      weights: float32 factor on each token's loss; None for 1.
    """

    prompt: PromptRecord
    tokens: np.ndarray
    trained: np.ndarray
    cut: bool = False
    weights: np.ndarray | None = None

    @property
    def images(self) -> tuple:
        """The images of the prompt."""
        return self.prompt.images

    @property
    def answer_length(self) -> int:
        """Tokens of the last answer, the token that ends it included."""
        return len(self.tokens) - len(self.prompt.tokens)


@dataclasses.dataclass(frozen=True)
class Marking:
    """How a demonstration becomes a sequence, and which of its tokens are trained on.

    Attributes:
      renderer: of the prompts, as in a rollout.
      stop_token_ids: tokens that end an answer.
      turns: of a chat, train on the "last" answer or on "all".
      train_on_prompt: train on every token but the first, whatever `turns` says.
      max_length: most tokens of a sequence.
      too_long: longer ones are left out ("drop"), lose their end and its stop token ("cut"), or are
        an error ("refuse"). With "cut", one that would keep no trained token is left out.
    """

    renderer: Renderer
    stop_token_ids: tuple[int, ...]
    turns: str = "last"
    train_on_prompt: bool = False
    max_length: int = 1024
    too_long: str = "drop"

    @property
    def end_id(self) -> int | None:
        """The token that ends an answer where no template does; None without any."""
        own = self.renderer.tokenizer.eos_token_id
        return own if own is not None else next(iter(self.stop_token_ids), None)

    def stop_texts(self) -> list[str]:
        """Returns the tokens that end an answer, as text."""
        return [self.renderer.tokenizer.decode([token]) for token in self.stop_token_ids]


@dataclasses.dataclass(frozen=True)
class Marked:
    """Demonstrations in tokens, the number left out or cut as too long, and the rows of both."""

    kept: list[Demonstration]
    dropped: int = 0
    cut: int = 0
    long: tuple[int, ...] = ()


def named_rows(rows: Sequence[Any]) -> str:
    """Lists the first rows of many, for a message."""
    return ", ".join(f"{row}" for row in rows[:_NAMED]) + " …" * (len(rows) > _NAMED)


def demonstrations(examples: Sequence[Example], how: Marking, source: str = "") -> Marked:
    """Tokenizes demonstrations, in order; see `datasets.demonstrations` for what an Example holds.

    The tokens of a prompt are those that a rollout is asked, and an answer's are those that follow
    them in the tokens of the whole, unless the tokenizer joins the two at their border: then each
    is tokenized by itself.

    Args:
      examples: to tokenize.
      how: the rules.
      source: their file, for messages.

    Raises:
      DataError: a demonstration that cannot be marked, or too long under "refuse"; names the row.
    """
    kept, dropped, cut, long = [], 0, 0, []
    for start in range(0, len(examples), _AT_ONCE):
        part = [examples[i] for i in range(start, min(start + _AT_ONCE, len(examples)))]
        for found in _marked(part, how, source):
            length = len(found.tokens)
            if length > how.max_length:
                long.append((found.prompt.example.id, length))
                found = _shortened(found, how.max_length) if how.too_long == "cut" else None
            if found is None:
                dropped += 1
                continue
            cut += found.cut
            kept.append(found)
    if long and how.too_long == "refuse":
        named = named_rows([f"row {row} ({length})" for row, length in long])
        raise DataError(
            f"{source}: {len(long):,} demonstrations are longer than data.max_length="
            f"{how.max_length} tokens: {named}; raise it, or leave them out with data.too_long=drop"
        )
    if not kept:
        raise DataError(
            f"{source}: all {len(examples):,} demonstrations are longer than data.max_length="
            f"{how.max_length} tokens"
        )
    return Marked(kept, dropped, cut, tuple(row for row, _ in long))


def _shortened(found: Demonstration, length: int) -> Demonstration | None:
    """Returns the first tokens; None if they would hold no trained one or no answer."""
    trained = found.trained[:length]
    if not trained.any() or len(found.prompt.tokens) >= length:
        return None
    return dataclasses.replace(found, tokens=found.tokens[:length], trained=trained, cut=True)


def _marked(examples, how, source) -> list[Demonstration]:
    stops = how.stop_texts()
    spans = [_texts(example, how, stops, f"{source}, row {example.id}") for example in examples]
    # Every text up to the start of a trained answer, and the whole.
    texts = [span.whole[:end] for span in spans for end in (*span.starts, len(span.whole))]
    encoded = iter(how.renderer.tokens(texts))
    return [
        _demonstration(example, span, [next(encoded) for _ in range(len(span.starts) + 1)], how)
        for example, span in zip(examples, spans, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Span:
    """A whole text, where its trained answers start, and where they end; −1: at the text's end."""

    whole: str
    starts: list[int]
    ends: list[int]


def _texts(example: Example, how: Marking, stops: list[str], place: str) -> _Span:
    renderer, messages = how.renderer, example.meta.get("messages")
    spoken = [m["content"] for m in messages] if messages else [example.problem, example.answer]
    for stop in filter(None, stops):
        if any(stop in said for said in spoken):
            raise DataError(
                f"{place}: a text holds {stop!r}, the token that ends an answer: take it out; the "
                "end of an answer is added by itself"
            )
    if messages is None and not renderer.is_chat:
        prompt = renderer.text(example.problem)
        return _Span(prompt + example.answer, [len(prompt)], [-1])
    if messages is None:
        answer = {"role": "assistant", "content": example.answer}
        messages = [*renderer.messages(example.problem), answer]
    elif renderer.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": renderer.system_prompt}, *messages]
    return _chat_span(messages, how, stops, place)


def _chat_span(messages, how, stops, place) -> _Span:
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    places = places if how.turns == "all" else places[-1:]
    try:
        whole = how.renderer.chat_text(messages, asks=False)
        before = [how.renderer.chat_text(messages[:i]) for i in places]
    except Exception as error:  # templates raise any kind of error
        raise DataError(f"{place}: the chat template refuses it ({error})") from error
    ends = []
    for number, (i, prompt) in enumerate(zip(places, before, strict=True), start=1):
        if not whole.startswith(prompt):
            raise DataError(
                f"{place}: the chat template writes what precedes answer {number} otherwise once "
                "the answer is there, so a rollout would never be asked it: train on the last "
                "answer only (data.turns=last), or leave data.enable_thinking unset"
            )
        bound = len(before[number]) if number < len(places) else len(whole)
        ends.append(_end(whole, (len(prompt), bound), messages[i]["content"], stops))
        if ends[-1] < 0 and number < len(places):
            raise DataError(
                f"{place}: the chat template ends answer {number} with none of the tokens that "
                f"end one ({', '.join(map(repr, stops)) or 'there are none'}): train on the last "
                "answer only (data.turns=last), or name the token in model.stop_token_ids"
            )
    return _Span(whole, [len(prompt) for prompt in before], ends)


def _end(whole, bounds, content, stops) -> int:
    """Returns where an answer ends, its stop token included; −1 if none follows its text."""
    start, bound = bounds
    found = [(whole.find(stop, start, bound), stop) for stop in stops if stop]
    found = [(at, stop) for at, stop in found if at >= 0]
    if not found:
        return -1
    at, stop = min(found)
    # Templates strip blanks, and some write the reasoning anew: the end of the text is the text's.
    said = content.split("</think>")[-1].strip()
    return at + len(stop) if whole[start:at].rstrip().endswith(said) else -1


def _demonstration(example, span, encoded, how) -> Demonstration:
    *prefixes, whole = encoded
    sizes = [len(tokens) for tokens in prefixes]
    if any(not np.array_equal(whole[: len(p)], p) for p in prefixes):
        whole, sizes = _by_pieces(span, how)
    tokens, trained = whole, np.zeros(len(whole), bool)
    for start, bound, end in zip(sizes, [*sizes[1:], len(whole)], span.ends, strict=True):
        stop = bound
        if end >= 0:
            stops = np.isin(whole[start:bound], how.stop_token_ids)
            stop = start + int(np.argmax(stops)) + 1 if stops.any() else bound
        trained[start:stop] = True
    if span.ends[-1] >= 0:  # a line break after the stop token is of the next turn
        tokens, trained = tokens[:stop], trained[:stop]
    elif how.end_id is not None:
        tokens = np.append(tokens, np.int32(how.end_id)).astype(np.int32)
        trained = np.append(trained, True)
    if how.train_on_prompt:
        trained = np.arange(len(tokens)) > 0
    trained[0] = False
    last = sizes[-1]
    prompt = PromptRecord(example.id, tokens[:last], span.whole[: span.starts[-1]], example)
    return Demonstration(prompt, tokens, trained)


def _by_pieces(span, how) -> tuple[np.ndarray, list[int]]:
    """Tokenizes each piece between the starts of trained answers by itself."""
    first = how.renderer.tokens([span.whole[: span.starts[0]]])[0]
    ends = [*span.starts[1:], len(span.whole)]
    rest = [span.whole[a:b] for a, b in zip(span.starts, ends, strict=True)]
    ids = how.renderer.tokenizer(rest, add_special_tokens=False)["input_ids"]
    pieces = [first, *(np.asarray(x, np.int32) for x in ids)]
    return np.concatenate(pieces), np.cumsum([len(x) for x in pieces])[:-1].tolist()


class DemonstrationStream:
    """An endless, shuffled, resumable stream of demonstrations; each occurs once in every epoch.

    The order is grain's, from the seed. Every process gets the same demonstrations.

    Args:
      demonstrations: to stream.
      seed: decides the order, anew in every epoch.
    """

    def __init__(self, demonstrations: Sequence[Demonstration], *, seed: int):
        self._all, self._position = demonstrations, 0
        self._order = draw_order([len(demonstrations)], [1.0], seed, shuffle=True)
        self._identity = {
            "seed": seed,
            "num_examples": len(demonstrations),
            "examples_hash": fingerprint(demonstrations),
        }

    def __len__(self) -> int:
        """Returns the demonstrations of an epoch."""
        return len(self._all)

    @property
    def epoch(self) -> float:
        """Epochs completed, with fraction."""
        return self._position / len(self._all)

    def take(self, count: int) -> list[Demonstration]:
        """Returns the next `count` demonstrations."""
        span = range(self._position, self._position + count)
        self._position += count
        return [self._all[int(self._order[position])] for position in span]

    def get_state(self) -> dict[str, Any]:
        """Returns JSON-serialisable state: the stream's position, and what identifies it."""
        return {"position": self._position, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to the position of another stream of the same demonstrations.

        Raises:
          ValueError: they are others; the message names the difference.
        """
        differences = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"the demonstrations are not those of the checkpoint: {'; '.join(differences)}"
            )
        self._position = int(state["position"])


def fingerprint(demonstrations: Sequence[Demonstration]) -> str:
    """Returns sixteen hex digits that change with any token or mask."""
    digest = hashlib.sha256()
    for one in demonstrations:
        digest.update(np.int64(len(one.tokens)).tobytes())
        digest.update(one.tokens.tobytes() + np.packbits(one.trained).tobytes())
    return digest.hexdigest()[:16]


def length_counts(demonstrations: Sequence[Demonstration]) -> dict[str, float]:
    """Returns the tokens, trained tokens, and longest sequence of demonstrations."""
    counts = collections.Counter()
    for one in demonstrations:
        counts["tokens"] += len(one.tokens)
        counts["trained"] += int(one.trained.sum())
        counts["longest"] = max(counts["longest"], len(one.tokens))
    return dict(counts)
