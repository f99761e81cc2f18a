"""Turns problems into token prompts, or refuses them by name."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax.datasets import DataError, Example
from luspo_jax.datasets.images import ImageFiles
from luspo_jax.datasets.table import EARLIER
from luspo_jax.images.preparer import ImagePreparer, ImageRefusal, PreparedImage
from luspo_jax.prompts.templates import TARGET, Template, template

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"  # the place of the next image in a problem
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
_TARGET_STREAM = 0x1E46  # tells the draws of target lengths from others of the same seed


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """One prompt.

    Attributes:
      prompt_id: the example's id.
      tokens: int32 token ids.
      text: the prompt's text; an image is one placeholder in it, many in the tokens.
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
    """A problem that cannot become a prompt.

    Attributes:
      prompt_id: the example's id.
      reason: "too_long"; "markers" (the numbers of image marks and images differ); "placeholders"
        (the text contains tokens that stand for images); "video"; or a reason of
        `images.record.REASONS`.
      detail: what was found; for an image, file and row.
    """

    prompt_id: int
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Renderer:
    """Turns a problem into the text that the model reads.

    An image stands at the problem's `<image>` marks, or before everything if there are none.

    Attributes:
      tokenizer: a Hugging Face tokenizer.
      template: a name in TEMPLATES, a text with `{problem}` in it, or a Template.
      template_chat: whether such a text is a user message in the tokenizer's chat template; None =
        if the tokenizer has one.
      system_prompt: a system message; chat templates only.
      enable_thinking: passed to the chat template if not None.
      images: prepares images; None for a text-only model, which gets the bare problem.
      image_files: where the images of the problems are.
      length_targets: fewest and most tokens that a prompt may ask for; (0, 0) asks for none.
      seed: with the problem's id, decides how many it asks for.
    """

    tokenizer: Any
    template: str | Template = "plain"
    system_prompt: str = ""
    enable_thinking: bool | None = None
    images: ImagePreparer | None = None
    image_files: ImageFiles = dataclasses.field(default_factory=ImageFiles)
    template_chat: bool | None = None
    length_targets: tuple[int, int] = (0, 0)
    seed: int = 0

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
        """The token that stands for an image."""
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
        """The columns that the template names besides the problem, and that its data must have."""
        return tuple(name for name in self._template.columns if name != TARGET or not self._targets)

    @property
    def _targets(self) -> bool:
        return self.length_targets != (0, 0)

    def targeted(self, example: Example) -> Example:
        """Returns a problem with the length that its prompt asks for in `meta`, if it asks for one.

        The length is uniform over the whole numbers of `length_targets`, ends included.
        """
        if not self._targets:
            return example
        low, high = self.length_targets
        drawn = np.random.default_rng([_TARGET_STREAM, self.seed, example.id])
        target = int(drawn.integers(low, high, endpoint=True))
        return dataclasses.replace(example, meta={**example.meta, TARGET: target})

    def text(
        self, problem: str, num_images: int = 0, columns: Mapping[str, Any] | None = None
    ) -> str:
        """Returns the whole prompt for a problem, with one placeholder per image.

        Raises:
          ValueError: the problem marks places for another number of images.
          DataError: the template names a column that is not in `columns`; or they hold messages
            before the problem (`table.EARLIER`), and the template is no chat.
        """
        earlier = (columns or {}).get(EARLIER, [])
        if earlier and not self._template.chat:
            raise DataError(
                f"template {self.template!r} is no chat, and the problem ends a conversation: take "
                "data.template=chat, or name the text of one message, as in prompt.0.content"
            )
        message = self._template.fill(problem, columns)
        pieces = self._pieces(message, num_images)
        if not self._template.chat:
            return f"{VISION_START}{IMAGE_TOKEN}{VISION_END}".join(pieces)
        messages = [*earlier, {"role": "user", "content": _content(pieces)}]
        if self.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return self.chat_text(messages)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, asks: bool = True) -> str:
        """Returns the text of chat messages; `asks` opens the assistant's next turn after them."""
        thinking = self.enable_thinking
        return self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=asks,
            **({} if thinking is None else {"enable_thinking": thinking}),
        )

    def messages(self, problem: str) -> list[dict[str, str]]:
        """Returns the messages, without an answer, in which a chat template puts a problem."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": self._template.fill(problem)}]

    @property
    def is_chat(self) -> bool:
        """Whether prompts go through the tokenizer's chat template."""
        return self._template.chat

    def _pieces(self, message: str, num_images: int) -> list[str]:
        """Returns the text before, between and after the images."""
        marks = message.count(IMAGE_MARK)
        if self.images is None or not (marks or num_images):
            return [message]
        if not marks:
            return [*("" for _ in range(num_images)), message]
        if marks != num_images:
            raise ValueError(f"{marks} × {IMAGE_MARK} in the problem and {num_images} images")
        return message.split(IMAGE_MARK)

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns int32 token ids of each prompt; a chat template includes its special tokens."""
        encoded = self.tokenizer(list(texts), add_special_tokens=not self._template.chat)
        return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]

    @property
    def hash(self) -> str:
        """Returns sixteen hex digits that change with anything that changes a prompt's text."""
        chat_template = self.tokenizer.chat_template if self._template.chat else None
        parts = (dataclasses.astuple(self._template), chat_template)
        if self.images is not None:
            parts = (*parts, self.images.settings.hash)
        if self._targets:
            parts = (*parts, self.length_targets, self.seed)
        what = json.dumps([*parts, self.system_prompt, self.enable_thinking], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]


def _content(pieces: list[str]) -> str | list[dict[str, str]]:
    """Returns a user message: a string if it is one piece, else parts separated by images."""
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
    """Returns all prompts, in order, and how many examples were dropped as too long or refused."""
    found = outcomes(examples, renderer, max_length=max_length)
    records = [record for record in found if isinstance(record, PromptRecord)]
    return records, len(found) - len(records)


def outcomes(
    examples: Iterable[Example], renderer: Renderer, *, max_length: int
) -> list[PromptRecord | Refusal]:
    """Returns each example's prompt or refusal, in order."""
    examples = [renderer.targeted(example) for example in examples]
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
    """Returns the prompt's text."""
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
    """Combines the outcomes of all processes: an example that one refuses, all refuse.

    Files and time limits may fail on one process only. `gather` returns the values of all.
    """
    refusals = gather([outcome if isinstance(outcome, Refusal) else None for outcome in own])
    first = (next(filter(None, column), None) for column in zip(*refusals, strict=True))
    return [refusal or outcome for refusal, outcome in zip(first, own, strict=True)]


def pictured(record: PromptRecord, renderer: Renderer) -> PromptRecord:
    """Restores the images of a prompt that was stored without them; see `with_images`."""
    return with_images([record], renderer)[0]


def with_images(records: Sequence[PromptRecord], renderer: Renderer) -> list[PromptRecord]:
    """Restores the images of prompts that were stored without them.

    Raises:
      DataError: an image can no longer be read, or has changed its size.
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
