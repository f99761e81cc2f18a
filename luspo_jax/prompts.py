"""Problems become token prompts, in a shuffled order that processes and restarts share."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from luspo_jax.datasets import DataError, Example, Mixture
from luspo_jax.datasets.images import ImageFiles
from luspo_jax.datasets.templates import Template, template
from luspo_jax.images import ImagePreparer, ImageRefusal, PreparedImage

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"  # in a problem: here stands its next image
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"

_AT_ONCE = 256  # problems whose prompts, and images, are in memory while they are looked at


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """One prompt.

    Attributes:
      prompt_id: the example's id.
      tokens: int32 token ids.
      text: what the tokens say; an image is one placeholder in it, many in the tokens.
      example: the problem.
      images: its images, in the order of their placeholders.
    """

    prompt_id: int
    tokens: np.ndarray
    text: str
    example: Example
    images: tuple[PreparedImage, ...] = ()


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A problem that makes no prompt.

    Attributes:
      prompt_id: the example's id.
      reason: "too_long"; "markers" (not as many image marks as images); "placeholders" (its text
        holds tokens that stand for images); "video"; or a reason of `luspo_jax.images.REASONS`.
      detail: what was found; of an image, file and row.
    """

    prompt_id: int
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Renderer:
    """Turns a problem into the text that the model reads.

    Attributes:
      tokenizer: a Hugging Face tokenizer.
      template: a name in TEMPLATES, a text with `{problem}` in it, or a Template.
      template_chat: of such a text, whether it is a user message in the tokenizer's chat template;
        None = where the tokenizer has one.
      system_prompt: a system message; chat templates only.
      enable_thinking: passed to the chat template where it is not None.
      images: prepares images; None for a model of text, which is asked the bare problem.
      image_files: where the images of the problems are.

    An image stands where the problem says `<image>`, or before everything where it says so nowhere.
    """

    tokenizer: Any
    template: str | Template = "plain"
    system_prompt: str = ""
    enable_thinking: bool | None = None
    images: ImagePreparer | None = None
    image_files: ImageFiles = dataclasses.field(default_factory=ImageFiles)
    template_chat: bool | None = None

    def __post_init__(self):
        if not self._template.chat and (self.system_prompt or self.enable_thinking is not None):
            raise ValueError(
                f"template {self.template!r} has no chat template: system_prompt and "
                "enable_thinking would be ignored"
            )
        if self._template.chat and not self.tokenizer.chat_template:
            raise ValueError(
                f"template {self.template!r} needs a chat template, which the tokenizer lacks: "
                "use template 'plain', or a tokenizer that has one"
            )
        if self.images is not None:
            self._check_image_tokens()

    def _check_image_tokens(self) -> None:
        (tokens,) = self.tokens([self.text("", 1)])
        if (tokens == self.image_token_id).sum() != 1:
            raise ValueError(
                f"template {self.template!r} and this tokenizer do not turn an image into one "
                f"{IMAGE_TOKEN}: use the tokenizer and chat template of a vision-language model"
            )

    @property
    def image_token_id(self) -> int:
        """The token that stands for images."""
        return self._token_id(IMAGE_TOKEN)

    def _token_id(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or found == self.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {token}, which images need")
        return found

    @functools.cached_property
    def _template(self) -> Template:
        if isinstance(self.template, Template):
            return self.template
        chat = self.template_chat
        return template(
            self.template, chat=bool(self.tokenizer.chat_template if chat is None else chat)
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the template names beside the problem."""
        return self._template.columns

    def text(
        self, problem: str, num_images: int = 0, columns: Mapping[str, Any] | None = None
    ) -> str:
        """The whole prompt for a problem; each of its images is one placeholder.

        Raises:
          ValueError: the problem marks places for another number of images.
          DataError: the template names a column that is not among these.
        """
        message = self._template.fill(problem, columns)
        pieces = self._pieces(message, num_images)
        if not self._template.chat:
            return f"{VISION_START}{IMAGE_TOKEN}{VISION_END}".join(pieces)
        messages = [{"role": "user", "content": _content(pieces)}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        thinking = self.enable_thinking
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            **({} if thinking is None else {"enable_thinking": thinking}),
        )

    def _pieces(self, message: str, num_images: int) -> list[str]:
        """The text before, between and after the images."""
        marks = message.count(IMAGE_MARK)
        if self.images is None or not (marks or num_images):
            return [message]
        if not marks:
            return [*("" for _ in range(num_images)), message]
        if marks != num_images:
            raise ValueError(f"{marks} × {IMAGE_MARK} in the problem and {num_images} images")
        return message.split(IMAGE_MARK)

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 token ids of each prompt; a chat template already holds its special tokens."""
        encoded = self.tokenizer(list(texts), add_special_tokens=not self._template.chat)
        return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]

    @property
    def hash(self) -> str:
        """Sixteen hex digits that change with anything that changes a prompt's text."""
        chat_template = self.tokenizer.chat_template if self._template.chat else None
        parts = (dataclasses.astuple(self._template), chat_template)
        if self.images is not None:
            parts = (*parts, self.images.settings.hash)
        what = json.dumps([*parts, self.system_prompt, self.enable_thinking], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]


def _content(pieces: list[str]) -> str | list[dict[str, str]]:
    """A user message: a string where it is one piece, else parts with an image between any two."""
    if len(pieces) == 1:
        return pieces[0]
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(pieces):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def encode(
    examples: Iterable[Example], renderer: Renderer, *, max_length: int
) -> tuple[list[PromptRecord], int]:
    """Every example's prompt, in order, and how many were dropped, as too long or refused."""
    found = outcomes(examples, renderer, max_length=max_length)
    records = [record for record in found if isinstance(record, PromptRecord)]
    return records, len(found) - len(records)


def outcomes(
    examples: Iterable[Example], renderer: Renderer, *, max_length: int
) -> list[PromptRecord | Refusal]:
    """What becomes of every example, in order: its prompt, or why there is none."""
    examples = list(examples)
    images = _images(examples, renderer)
    asked = [_ask(*pair, renderer) for pair in zip(examples, images, strict=True)]
    texts = [text for text in asked if isinstance(text, str)]
    encoded = iter(renderer.tokens(texts) if texts else [])
    return [
        text
        if isinstance(text, Refusal)
        else _record(example, text, next(encoded), own, renderer=renderer, max_length=max_length)
        for example, text, own in zip(examples, asked, images, strict=True)
    ]


def _images(examples, renderer) -> list[tuple[PreparedImage, ...] | ImageRefusal]:
    if renderer.images is None:
        return [()] * len(examples)
    files = renderer.image_files
    return renderer.images.of_problems([files.images(example) for example in examples])


def _ask(example, images, renderer) -> str | Refusal:
    """The prompt's text."""
    if isinstance(images, ImageRefusal):
        return Refusal(example.id, images.reason, str(images))
    if renderer.images is None:
        return renderer.text(example.problem, 0, example.meta)
    if VIDEO_MARK in example.problem:
        return Refusal(example.id, "video", f"the problem says {VIDEO_MARK}: videos are not read")
    try:
        return renderer.text(example.problem, len(images), example.meta)
    except DataError:
        raise
    except ValueError as error:
        return Refusal(example.id, "markers", str(error))


def _record(example, text, tokens, images, *, renderer, max_length) -> PromptRecord | Refusal:
    if renderer.images is not None:
        places = tokens == renderer.image_token_id
        blocks = text.count(VISION_START)
        if (places.sum(), blocks) != (len(images), len(images)) or VIDEO_TOKEN in text:
            return Refusal(
                example.id,
                "placeholders",
                f"{places.sum()} × {IMAGE_TOKEN} and {blocks} × {VISION_START} for {len(images)} "
                "images: its text must not hold such tokens itself",
            )
        counts = np.ones(len(tokens), np.int64)
        counts[places] = [image.num_tokens for image in images]
        tokens = np.repeat(tokens, counts)
    if len(tokens) > max_length:
        return Refusal(example.id, "too_long", f"{len(tokens)} tokens")
    return PromptRecord(example.id, tokens, text, example, images)


def agreed(
    own: Sequence[PromptRecord | Refusal], gather: Callable[[Any], list[Any]]
) -> list[PromptRecord | Refusal]:
    """What becomes of the same examples on all processes: what one refuses is refused by all.

    Files and time limits may fail on one process only. `gather` gives the values of all.
    """
    refusals = gather([outcome if isinstance(outcome, Refusal) else None for outcome in own])
    first = (next(filter(None, column), None) for column in zip(*refusals, strict=True))
    return [refusal or outcome for refusal, outcome in zip(first, own, strict=True)]


def pictured(record: PromptRecord, renderer: Renderer) -> PromptRecord:
    """A prompt that was kept without its images, with them; see `with_images`."""
    return with_images([record], renderer)[0]


def with_images(records: Sequence[PromptRecord], renderer: Renderer) -> list[PromptRecord]:
    """Prompts that were kept without their images, with them.

    Raises:
      DataError: one can no longer be read, or is of another size than it was.
    """
    if renderer.images is None:
        return list(records)
    found = _images([record.example for record in records], renderer)
    refusals = [image for image in found if isinstance(image, ImageRefusal)]
    if refusals:
        raise DataError(f"an image of a prompt that was made before: {refusals[0]}")
    for record, images in zip(records, found, strict=True):
        then = int((record.tokens == renderer.image_token_id).sum())
        now = sum(image.num_tokens for image in images)
        if now != then:
            raise DataError(
                f"problem {record.prompt_id} had images of {then} tokens when its prompt was made, "
                f"and now of {now}: its image files have changed"
            )
    return [
        dataclasses.replace(record, images=images)
        for record, images in zip(records, found, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What becomes of problems that were looked at, spread evenly over a dataset.

    Attributes:
      total: problems of the dataset.
      looked_at: problems that were looked at; all of a small dataset.
      refused: reason → how many of these make no prompt.
    """

    total: int
    looked_at: int
    refused: Mapping[str, int]

    def __str__(self) -> str:
        of = "" if self.looked_at == self.total else f" of {self.looked_at:,} looked at"
        others = [f", {n:,} {why}" for why, n in self.refused.items() if why != "too_long"]
        return f"{self.refused.get('too_long', 0):,}{of} too long" + "".join(others)


class PromptStream:
    """An endless, shuffled, resumable stream of prompts; each occurs once in every epoch.

    The order is one sequence, drawn by grain from the seed. The prompts of a step are its next
    ones that are short enough, dealt out to the processes one by one, so that the same prompts are
    seen whatever the number of processes, and every process has the same state. The sources of a
    mixture are interleaved by their weights, each in an order and in epochs of its own.

    Args:
      examples: the problems, by random access, ids unique; or a Mixture.
      renderer: turns a problem into a prompt.
      max_length: longest prompt, in tokens; longer ones are dropped and counted.
      seed: decides the order.
      shuffle: whether to shuffle, anew in every epoch; otherwise the order of the examples.
      process_index: this process.
      process_count: how many processes share the stream.
      gather: gives the values of all processes (`distributed.gather`). Of a run of several
        processes on images, whose files or time limits may fail on one of them only: what one
        refuses is then refused by all.

    Attributes:
      dropped: prompts passed over so far because they were too long.
      refused: reason → problems passed over for another reason, all of them about images.
      refusals: the latest of these.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        renderer: Renderer,
        *,
        max_length: int,
        seed: int,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        gather: Callable[[Any], list[Any]] | None = None,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}")
        if not len(examples):
            raise DataError("no prompts: the dataset is empty")
        self._examples, self._renderer, self._max_length = examples, renderer, max_length
        self._process_index, self._process_count = process_index, process_count
        mixed = isinstance(examples, Mixture)
        sizes, weights = (examples.sizes, examples.weights) if mixed else ((len(examples),), (1.0,))
        self._order = _draw_order(sizes, weights, seed, shuffle)
        self._position = 0
        self._gather = gather
        self.dropped = 0
        self.refused: collections.Counter[str] = collections.Counter()
        self.refusals: collections.deque[Refusal] = collections.deque(maxlen=100)
        self._identity = {
            "seed": seed,
            "shuffle": shuffle,
            "max_prompt_length": max_length,
            "template_hash": renderer.hash,
            "num_examples": len(examples),
            "examples_hash": _fingerprint(examples),
            "mixture": [list(pair) for pair in zip(sizes, weights, strict=True)],
        }

    def __len__(self) -> int:
        """Examples in an epoch, those that are too long included."""
        return len(self._examples)

    @property
    def epoch(self) -> float:
        """Epochs begun and done: 1.5 is half way through the second; of a mixture, the mean."""
        return self._position / len(self._examples)

    @property
    def metrics(self) -> dict[str, float]:
        """Where the stream is, and what it has passed over."""
        return {
            "training/epoch": self.epoch,
            "prompts/dropped": self.dropped,
            **{f"prompts/refused/{why}": n for why, n in self.refused.items()},
        }

    def next_prompts(self, count: int) -> list[PromptRecord]:
        """The next `count` prompts of this process.

        Raises:
          DataError: every prompt of a whole epoch is too long or refused.
        """
        wanted, found, looked_at = count * self._process_count, [], 0
        while len(found) < wanted:
            missing = wanted - len(found)
            span = range(self._position, self._position + missing)
            examples = [self._examples[int(self._order[position])] for position in span]
            for outcome in self._outcomes(examples):
                if isinstance(outcome, PromptRecord):
                    found.append(outcome)
                else:
                    self._count(outcome)
            self._position += missing
            looked_at += missing
            if not found and looked_at >= len(self._examples):
                raise DataError(self._no_prompts(looked_at))
        return found[self._process_index :: self._process_count]

    def survey(self, limit: int) -> Survey:
        """What becomes of up to `limit` problems; the stream stays where it is."""
        total = len(self._examples)
        places = np.linspace(0, total, min(limit, total), endpoint=False).astype(int)
        refused: collections.Counter[str] = collections.Counter()
        starts = range(0, len(places), _AT_ONCE)
        for start in tqdm(starts, "prompts", disable=None, delay=1, unit=" batches"):
            examples = [self._examples[int(place)] for place in places[start : start + _AT_ONCE]]
            found = outcomes(examples, self._renderer, max_length=self._max_length)
            refused.update(x.reason for x in found if isinstance(x, Refusal))
        return Survey(total, len(places), refused)

    def _outcomes(self, examples) -> list[PromptRecord | Refusal]:
        own = outcomes(examples, self._renderer, max_length=self._max_length)
        if self._gather is None or self._renderer.images is None:
            return own
        return agreed(own, self._gather)

    def _count(self, refusal: Refusal) -> None:
        if refusal.reason == "too_long":
            self.dropped += 1
            return
        self.refused[refusal.reason] += 1
        self.refusals.append(refusal)

    def _no_prompts(self, looked_at: int) -> str:
        text = f"longer than max_prompt_length={self._max_length} tokens"
        if not self.refused:
            return f"no prompts: all {looked_at} are {text}"
        reasons = "; ".join(f"{n} × {reason}" for reason, n in self.refused.most_common())
        last = list(itertools.islice(reversed(self.refusals), 3))
        return (
            f"no prompts: of {looked_at}, {self.dropped} are {text}, the others are refused "
            f"({reasons}), for example " + "; ".join(refusal.detail for refusal in last)
        )

    def get_state(self) -> dict[str, Any]:
        """JSON-serialisable state: where the stream is, and what makes it the same stream."""
        refused = {} if self._renderer.images is None else {"refused": dict(self.refused)}
        return {"position": self._position, "dropped": self.dropped, **refused, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream was.

        Raises:
          ValueError: the state is that of a different stream; the message says in what.
        """
        differences = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"the prompts are not those of the checkpoint: {'; '.join(differences)}"
            )
        self._position, self.dropped = int(state["position"]), int(state["dropped"])
        self.refused = collections.Counter(state.get("refused", {}))


def _draw_order(sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool):
    """The endless sequence of places in the dataset, by random access."""
    import grain  # here: whoever only renders prompts need not wait for it

    orders, start = [], 0
    for source, size in enumerate(sizes):
        order = grain.MapDataset.range(start, start + size)
        if shuffle:
            order = order.shuffle(seed=(seed + source) % (1 << 32))
        orders.append(order.repeat())
        start += size
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)


def _fingerprint(examples: Sequence[Example]) -> str:
    """Hash of up to 256 examples spread over the dataset: all of a large one takes seconds."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(examples) - 1, 256).astype(int)):
        example = examples[int(index)]
        digest.update(json.dumps([example.id, example.problem, example.answer]).encode())
    return digest.hexdigest()[:16]
