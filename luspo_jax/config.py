"""The run's configuration: every field with its default, its checks, and the batch arithmetic."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from luspo_jax import objectives
from luspo_jax.datasets import DATASETS
from luspo_jax.datasets.templates import TEMPLATES
from luspo_jax.defaults import default_config
from luspo_jax.length.settings import LengthSettings
from luspo_jax.logprobs import REPLAYS
from luspo_jax.models.decoder import REMAT
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
    # Another mesh may need other micro-batches; results depend on them by rounding only.
    "train.num_microbatches",
    "train.microbatch_tokens",
)


# Sections whose field names are not ours to know.
OPEN_SECTIONS = (
    "model.overrides.", "data.mixture.", "data.options.", "reward.parts.", "reward.options.",
)  # fmt: skip


class ConfigError(ValueError):
    """A configuration that cannot run; the message names each field and the remedy."""


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
    new, defaults = (json.loads(json.dumps(flat(c))) for c in (config, default_config()))
    old = defaults | old  # a run is older than a field that it does not have
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
    ]
    if "{problem}" not in config.data.template:
        choices.append(("data.template", config.data.template, TEMPLATES))

    if config.data.eval_name:
        choices.append(("data.eval_name", config.data.eval_name, DATASETS))
    for field, value, names in choices:
        if value not in names:
            yield f'{field}="{value}" does not exist: {nearest(value, names)}'
    yield from _wrong_template(config.data)
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
    if config.train.router_replay not in REPLAYS:
        yield (
            f'train.router_replay="{config.train.router_replay}": '
            f"{nearest(config.train.router_replay, REPLAYS)}"
        )
    if config.model.remat not in REMAT:
        yield f'model.remat="{config.model.remat}": {nearest(config.model.remat, REMAT)}'
    if config.model.overrides and not config.model.random_weights:
        yield "model.overrides changes the architecture and needs model.random_weights=True"


def _wrong_template(data: ConfigDict) -> Iterator[str]:
    own = "{problem}" in data.template
    if own and data.template.count("{problem}") > 1:
        yield f"data.template={data.template!r} must hold {{problem}} once"
    if data.template_chat is not None and not own:
        yield (
            "data.template_chat is of a template of your own, which holds {problem}: "
            f'data.template="{data.template}" is a named one, which says so itself'
        )


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
        "train.router_aux_coef", "data.min_pixels", "data.max_pixels", "data.text_blank",
        "data.image_workers",
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
    if config.train.ref_every and not _of_objective(config, "kl_coef"):
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
