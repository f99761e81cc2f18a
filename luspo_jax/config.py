"""The run's configuration: every field with its default, its checks, and the batch arithmetic."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from luspo_jax import objectives
from luspo_jax.datasets import DATASETS
from luspo_jax.length.settings import LengthSettings
from luspo_jax.models.decoder import REMAT
from luspo_jax.prompts import TEMPLATES
from luspo_jax.rewards.registry import verifiers
from luspo_jax.shaping import Shaping
from luspo_jax.update import OFFLOADS
from luspo_jax.watchdog import BEAT_S

# Fields that may change between a run and its continuation in the same workdir.
_FREE_TO_CHANGE = (
    "num_steps",
    "output.",
    "hosts.",
    "eval.num_slots",
    "rollout.num_slots",
    "rollout.chunk_length",
    "mesh.",
    "rollout_mesh.",
    "train.offload",
)


# Sections whose field names are not ours to know.
OPEN_SECTIONS = (
    "model.overrides.", "data.mixture.", "data.options.", "reward.parts.", "reward.options.",
)  # fmt: skip


class ConfigError(ValueError):
    """A configuration that cannot run; the message names each field and the remedy."""


def default_config() -> ConfigDict:
    """A new configuration with every field there is, at its default; `configs/` fill it in."""
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 100  # Rollout steps.

    config.model = ConfigDict()
    # A folder in Hugging Face format, "embedded:NAME" for a model inside this package, or
    # "hub:OWNER/NAME" to download one.
    config.model.path = ""
    config.model.tokenizer = ""  # Folder; empty = the model's.
    config.model.random_weights = False  # Read config.json only and draw weights from `seed`.
    config.model.overrides = ConfigDict()  # Fields of config.json, with random_weights only.
    config.model.dtype = "float32"  # Compute dtype of training; master weights are float32.
    config.model.rollout_dtype = "float32"  # Of sampling: weights, activations and KV cache.
    config.model.remat = "none"  # What is kept for the backward pass: a key of decoder.REMAT.
    config.model.attention = "reference"
    config.model.head_chunk_tokens = 2048  # Tokens whose logits exist at one time on a device.

    # Devices of training, of all processes; one size may be -1, for as many as the others leave.
    config.mesh = ConfigDict()
    config.mesh.data = 1  # Copies of the weights.
    config.mesh.fsdp = -1  # Rows and weights cut alike; weights are gathered a layer at a time.
    config.mesh.expert = 1  # As fsdp, and experts are cut over it.
    config.mesh.context = 1  # Parts of a row.
    config.mesh.tensor = 1  # Parts of heads, mlp and vocabulary.

    # Devices of the rollout; one copy of the weights lies within a process.
    config.rollout_mesh = ConfigDict()
    config.rollout_mesh.data = -1
    config.rollout_mesh.expert = 1
    config.rollout_mesh.context = 1  # Parts of the KV cache's positions.
    config.rollout_mesh.tensor = 1

    config.data = ConfigDict()
    config.data.name = ""  # One of luspo_jax.datasets.DATASETS.
    config.data.path = ""  # Local file of a dataset that is not generated.
    config.data.split = "train"
    config.data.options = ConfigDict()  # Of a generated dataset.
    # Several sources to train on in place of `name`: a name of yours → {name, path, split, weight,
    # problem_column, answer_column}; weight is a share of the prompts.
    config.data.mixture = ConfigDict()
    config.data.eval_name = ""  # Held-out set; empty = data.name.
    config.data.eval_path = ""  # Empty = data.path.
    config.data.eval_split = "test"
    config.data.cache_dir = ""  # Where built datasets are kept; empty = the user's cache folder.
    config.data.problem_column = ""  # Of a user's own jsonl or parquet.
    config.data.answer_column = ""
    config.data.template = "plain"  # One of luspo_jax.prompts.TEMPLATES.
    config.data.system_prompt = ""
    config.data.enable_thinking = placeholder(bool)  # Passed to the chat template where set.
    config.data.max_prompt_length = 1024  # Tokens; longer prompts are dropped and counted.

    config.reward = ConfigDict()
    config.reward.parts = ConfigDict()  # Verifier → weight.
    # Verifier → its options, e.g. overlong: {buffer: 4096, factor: 0.3}. A reward of your own is
    # any name with the option function: "module:function" or "file.py:function".
    config.reward.options = ConfigDict()
    config.reward.timeout_s = 10.0  # Of one verification.
    config.reward.num_workers = 2  # Processes for verifiers that need a hard time limit.
    config.reward.max_failure_rate = 0.05  # Share of time-outs and errors that stops the run.

    config.rollout = ConfigDict()
    config.rollout.prompts_per_step = 16
    config.rollout.group_size = 8
    config.rollout.max_response_length = 256
    config.rollout.temperature = 1.0
    config.rollout.top_p = 1.0
    config.rollout.top_k = 0  # 0 = off.
    config.rollout.num_slots = 128  # Sequences decoded at once.
    config.rollout.chunk_length = 64  # Decode steps between two looks by the host.
    config.rollout.mismatch_limit = 0.05  # |sampler − trainer| log-prob refused at the first step.

    config.shaping = ConfigDict()  # See luspo_jax.shaping.Shaping.
    for field in dataclasses.fields(Shaping):
        config.shaping[field.name] = field.default

    config.objective = ConfigDict()
    config.objective.preset = "luspo"
    for field in dataclasses.fields(objectives.Objective):
        # Unset = the preset's value.
        config.objective[field.name] = placeholder(_plain_type(field))

    config.train = ConfigDict()
    config.train.num_minibatches = 1  # Optimizer steps a pass over the rollouts.
    config.train.num_microbatches = 1  # Parts of a minibatch, to bound memory.
    # Lay responses end to end in dense rows; micro-batches then hold as many as fit.
    config.train.packing = False
    config.train.microbatch_tokens = 0  # Of a packed micro-batch: rows × pack_length, at most.
    config.train.pack_length = 0  # Tokens of a packed row; 0 = the longest sequence allowed.
    config.train.num_length_buckets = 4  # Row lengths a step may have: each compiles once.
    # What waits in host memory during the rollout: a key of update.OFFLOADS.
    config.train.offload = "none"
    config.train.num_epochs = 1  # Passes over the rollouts.
    config.train.learning_rate = 1e-6
    config.train.warmup_steps = 20  # Rollout steps.
    config.train.b1 = 0.9
    config.train.b2 = 0.999
    config.train.eps = 1e-8
    config.train.weight_decay = 0.0
    config.train.max_grad_norm = 1.0  # 0 = off.
    # Every so many rollout steps, π_ref ← ref_decay · π_ref + (1 − ref_decay) · π; 0 = never.
    config.train.ref_every = 0
    config.train.ref_decay = 0.0

    config.length = ConfigDict()  # See luspo_jax.length.settings.LengthSettings.
    for field in dataclasses.fields(LengthSettings):
        config.length[field.name] = field.default

    config.eval = ConfigDict()
    config.eval.every = 10  # Rollout steps; 0 = only before and after training.
    config.eval.num_problems = 500
    config.eval.num_samples = 4  # Responses a problem.
    config.eval.temperature = 1.0
    config.eval.top_p = 1.0
    config.eval.top_k = 0
    config.eval.num_slots = 256
    config.eval.seed = 7  # Of the noise: one value for all runs, so that runs compare in pairs.
    # Reward part that counts as accuracy; may stay empty where there is only one.
    config.eval.metric = ""

    config.output = ConfigDict()
    config.output.checkpoint_every = 10  # Rollout steps; 0 = only at the end.
    config.output.keep_latest = 2
    config.output.keep_best = 1  # By held-out accuracy.
    config.output.dump_every = 1  # Rollout steps between dumps of all responses; 0 = never.
    config.output.tensorboard = True
    config.output.wandb_project = ""  # Empty = no Weights & Biases.
    config.output.export = True  # Write a Hugging Face folder at the end.

    config.hosts = ConfigDict()  # Of a run of several processes; see luspo_jax.watchdog.
    config.hosts.dead_after_s = 30.0  # Without a sign of life a process counts as dead.
    config.hosts.phase_timeout_s = 0.0  # Longest that a phase may take; 0 = no limit.
    config.lock()
    return config


def check(config: ConfigDict) -> objectives.Objective:
    """Refuses a configuration that cannot run, all problems in one message; gives the objective.

    Raises:
      ConfigError: naming every unknown field, bad value and size that does not divide.
    """
    problems = list(_unknown_fields(config))
    if not problems:
        problems = [*_wrong_names(config), *_wrong_sizes(config), *_wrong_packing(config)]
    objective = None
    if not problems:
        try:
            objective = build_objective(config)
        except ValueError as error:
            problems.append(f"objective: {error}")
        try:
            build_shaping(config)
        except ValueError as error:
            problems.append(f"shaping.{error}")
        try:
            build_length(config)
        except ValueError as error:
            problems.append(f"length.{error}")
    if problems:
        raise ConfigError(
            "this configuration cannot run:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return objective


def build_objective(config: ConfigDict) -> objectives.Objective:
    """The preset with the fields that the configuration sets.

    `max_response_length`, the constant of Dr.GRPO's aggregation, is the rollout's limit unless set.
    """
    chosen = {k: v for k, v in config.objective.to_dict().items() if v is not None}
    chosen.setdefault("max_response_length", config.rollout.max_response_length)
    objective = objectives.preset(chosen.pop("preset"), **chosen)
    objectives.validate_group_size(objective, config.rollout.group_size)
    return objective


def build_shaping(config: ConfigDict) -> Shaping:
    """The filters of the configuration."""
    shaping = Shaping(**config.shaping.to_dict())
    if shaping.gfpo_keep > config.rollout.group_size:
        raise ValueError(
            f"gfpo_keep={shaping.gfpo_keep} exceeds rollout.group_size={config.rollout.group_size}"
        )
    return shaping


def build_length(config: ConfigDict) -> LengthSettings:
    """Instruments and controls of response length.

    Raises:
      ValueError: naming the field.
    """
    settings = LengthSettings(**config.length.to_dict())
    for name in settings.names:
        if name not in objectives.PRESETS:
            near = nearest(name, objectives.PRESETS)
            raise ValueError(f'objectives names "{name}", which is no preset: {near}')
    group_size = config.rollout.group_size
    if settings.every and group_size < 4:
        raise ValueError(
            f"every={settings.every} measures length pressure inside halves of a group: "
            f"rollout.group_size={group_size} must be at least 4"
        )
    steers = settings.steer != "none" or settings.mitigation == "scale"
    adaptive = _of_objective(config, "length_scale") == "adaptive"
    if steers and not adaptive:
        raise ValueError(
            'steer and mitigation="scale" move α of an adaptive scale: set '
            "objective.length_scale=adaptive"
        )
    start = _of_objective(config, "length_alpha")
    if adaptive and not settings.alpha_low <= start <= settings.alpha_high:
        raise ValueError(
            f"alpha_low={settings.alpha_low:g} and alpha_high={settings.alpha_high:g} must enclose "
            f"objective.length_alpha={start:g}, where α starts"
        )
    longest = config.rollout.max_response_length
    if settings.steer == "band" and settings.target_low > longest:
        raise ValueError(
            f"target_low={settings.target_low:g} is out of reach: no response is longer than "
            f"rollout.max_response_length={longest}"
        )
    return settings


def _of_objective(config, field):
    """A field of the objective, which may not be buildable: the configuration's or its preset's."""
    value = config.objective[field]
    preset = objectives.PRESETS.get(config.objective.preset, objectives.Objective())
    return getattr(preset, field) if value is None else value


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"rollout.group_size": 8, …}: dotted names of all leaves."""
    leaves = {}
    for key in config:
        value, name = config[key], f"{prefix}{key}"
        if isinstance(value, (ConfigDict, Mapping)):
            leaves |= flat(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


def assign(config: ConfigDict, leaves: Mapping[str, Any]) -> None:
    """Sets dotted fields, as `flat` gives them.

    Raises:
      KeyError, TypeError: a field that does not exist, or a value of another type.
    """
    for name, value in leaves.items():
        *sections, last = name.split(".")
        target = config
        for section in sections:
            if section not in target and name.startswith(OPEN_SECTIONS):
                with target.unlocked():  # options of a reward: a section inside an open one
                    target[section] = ConfigDict()
            target = target[section]
        if name.startswith(OPEN_SECTIONS):
            with target.unlocked():
                target[last] = value
        elif value is not None:
            target[last] = value


def changes(old: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """Fields in which `config` differs from a run's stored (flat) one and may not."""
    new = json.loads(json.dumps(flat(config)))
    return [
        f"{name}: {old.get(name)!r} in the workdir, {new.get(name)!r} now"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and not name.startswith(_FREE_TO_CHANGE)
    ]


def fingerprint(config: ConfigDict) -> str:
    """Twelve hex digits that change with any field."""
    return hashlib.sha256(json.dumps(flat(config), sort_keys=True).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class BatchArithmetic:
    """What "batch size" means in this run."""

    prompts_per_step: int
    group_size: int
    responses_per_step: int
    responses_per_minibatch: int
    responses_per_microbatch: int
    updates_per_step: int
    tokens_per_row: int
    pack_length: int = 0  # 0 without packing
    packed_rows_per_microbatch: int = 0

    def __str__(self) -> str:
        parts = (
            f"{self.packed_rows_per_microbatch} packed rows × {self.pack_length} tokens, as many "
            "as the responses fill"
            if self.pack_length
            else f"{self.responses_per_microbatch} rows × up to {self.tokens_per_row} tokens"
        )
        return (
            f"{self.prompts_per_step} prompts × {self.group_size} responses = "
            f"{self.responses_per_step} responses a step; {self.updates_per_step} optimizer "
            f"step(s) of {self.responses_per_minibatch} responses, in micro-batches of "
            f"{parts}"
        )


def batch_arithmetic(config: ConfigDict) -> BatchArithmetic:
    """Resolves the sizes of a step from a checked configuration.

    With packing, `responses_per_microbatch` is how many of the longest fit.
    """
    rollout, train = config.rollout, config.train
    responses = rollout.prompts_per_step * rollout.group_size
    longest = config.data.max_prompt_length + rollout.max_response_length
    together = responses // train.num_minibatches // train.num_microbatches
    pack_length = rows = 0
    if train.packing:
        pack_length = train.pack_length or longest
        rows = train.microbatch_tokens // pack_length
        together = rows * pack_length // longest
    return BatchArithmetic(
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        responses_per_step=responses,
        responses_per_minibatch=responses // train.num_minibatches,
        responses_per_microbatch=together,
        updates_per_step=train.num_minibatches * train.num_epochs,
        tokens_per_row=longest,
        pack_length=pack_length,
        packed_rows_per_microbatch=rows,
    )


def nearest(name: str, names: Any) -> str:
    """' (did you mean "x"?)' or the list of valid names."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f'did you mean "{close[0]}"?' if close else f"valid: {', '.join(sorted(names))}"


def _plain_type(field: dataclasses.Field) -> type:
    for plain in (bool, int, float, str):
        if field.type is plain or (plain.__name__ in str(field.type)):
            return plain
    raise TypeError(f"Objective.{field.name} has type {field.type}, which no flag can set")


def _unknown_fields(config: ConfigDict) -> Iterator[str]:
    known = default_config()
    names = set(flat(known))
    for name in flat(config):
        if name not in names and not name.startswith(OPEN_SECTIONS):
            yield f"unknown field {name}: {nearest(name, names)}"
    for name in names - set(flat(config)):
        yield f"missing field {name}: start from luspo_jax.config.default_config()"


def _wrong_names(config: ConfigDict) -> Iterator[str]:
    if not config.model.path:
        yield "model.path is empty: name a folder in Hugging Face format, or embedded:NAME"
    choices = [
        ("data.name", config.data.name, DATASETS),
        ("data.template", config.data.template, TEMPLATES),
    ]
    if config.data.eval_name:
        choices.append(("data.eval_name", config.data.eval_name, DATASETS))
    for field, value, names in choices:
        if value not in names:
            yield f'{field}="{value}" does not exist: {nearest(value, names)}'
    try:
        verifiers(config.reward.parts.to_dict(), config.reward.options.to_dict())
    except ValueError as error:
        yield f"reward: {error}"
    if not config.eval.metric and len(config.reward.parts) > 1:
        yield (
            "eval.metric is empty: say which of reward.parts counts as accuracy "
            f"({', '.join(config.reward.parts)})"
        )
    if config.eval.metric and config.eval.metric not in config.reward.parts:
        yield f'eval.metric="{config.eval.metric}" is not among reward.parts'
    for field in ("dtype", "rollout_dtype"):
        if config.model[field] not in ("float32", "bfloat16"):
            yield f'model.{field}="{config.model[field]}": valid: bfloat16, float32'
    if config.train.offload not in OFFLOADS:
        yield f'train.offload="{config.train.offload}": {nearest(config.train.offload, OFFLOADS)}'
    if config.model.remat not in REMAT:
        yield f'model.remat="{config.model.remat}": {nearest(config.model.remat, REMAT)}'
    if config.model.overrides and not config.model.random_weights:
        yield "model.overrides changes the architecture and needs model.random_weights=True"


def _wrong_sizes(config: ConfigDict) -> Iterator[str]:
    values = flat(config)
    for field in (
        "num_steps", "data.max_prompt_length", "rollout.prompts_per_step", "rollout.group_size",
        "rollout.max_response_length", "rollout.num_slots", "rollout.chunk_length",
        "train.num_minibatches", "train.num_microbatches", "train.num_epochs",
        "train.num_length_buckets", "model.head_chunk_tokens", "eval.num_problems",
        "eval.num_samples", "eval.num_slots", "output.keep_latest", "reward.num_workers",
    ):  # fmt: skip
        if values[field] < 1:
            yield f"{field}={values[field]} must be at least 1"
    for field in (
        "rollout.top_k", "eval.top_k", "eval.every", "eval.temperature", "train.warmup_steps",
        "train.weight_decay", "train.max_grad_norm", "output.checkpoint_every",
        "output.keep_best", "output.dump_every", "train.ref_every", "hosts.phase_timeout_s",
    ):  # fmt: skip
        if values[field] < 0:
            yield f"{field}={values[field]} must not be negative"
    if not config.hosts.dead_after_s >= 3 * BEAT_S:
        yield (
            f"hosts.dead_after_s={config.hosts.dead_after_s} must be at least {3 * BEAT_S:g}: "
            f"processes give a sign of life every {BEAT_S:g} s"
        )
    if not config.rollout.temperature > 0:
        yield (
            f"rollout.temperature={config.rollout.temperature} must be > 0: greedy responses "
            "carry no gradient"
        )
    for field in ("rollout.top_p", "eval.top_p"):
        if not 0 < values[field] <= 1:
            yield f"{field}={values[field]} must be in (0, 1]"
    if not 0 <= config.train.ref_decay < 1:
        yield f"train.ref_decay={config.train.ref_decay} must be in [0, 1)"
    if config.train.ref_every and not config.objective.kl_coef:
        yield "train.ref_every refreshes the reference of a KL term, but objective.kl_coef is 0"
    if not config.train.learning_rate > 0:
        yield f"train.learning_rate={config.train.learning_rate} must be > 0"
    prompts, minibatches = config.rollout.prompts_per_step, max(1, config.train.num_minibatches)
    if prompts % minibatches:
        yield (
            f"train.num_minibatches={minibatches} does not divide rollout.prompts_per_step="
            f"{prompts}: minibatches hold whole groups"
        )
    else:
        rows = prompts // minibatches * config.rollout.group_size
        if config.train.num_microbatches > 0 and rows % config.train.num_microbatches:
            yield (
                f"train.num_microbatches={config.train.num_microbatches} does not divide the "
                f"{rows} responses of a minibatch (rollout.prompts_per_step × rollout.group_size / "
                "train.num_minibatches)"
            )


def _wrong_packing(config: ConfigDict) -> Iterator[str]:
    train, prompt, response = (
        config.train, config.data.max_prompt_length, config.rollout.max_response_length
    )  # fmt: skip
    if not train.packing:
        for field in ("microbatch_tokens", "pack_length"):
            if train[field]:
                yield f"train.{field}={train[field]} is of packed rows: set train.packing=True"
        return
    longest = prompt + response
    length = train.pack_length or longest
    if length < longest:
        yield (
            f"train.pack_length={length} is shorter than the longest sequence, "
            f"data.max_prompt_length + rollout.max_response_length = {prompt} + {response} = "
            f"{longest}: raise it, or set 0 for that"
        )
    elif train.microbatch_tokens < length:
        yield (
            f"train.microbatch_tokens={train.microbatch_tokens} holds no packed row of {length} "
            f"tokens: set it to {length} for each row that is to be computed at once"
        )
    if train.num_microbatches != 1:
        yield (
            f"train.num_microbatches={train.num_microbatches} cannot be set with train.packing: "
            f"micro-batches are sized by train.microbatch_tokens={train.microbatch_tokens}"
        )
