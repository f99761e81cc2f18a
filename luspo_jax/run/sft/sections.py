"""The configuration of supervised fine-tuning: sections of its own, and those shared with RL."""

import dataclasses
from typing import ClassVar

from luspo_jax.datasets.demonstrations import GENERATED
from luspo_jax.hosts.values import SEED, TEMPERATURE, Number, OneOf, Rule, Text, check_fields
from luspo_jax.learner.demonstrations import AGGREGATIONS
from luspo_jax.learner.optimizer import SCHEDULES
from luspo_jax.prompts.demonstrations import TOO_LONG, TURNS
from luspo_jax.prompts.templates import TEMPLATES
from luspo_jax.run.data_sections import wrong_filter
from luspo_jax.run.output_sections import SftOutputSettings
from luspo_jax.run.sections import (
    HostsSettings,
    LoraSettings,
    MeshSettings,
    ModelSettings,
    RolloutMeshSettings,
)

_MOST = 2**31 - 1
_SIZE, _COUNT = Number(1, _MOST), Number(0, _MOST)


@dataclasses.dataclass(frozen=True)
class DemonstrationSettings:
    """Demonstrations to train on and held out, and how they become tokens."""

    name: str = "file"  # file, or a task of datasets.demonstrations.GENERATED.
    # Jsonl, json, csv or parquet files: one, several as "DIR/*.parquet", a folder, an address, or
    # hub:OWNER/NAME, perhaps with /FILE, /FOLDER or /PATTERN.
    path: str = ""
    split: str = "train"  # Of a folder or repository.
    subset: str = ""  # Of a repository or folder with several tables.
    filter: str = ""  # Rows to take, held-out ones too; as in RL.
    limit: int = 0  # Only the first so many rows of `path`, before the filter; 0 = all.
    # Read these rows of hub:OWNER/NAME without downloading its files; needs the package datasets.
    streaming: bool = False
    prompt_column: str = "prompt"  # Of prompts.
    response_column: str = "response"  # Of their answers.
    # Column of chat messages, a list of {role, content}; if set, the two above are not read.
    messages_column: str = ""
    turns: str = "last"  # Answers of a chat that are trained on: the last, or all.
    train_on_prompt: bool = False  # Train on every token instead of answers only.
    held_out_path: str = ""  # File of held-out rows, with the same columns.
    held_out_split: str = "test"  # Of that, if it is a folder or repository.
    held_out_fraction: float = 0.0  # Or: the share of `path` to hold out, drawn by `seed`.
    drop_bad_rows: bool = False  # Leave out and count rows that cannot be used.
    # How a prompt is put to the model: a name of luspo_jax.prompts.templates.TEMPLATES, or a text
    # with {problem} in it. This and the next three are as in RL.
    template: str = "plain"
    template_chat: bool | None = None  # Whether such a text is a message of a chat.
    system_prompt: str = ""  # For a chat template; empty = the template's own.
    enable_thinking: bool | None = None  # Passed to the chat template if set.
    max_length: int = 1024  # Tokens of prompt and answer.
    # Longer demonstrations are left out and counted (drop), lose their end (cut), or stop the run
    # (refuse).
    too_long: str = "drop"

    RULES: ClassVar[dict[str, Rule]] = {
        "name": OneOf(("file", *GENERATED)),
        "split": Text("say train, or another split of the folder or repository"),
        "held_out_split": Text("say test, or another split of the folder or repository"),
        "limit": Number(0, 2**53),
        "turns": OneOf(TURNS),
        "held_out_fraction": Number(0, 1, open_high=True),
        "template": OneOf(TEMPLATES, mark="{problem}"),
        "max_length": Number(2, 2**24),
        "too_long": OneOf(TOO_LONG),
    }

    def __post_init__(self):
        check_fields(self, "data.", self._wrong())

    def _wrong(self):
        own = self.name == "file"
        if own and not self.path:
            yield "data.path is empty: name a file of demonstrations"
        for field in () if own else ("path", "held_out_path", "messages_column"):
            if getattr(self, field):
                yield f"data.{field} is of data.name=file: {self.name} is generated"
        if not own and self.held_out_fraction:
            yield f"data.held_out_fraction: {self.name} has a test split of its own; leave it at 0"
        yield from wrong_filter("data.filter", self.filter)
        if own and self.streaming and not self.limit:
            yield "data.streaming takes the first data.limit rows: set data.limit"
        for field in () if own else ("subset", "filter", "limit", "streaming"):
            if getattr(self, field):
                yield f"data.{field} is of data.name=file: {self.name} is generated"
        if self.held_out_path and self.held_out_fraction:
            yield "data.held_out_path and data.held_out_fraction both hold rows out: set one"
        if self.messages_column and self.template != "plain":
            yield (
                f"data.template={self.template!r} is of a column of prompts: messages "
                "(data.messages_column) go through the tokenizer's chat template as they are"
            )
        if self.turns == "all" and not self.messages_column:
            yield "data.turns=all is of chats: set data.messages_column"
        named = TEMPLATES.get(self.template)
        told = self.system_prompt != "" or self.enable_thinking is not None
        if named is not None and not named.chat and told and not self.messages_column:
            yield (
                f"data.template={self.template!r} is no chat template: data.system_prompt and "
                "data.enable_thinking would be ignored; take data.template=chat, or leave them out"
            )


@dataclasses.dataclass(frozen=True)
class SftTrainSettings:
    """The optimizer steps."""

    batch_size: int = 64  # Demonstrations of an optimizer step.
    num_microbatches: int = 1  # Parts of a step, to bound memory.
    # Pack demonstrations end to end into dense rows; micro-batches then hold as many as fit.
    packing: bool = False
    microbatch_tokens: int = 0  # Limit of rows × pack_length of a packed micro-batch.
    pack_length: int = 0  # Tokens of a packed row; 0 = data.max_length.
    num_length_buckets: int = 4  # Possible row lengths of a step: each compiles once.
    # Over the step: the mean over tokens; the mean over demonstrations of their token means or of
    # their token sums (length counts fully, as in LUSPO).
    aggregation: str = "token-mean"
    router_aux_coef: float = 0.0  # Weight of the load-balancing loss of a mixture of experts.
    learning_rate: float = 1e-5  # After the warm-up.
    warmup_steps: int = 20  # Optimizer steps.
    schedule: str = "constant"  # After the warm-up, over num_steps: a key of optimizer.SCHEDULES.
    final_rate: float = 0.1  # Share of learning_rate where a schedule that falls ends.
    b1: float = 0.9  # Of AdamW.
    b2: float = 0.999  # Of AdamW.
    eps: float = 1e-8  # Of AdamW.
    weight_decay: float = 0.0  # Of AdamW.
    max_grad_norm: float = 1.0  # 0 = off.

    RULES: ClassVar[dict[str, Rule]] = {
        "batch_size": Number(1, 2**20),
        "num_microbatches": _SIZE,
        "microbatch_tokens": Number(0, 2**28),
        "pack_length": Number(0, 2**25),
        "num_length_buckets": _SIZE,
        "aggregation": OneOf(AGGREGATIONS),
        "router_aux_coef": Number(0, 1e3),
        "learning_rate": Number(0, 1, open_low=True),
        "warmup_steps": _COUNT,
        "schedule": OneOf(SCHEDULES),
        "final_rate": Number(0, 1),
        "b1": Number(0, 1, open_high=True),
        "b2": Number(0, 1, open_high=True),
        "eps": Number(1e-30, 1, why="of AdamW, beside the root of the second moment"),
        "weight_decay": Number(0, 1e3),
        "max_grad_norm": Number(0, 1e30),
    }

    def __post_init__(self):
        check_fields(self, "train.", self._wrong())

    def _wrong(self):
        if self.batch_size % self.num_microbatches:
            yield (
                f"train.num_microbatches={self.num_microbatches} does not divide "
                f"train.batch_size={self.batch_size}"
            )
        for field in () if self.packing else ("microbatch_tokens", "pack_length"):
            if getattr(self, field):
                yield (
                    f"train.{field}={getattr(self, field)} is of packed rows: set "
                    "train.packing=True"
                )
        if self.packing and self.num_microbatches != 1:
            yield (
                f"train.num_microbatches={self.num_microbatches} cannot be set with train.packing: "
                f"micro-batches are sized by train.microbatch_tokens={self.microbatch_tokens}"
            )


@dataclasses.dataclass(frozen=True)
class SftEvalSettings:
    """What is measured on held-out demonstrations."""

    every: int = 50  # Optimizer steps; 0 = only before and after training.
    num_examples: int = 1000  # Held-out demonstrations whose loss is measured, the first ones.
    num_generations: int = 16  # Of their prompts, how many are answered; 0 = none.
    num_samples: int = 1  # Answers per prompt.
    max_response_length: int = 256  # Tokens of an answer.
    temperature: float = 0.0  # 0 takes the likeliest token.
    top_p: float = 1.0  # Mass of the likeliest tokens to keep; 1 = all.
    top_k: int = 0  # 0 = off.
    num_slots: int = 64  # Sequences decoded at once.
    chunk_length: int = 64  # Decode steps between two looks by the host.
    seed: int = 7  # Of the sampling noise.

    RULES: ClassVar[dict[str, Rule]] = {
        "every": _COUNT,
        "num_examples": _SIZE,
        "num_generations": _COUNT,
        "num_samples": Number(1, 2**16),
        "max_response_length": Number(1, 2**24),
        "temperature": dataclasses.replace(
            TEMPERATURE, also=(0,), why="0 takes the likeliest token"
        ),
        "top_p": Number(0, 1, open_low=True),
        "top_k": _COUNT,
        "num_slots": _SIZE,
        "chunk_length": _SIZE,
        "seed": SEED,
    }

    def __post_init__(self):
        check_fields(self, "eval.", self._wrong())

    def _wrong(self):
        if self.temperature == 0 and self.num_samples > 1:
            yield (
                f"eval.num_samples={self.num_samples} must be 1 at eval.temperature=0: greedy "
                "answers are all alike"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftSettings:
    """A whole configuration of supervised fine-tuning, frozen."""

    seed: int = 0  # Of the order of demonstrations, of what is held out, and of random weights.
    num_steps: int = 200  # Optimizer steps.
    model: ModelSettings
    lora: LoraSettings
    mesh: MeshSettings
    rollout_mesh: RolloutMeshSettings  # Of the answers to held-out prompts.
    data: DemonstrationSettings
    train: SftTrainSettings
    eval: SftEvalSettings
    output: SftOutputSettings
    hosts: HostsSettings

    RULES: ClassVar[dict[str, Rule]] = {"seed": SEED, "num_steps": _SIZE}

    def __post_init__(self):
        check_fields(self, together=self._wrong_packing())

    def _wrong_packing(self):
        train, longest = self.train, self.data.max_length
        if not train.packing:
            return
        length = train.pack_length or longest
        if length < longest:
            yield (
                f"train.pack_length={length} is shorter than the longest sequence, "
                f"data.max_length={longest}: raise it, or set 0 for that"
            )
        elif train.microbatch_tokens < length:
            yield (
                f"train.microbatch_tokens={train.microbatch_tokens} holds no packed row of "
                f"{length} tokens: with train.packing, set it to {length} for each row to be "
                "computed at once"
            )

    @property
    def row_length(self) -> int:
        """Tokens of a row that the model reads, at most."""
        return (self.train.packing and self.train.pack_length) or self.data.max_length

    @property
    def rows_per_microbatch(self) -> int:
        """Rows that are computed together."""
        if self.train.packing:
            return self.train.microbatch_tokens // self.row_length
        return self.train.batch_size // self.train.num_microbatches
