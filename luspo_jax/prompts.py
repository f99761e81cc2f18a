"""Problems become token prompts, in a shuffled order that processes and restarts share."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax.datasets import DataError, Example, Mixture
from luspo_jax.datasets.dapo_math import PREFIX, SUFFIX


@dataclasses.dataclass(frozen=True)
class Template:
    """How a problem is put to the model.

    Attributes:
      text: the message, with `{problem}` where the problem goes.
      chat: whether the text is a user message in the tokenizer's chat template, or the prompt.
    """

    text: str
    chat: bool

    def __post_init__(self):
        if self.text.count("{problem}") != 1:
            raise ValueError(f"a template must hold {{problem}} once: {self.text!r}")


TEMPLATES = {
    "boxed": Template(
        "{problem}\n\nReason step by step and put the final answer in \\boxed{}.", chat=True
    ),
    "chat": Template("{problem}", chat=True),
    "dapo": Template(f"{PREFIX}{{problem}}{SUFFIX}", chat=True),
    "plain": Template("{problem}", chat=False),
}


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """One prompt.

    Attributes:
      prompt_id: the example's id.
      tokens: int32 token ids.
      text: what the tokens say.
      example: the problem.
    """

    prompt_id: int
    tokens: np.ndarray
    text: str
    example: Example


@dataclasses.dataclass(frozen=True)
class Renderer:
    """Turns a problem into the text that the model reads.

    Attributes:
      tokenizer: a Hugging Face tokenizer.
      template: a name in TEMPLATES, or a Template.
      system_prompt: a system message; chat templates only.
      enable_thinking: passed to the chat template where it is not None.
    """

    tokenizer: Any
    template: str | Template = "plain"
    system_prompt: str = ""
    enable_thinking: bool | None = None

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

    @property
    def _template(self) -> Template:
        return self.template if isinstance(self.template, Template) else _named(self.template)

    def text(self, problem: str) -> str:
        """The whole prompt for a problem."""
        message = self._template.text.replace("{problem}", problem)
        if not self._template.chat:
            return message
        messages = [{"role": "user", "content": message}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        thinking = self.enable_thinking
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            **({} if thinking is None else {"enable_thinking": thinking}),
        )

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 token ids of each prompt; a chat template already holds its special tokens."""
        encoded = self.tokenizer(list(texts), add_special_tokens=not self._template.chat)
        return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]

    @property
    def hash(self) -> str:
        """Sixteen hex digits that change with anything that changes a prompt's text."""
        chat_template = self.tokenizer.chat_template if self._template.chat else None
        parts = (dataclasses.astuple(self._template), chat_template)
        what = json.dumps([*parts, self.system_prompt, self.enable_thinking], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]


def _named(name: str) -> Template:
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown template {name!r}: {hint}known: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def encode(
    examples: Iterable[Example], renderer: Renderer, *, max_length: int
) -> tuple[list[PromptRecord], int]:
    """Every example's prompt, in order, and how many were dropped as longer than max_length."""
    examples = list(examples)
    if not examples:
        return [], 0
    texts = [renderer.text(example.problem) for example in examples]
    encoded = zip(examples, texts, renderer.tokens(texts), strict=True)
    records = [
        PromptRecord(example.id, tokens, text, example)
        for example, text, tokens in encoded
        if len(tokens) <= max_length
    ]
    return records, len(examples) - len(records)


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

    Attributes:
      dropped: prompts passed over so far because they were too long.
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
        self.dropped = 0
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

    def next_prompts(self, count: int) -> list[PromptRecord]:
        """The next `count` prompts of this process.

        Raises:
          DataError: every prompt of a whole epoch is too long.
        """
        wanted, found, looked_at = count * self._process_count, [], 0
        while len(found) < wanted:
            missing = wanted - len(found)
            span = range(self._position, self._position + missing)
            examples = [self._examples[int(self._order[position])] for position in span]
            records, dropped = encode(examples, self._renderer, max_length=self._max_length)
            found += records
            self._position += missing
            self.dropped += dropped
            looked_at += missing
            if not found and looked_at >= len(self._examples):
                raise DataError(
                    f"no prompts: all {looked_at} are longer than max_prompt_length="
                    f"{self._max_length} tokens"
                )
        return found[self._process_index :: self._process_count]

    def get_state(self) -> dict[str, Any]:
        """JSON-serialisable state: where the stream is, and what makes it the same stream."""
        return {"position": self._position, "dropped": self.dropped, **self._identity}

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
