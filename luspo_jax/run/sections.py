"""The sections of a configuration: every field with its default and the rule for its value.

Those of the data are in `data_sections`.

A section is a dataclass, here or next to what it configures (Objective, Shaping, LengthSettings).
Its RULES restrict the values of fields beyond their types. `fields.default_config` builds the
configuration that users and flags set from these declarations; `settings.Settings` has frozen
sections to read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from luspo_jax.hosts.peers import BEAT_S
from luspo_jax.hosts.values import (
    SEED,
    TEMPERATURE,
    Number,
    OneOf,
    Rule,
    Text,
    check_fields,
    nearest,
)
from luspo_jax.learner.logprobs import REPLAYS
from luspo_jax.learner.state import OFFLOADS
from luspo_jax.models.decoder import REMAT
from luspo_jax.models.low_rank import BASES, INITS, MODULES
from luspo_jax.ops import attention, grouped_matmul
from luspo_jax.run.data_sections import open_section

_MOST = 2**31 - 1  # the largest int32
_SIZE, _COUNT = Number(1, _MOST), Number(0, _MOST)
_LONGEST = Number(1, 2**24)  # tokens
_PROCESSES = 1024
_AXIS = Number(1, 2**16, also=(-1,))
_SHARE = Number(0, 1)
_TYPES = OneOf(("bfloat16", "float32"))
_SAMPLER_TYPES = OneOf(("bfloat16", "float32", "int8"))
_ATTENTION = OneOf(("auto", *attention.IMPLEMENTATIONS))
_PRODUCT = OneOf(("auto", *grouped_matmul.IMPLEMENTATIONS))


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The policy: its source and how it is computed."""

    # A folder in Hugging Face format, "embedded:NAME" for a model inside this package,
    # "gguf:FILE" to read a GGUF file, or "gs://…", "s3://…", "hub:OWNER/NAME" to download one.
    path: str = ""
    tokenizer: str = ""  # Folder; empty = the model's.
    # Comma-separated ids that end a response, besides those in the model's files; "none" if only
    # the length limit may end one.
    stop_token_ids: str = ""
    random_weights: bool = False  # Read config.json only and draw weights from `seed`.
    # Fields of config.json, with random_weights only.
    overrides: Mapping[str, Any] = open_section()
    dtype: str = "float32"  # Compute dtype of training; master weights are float32.
    # "bfloat16" rounds the operands of the trainer's matrix products to it and sums in float32: on
    # CPUs with AVX512-BF16 an update takes 0.8 to 0.9 of the time. Empty = dtype.
    products: str = ""
    # Dtype of sampling: weights, activations and KV cache. "int8": matrices as int8 with a scale
    # for each output channel, everything else bfloat16 (luspo_jax.models.quantised).
    rollout_dtype: str = "float32"
    remat: str = "none"  # What is stored for the backward pass: a key of decoder.REMAT.
    attention: str = "auto"  # By platform, or a name of luspo_jax.ops.attention.
    expert_kernel: str = "auto"  # By platform, or a name of luspo_jax.ops.grouped_matmul.
    head_chunk_tokens: int = 2048  # Tokens whose logits exist at once on a device.

    RULES: ClassVar[dict[str, Rule]] = {
        "path": Text("name a folder in Hugging Face format, or embedded:NAME"),
        "products": OneOf(("", "bfloat16")),
        "dtype": _TYPES,
        "rollout_dtype": _SAMPLER_TYPES,
        "remat": OneOf(REMAT),
        "attention": _ATTENTION,
        "expert_kernel": _PRODUCT,
        "head_chunk_tokens": _SIZE,
    }

    def __post_init__(self):
        check_fields(self, "model.", self._wrong())

    def _wrong(self):
        ids = [part.strip() for part in self.stop_token_ids.split(",") if part.strip()]
        if self.stop_token_ids != "none" and not all(part.isdecimal() for part in ids):
            yield (
                f"model.stop_token_ids={self.stop_token_ids!r} must be ids joined with commas, as "
                "0,2, or none"
            )
        if self.overrides and not self.random_weights:
            yield "model.overrides changes the architecture and needs model.random_weights=True"
        if self.products and self.dtype != "float32":
            yield (
                f"model.products={self.products} rounds operands of float32: set model.dtype="
                f"float32, or leave it empty, as model.dtype={self.dtype} rounds everything"
            )

    @property
    def own_stop_ids(self) -> tuple[int, ...]:
        """Returns the ids of `stop_token_ids`; none for "none"."""
        if self.stop_token_ids == "none":
            return ()
        return tuple(int(part) for part in self.stop_token_ids.split(",") if part.strip())


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The low-rank adapter that is trained in place of the weights (luspo_jax.models.low_rank)."""

    rank: int = 0  # Of every adapted matrix; 0 = train the weights themselves.
    alpha: float = 32.0  # x · A · B counts alpha / rank times.
    rslora: bool = False  # alpha / √rank times instead.
    # Comma-separated names of Hugging Face's linear layers, as q_proj,v_proj; or all-linear: those
    # of attention and MLP. The head, the embedding and routers have no adapter.
    targets: str = "all-linear"
    experts: bool = False  # Adapt those of a mixture's experts too.
    vision: bool = False  # Adapt all linear layers of the vision tower.
    init: str = "kaiming"  # How A begins, or gaussian; or pissa: A and B from W's largest parts.
    start: str = ""  # A folder in PEFT's format to begin from; empty = at the model's own policy.
    dropout: float = 0.0  # Of the adapter's input; only 0: the sampler would be another policy.
    base: str = "bfloat16"  # What the frozen weights are stored as.

    RULES: ClassVar[dict[str, Rule]] = {
        "rank": _COUNT,
        "alpha": Number(0, 1e6, open_low=True),
        "init": OneOf(INITS),
        "dropout": Number(0, 0, why="the sampler drops nothing, and would be another policy"),
        "base": OneOf(BASES),
    }

    def __post_init__(self):
        check_fields(self, "lora.", self._wrong())

    def _wrong(self):
        for name in self.names:
            if name not in MODULES:
                yield f"lora.targets: no linear layer {name!r}; {nearest(name, MODULES)}"
        if self.start and self.init == "pissa":
            yield "lora.start begins from an adapter, and lora.init=pissa from parts of W: set one"
        if not self.names:
            yield "lora.targets is empty: name linear layers, as q_proj,v_proj, or all-linear"

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of `targets`, in one order and once each."""
        asked = {part.strip() for part in self.targets.split(",") if part.strip()}
        asked = set(MODULES) if asked == {"all-linear"} else asked
        return tuple(sorted(asked))


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The training mesh, over all processes; one size may be -1: all remaining devices."""

    data: int = 1  # Copies of the weights.
    fsdp: int = -1  # Shards rows and weights alike; weights are gathered a layer at a time.
    expert: int = 1  # As fsdp, and shards experts.
    context: int = 1  # Shards the length of a row.
    tensor: int = 1  # Shards heads, mlp and vocabulary.

    RULES: ClassVar[dict[str, Rule]] = {
        "data": _AXIS,
        "fsdp": _AXIS,
        "expert": _AXIS,
        "context": _AXIS,
        "tensor": _AXIS,
    }

    def __post_init__(self):
        check_fields(self, "mesh.", _wrong_axes("mesh", self.sizes))

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → its size, or -1."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class RolloutMeshSettings:
    """The rollout mesh; each copy of the weights stays within a process."""

    data: int = -1  # Copies of the weights; each samples some of the sequences.
    expert: int = 1  # Shards experts.
    context: int = 1  # Shards the KV cache's positions.
    tensor: int = 1  # Shards heads, mlp and vocabulary.
    # Devices, the last ones, that only sample: the next step's responses, while the others train.
    # 0: all devices sample, then train. Needs rollout.max_age >= 1. Of several processes: all
    # devices of the last ones.
    apart: int = 0

    RULES: ClassVar[dict[str, Rule]] = {
        "data": _AXIS,
        "expert": _AXIS,
        "context": _AXIS,
        "tensor": _AXIS,
        "apart": _COUNT,
    }

    def __post_init__(self):
        check_fields(self, "rollout_mesh.", _wrong_axes("rollout_mesh", self.sizes))

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → its size, or -1."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "apart"}


def _wrong_axes(mesh, sizes):
    rest = [f"{mesh}.{axis}" for axis, size in sorted(sizes.items()) if size == -1]
    if len(rest) > 1:
        yield (
            f"{' and '.join(rest)} are -1: one axis may be, for as many devices as the others leave"
        )


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """How responses are rewarded."""

    parts: Mapping[str, float] = open_section()  # Verifier → weight.
    # Verifier → its options, e.g. overlong: {buffer: 4096, factor: 0.3}. Your own reward is any
    # name with the option function: "module:function" or "file.py:function".
    options: Mapping[str, Any] = open_section()
    # Reward of a group → weight: of each response beside the others to its prompt, mostly by
    # length; one of luspo_jax.rewards.group.GROUP_REWARDS. In training, not in evaluation.
    group: Mapping[str, float] = open_section()
    group_options: Mapping[str, Any] = open_section()  # Reward of a group → its options.
    timeout_s: float = 10.0  # Per verification.
    num_workers: int = 2  # Processes for verifiers that need a hard time limit.
    max_failure_rate: float = 0.05  # Share of time-outs and errors above which the run stops.

    RULES: ClassVar[dict[str, Rule]] = {
        "timeout_s": Number(0.01, 1e5),
        "num_workers": Number(1, _PROCESSES),
        "max_failure_rate": _SHARE,
    }

    def __post_init__(self):
        check_fields(self, "reward.")


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """What a step samples, and how."""

    prompts_per_step: int = 16  # Prompts of a step.
    group_size: int = 8  # Responses per prompt.
    max_response_length: int = 256  # Tokens.
    temperature: float = 1.0  # Of sampling, and of the log-probs in training.
    top_p: float = 1.0  # Mass of the likeliest tokens to keep; 1 = all.
    top_k: int = 0  # 0 = off.
    num_slots: int = 128  # Most sequences decoded at once; pages limit them too.
    # Gigabytes (10^9 bytes) of keys and values on a device; 0 = what training and weights leave.
    cache_gb: float = 0.0
    page_size: int = 0  # Tokens of a page of them on a device; 0 = the platform's.
    cache_dtype: str = ""  # Dtype of them: empty = model.rollout_dtype's, or int8.
    chunk_length: int = 64  # Decode steps between two looks by the host.
    # Prompts in flight beyond those of a step. A step then ends when enough groups are complete;
    # the other responses go on in the next, under its weights. 0: a step waits for all.
    overlap: int = 0
    max_age: int = 0  # Most steps between the one that begins a group and the one that takes it.
    # What becomes of groups that would grow older: "wait" for them, or "drop" them, as others do;
    # what is trained on is then shorter than what is sampled.
    late: str = "wait"
    # Which complete groups a step takes: those that began first (begun), or the shortest, unless
    # others are due. The latter needs rollout.overlap.
    order: str = "begun"
    # How the sampler reads a low-rank adapter: "merged" into a copy of the weights, in
    # model.rollout_dtype; or "apart", beside the frozen weights as lora.base stores them.
    lora: str = "merged"
    # Largest |sampler − trainer| log-prob difference of one token allowed at the first step. In
    # float32 more than 0.05 is a bug; in bfloat16 rounding makes 0.2 to 0.5 (a model of 135M: 0.21
    # at temperature 1, 0.44 at 0.6) and more in larger runs: set 1 there. Real bugs make nats.
    mismatch_limit: float = 0.05

    RULES: ClassVar[dict[str, Rule]] = {
        "prompts_per_step": Number(1, 2**20),
        "group_size": Number(
            2, 2**16, why="an advantage compares the responses to one prompt with each other"
        ),
        "max_response_length": _LONGEST,
        "temperature": dataclasses.replace(
            TEMPERATURE, why="colder responses are greedy and carry no gradient"
        ),
        "top_p": Number(0, 1, open_low=True),
        "top_k": _COUNT,
        "num_slots": _SIZE,
        "cache_gb": Number(0, 1e6),
        "page_size": _COUNT,
        "cache_dtype": OneOf(("", "int8")),
        "chunk_length": _SIZE,
        "overlap": Number(0, 2**20),
        "max_age": Number(0, 2**16),
        "late": OneOf(("wait", "drop")),
        "order": OneOf(("begun", "shortest")),
        "lora": OneOf(("merged", "apart")),
        "mismatch_limit": Number(0, 1e30, open_low=True, why="rounding is never 0"),
    }

    def __post_init__(self):
        check_fields(self, "rollout.", self._wrong())

    def _wrong(self):
        most = self.max_age * self.prompts_per_step
        if self.order != "begun" and self.overlap == 0:
            yield (
                f"rollout.order={self.order} chooses among groups in flight, and rollout.overlap=0 "
                "has no more than a step takes"
            )
        if self.late == "drop":
            return
        if self.overlap > 0 and self.max_age == 0:
            yield (
                f"rollout.overlap={self.overlap} lets responses go on in later steps, and "
                "rollout.max_age=0 allows none: set it to 1 or more, or rollout.overlap=0"
            )
        elif self.overlap > most:
            yield (
                f"rollout.overlap={self.overlap} is more than rollout.max_age={self.max_age} steps "
                f"of rollout.prompts_per_step={self.prompts_per_step} prompts can take in time: it "
                f"may be at most {most}"
            )


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The optimizer steps of a rollout step."""

    num_minibatches: int = 1  # Optimizer steps per pass over the rollouts.
    num_microbatches: int = 1  # Parts of a minibatch, to bound memory.
    # Pack responses end to end into dense rows; micro-batches then hold as many as fit.
    packing: bool = False
    microbatch_tokens: int = 0  # Limit of rows × pack_length of a packed micro-batch.
    pack_length: int = 0  # Tokens of a packed row; 0 = the longest sequence allowed.
    # Packed rows hold a prompt once for several of its responses: "on", "off", or "auto": where
    # attention then costs no more (on GPU and CPU).
    share_prompts: str = "auto"
    num_length_buckets: int = 4  # Possible row lengths of a step: each compiles once.
    # What moves to host memory during the rollout: a key of learner.state.OFFLOADS.
    offload: str = "none"
    # Expert ids that an update uses instead of its routers' choice: those of the trainer's pass
    # before the step ("old", R2), of the sampler ("sampler", R3), or "none".
    router_replay: str = "none"
    freeze_vision: bool = False  # Do not train the vision tower of a vision-language model.
    router_aux_coef: float = 0.0  # Weight of the load-balancing loss; Qwen's files say 0.001.
    num_epochs: int = 1  # Passes over the rollouts.
    learning_rate: float = 1e-6  # After the warm-up.
    warmup_steps: int = 20  # Rollout steps.
    b1: float = 0.9  # Of AdamW.
    b2: float = 0.999  # Of AdamW.
    eps: float = 1e-8  # Of AdamW.
    weight_decay: float = 0.0  # Of AdamW.
    max_grad_norm: float = 1.0  # 0 = off.
    # Interval in rollout steps of π_ref ← ref_decay · π_ref + (1 − ref_decay) · π; 0 = never.
    ref_every: int = 0
    ref_decay: float = 0.0  # The same formula's; 0 = π_ref becomes π.

    RULES: ClassVar[dict[str, Rule]] = {
        "num_minibatches": _SIZE,
        "num_microbatches": _SIZE,
        "microbatch_tokens": Number(0, 2**28),
        "pack_length": Number(0, 2**25),
        "share_prompts": OneOf(("auto", "on", "off")),
        "num_length_buckets": _SIZE,
        "offload": OneOf(OFFLOADS),
        "router_replay": OneOf(REPLAYS),
        "router_aux_coef": Number(0, 1e3),
        "num_epochs": _SIZE,
        "learning_rate": Number(0, 1, open_low=True),
        "warmup_steps": _COUNT,
        "b1": Number(0, 1, open_high=True),
        "b2": Number(0, 1, open_high=True),
        "eps": Number(1e-30, 1, why="of AdamW, beside the root of the second moment"),
        "weight_decay": Number(0, 1e3),
        "max_grad_norm": Number(0, 1e30),
        "ref_every": _COUNT,
        "ref_decay": Number(0, 1, open_high=True),
    }

    def __post_init__(self):
        check_fields(self, "train.", self._wrong())

    def _wrong(self):
        if self.learning_rate * self.weight_decay >= 1:
            yield (
                f"train.weight_decay={self.weight_decay} times train.learning_rate="
                f"{self.learning_rate} must be less than 1: a step would wipe the weights out"
            )
        for field in () if self.packing else ("microbatch_tokens", "pack_length"):
            if getattr(self, field):
                yield (
                    f"train.{field}={getattr(self, field)} is of packed rows: set "
                    "train.packing=True"
                )
        if self.share_prompts == "on" and not self.packing:
            yield "train.share_prompts=on is of packed rows: set train.packing=True"
        if self.share_prompts == "on" and self.router_aux_coef:
            yield (
                f"train.router_aux_coef={self.router_aux_coef} balances experts over all tokens of "
                "all responses, and train.share_prompts=on computes some of them once: set it to "
                "auto or off"
            )
        if self.packing and self.num_microbatches != 1:
            yield (
                f"train.num_microbatches={self.num_microbatches} cannot be set with train.packing: "
                f"micro-batches are sized by train.microbatch_tokens={self.microbatch_tokens}"
            )


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """How the policy is measured on held-out problems."""

    every: int = 10  # Rollout steps; 0 = only before and after training.
    num_problems: int = 500  # Number of held-out problems, the first ones.
    num_samples: int = 4  # Responses per problem.
    temperature: float = 1.0  # 0 takes the likeliest token.
    top_p: float = 1.0  # As in the rollout.
    top_k: int = 0  # 0 = off.
    num_slots: int = 256  # Sequences decoded at once.
    seed: int = 7  # Of the sampling noise; equal for all runs, so that runs compare in pairs.
    # The reward part that counts as accuracy; may be empty if there is only one.
    metric: str = ""
    # Tokens, such as "1024,2048", at which responses are cut and judged again; or "auto".
    budgets: str = ""

    RULES: ClassVar[dict[str, Rule]] = {
        "every": _COUNT,
        "num_problems": _SIZE,
        "num_samples": Number(1, 2**16),
        "temperature": dataclasses.replace(
            TEMPERATURE, also=(0,), why="0 takes the likeliest token"
        ),
        "top_p": Number(0, 1, open_low=True),
        "top_k": _COUNT,
        "num_slots": _SIZE,
        "seed": SEED,
    }

    def __post_init__(self):
        check_fields(self, "eval.", self._wrong())

    def _wrong(self):
        if self.temperature == 0 and self.num_samples > 1:
            yield (
                f"eval.num_samples={self.num_samples} must be 1 at eval.temperature=0: greedy "
                "responses are all alike"
            )


@dataclasses.dataclass(frozen=True)
class HostsSettings:
    """Settings of a run of several processes; see luspo_jax.hosts.guard."""

    dead_after_s: float = 30.0  # Seconds without a sign of life after which a process is dead.
    phase_timeout_s: float = 0.0  # The longest time that a phase may take; 0 = no limit.

    RULES: ClassVar[dict[str, Rule]] = {
        "dead_after_s": Number(
            3 * BEAT_S, 1e6, why=f"processes give a sign of life every {BEAT_S:g} s"
        ),
        "phase_timeout_s": Number(0, 1e6),
    }

    def __post_init__(self):
        check_fields(self, "hosts.")
