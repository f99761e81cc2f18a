"""The run's configuration: what goes together, what it builds, and the batch arithmetic."""

import dataclasses
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from luspo_jax import objectives
from luspo_jax.datasets import DATASETS, DataError
from luspo_jax.datasets.table import Table
from luspo_jax.datasets.templates import TEMPLATES
from luspo_jax.defaults import OPEN_SECTIONS, SOURCE_FIELDS, default_config, wrong_fields
from luspo_jax.experience.shaping import Shaping
from luspo_jax.length.settings import LengthSettings
from luspo_jax.rewards import Sample
from luspo_jax.rewards.record import run as judge
from luspo_jax.rewards.registry import verifier
from luspo_jax.values import Number, nearest, refusal, shown

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


# Beyond it, the squares of rewards leave float32.
_WEIGHT = Number(-1e15, 1e15)


class ConfigError(ValueError):
    """A configuration that cannot run; the message names each field and the remedy."""


def check(config: ConfigDict) -> objectives.Objective:
    """Refuses a configuration that cannot run, with all problems at once; gives the objective.

    Values are looked at one by one, and together where each is sound. Reads neither model nor data.

    Raises:
      ConfigError: naming every unknown field, bad value and size that does not divide.
    """
    # Each looks at what the ones before have found to be sound.
    for look in (wrong_fields, _wrong_entries, _wrong_together):
        problems = list(look(config))
        if len(problems) == 1:
            raise ConfigError(f"this configuration cannot run: {problems[0]}")
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise ConfigError(f"this configuration cannot run:\n{lines}")
    return build_objective(config)


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
            raise ValueError(f"objectives={name!r} names no preset: {near}")
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


def stop_token_ids(config: ConfigDict) -> tuple[int, ...]:
    """The ids of `model.stop_token_ids`; none of "none".

    Raises:
      ValueError: naming the field.
    """
    text = config.model.stop_token_ids
    if text == "none":
        return ()
    ids = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in ids):
        raise ValueError(
            f"model.stop_token_ids={text!r} must be ids joined with commas, as 0,2, or none"
        )
    return tuple(int(part) for part in ids)


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


def changes(old: Mapping[str, Any], config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """field → (old, new) where `config` differs from a run's stored (flat) one and may not."""
    new, defaults = (json.loads(json.dumps(flat(c))) for c in (config, default_config()))
    old = defaults | old  # a run is older than a field that it does not have
    return {
        name: (old.get(name), new.get(name))
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and not name.startswith(_FREE_TO_CHANGE)
    }


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

    @property
    def rows_per_microbatch(self) -> int:
        """Rows that are computed together, dense ones or one a response."""
        return self.packed_rows_per_microbatch or self.responses_per_microbatch

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


def _wrong_builds(config: ConfigDict) -> Iterator[str]:
    """What objective, filters and length settings say of themselves."""
    for section, build in (
        ("model", stop_token_ids),
        ("objective", build_objective),
        ("shaping", build_shaping),
        ("length", build_length),
    ):
        try:
            build(config)
        except ValueError as error:
            text = str(error).replace("Objective.", "objective.")
            yield text if text.startswith((f"{section}.", "rollout.")) else f"{section}.{text}"


def _wrong_entries(config: ConfigDict) -> Iterator[str]:
    """What is wrong with the entries of the sections whose names are the user's."""
    yield from _wrong_rewards(config)
    yield from _wrong_datasets(config.data)
    for name, source in config.data.mixture.items():
        yield from _wrong_source(f"data.mixture.{name}", source)
    if config.model.overrides and not config.model.random_weights:
        yield "model.overrides changes the architecture and needs model.random_weights=True"


def _wrong_rewards(config: ConfigDict) -> Iterator[str]:
    parts, options = config.reward.parts, config.reward.options
    if not parts:
        yield "reward.parts is empty: name a verifier and its weight, as {'boxed_math': 1.0}"
        return
    for name in options:
        if name not in parts:
            yield f"reward.options.{name}: no part of the reward; {nearest(name, parts)}"
    for name, weight in parts.items():
        problem = refusal(f"reward.parts.{name}", weight, float, _WEIGHT)
        if problem:
            yield problem
        problem = _wrong_part(name, options.get(name, {}), config.rollout.max_response_length)
        if problem:
            yield problem


def _wrong_part(name, options, longest) -> str | None:
    """Why a verifier cannot be made, or cannot judge the longest response."""
    field = f"reward.options.{name}"
    if not isinstance(options, ConfigDict | Mapping):
        return f"{field}={shown(options)} must be a section: {{'option': value, …}}"
    options = options.to_dict() if isinstance(options, ConfigDict) else dict(options)
    try:
        made = verifier(name, options)
    except (ValueError, TypeError) as error:
        return f"{f'{field}={shown(options)}' if options else f'reward.parts.{name}'}: {error}"
    if made.id != "overlong":
        return None
    tried = judge(made, Sample("", "", length=longest, max_length=longest))
    if tried.status == "error":
        return f"{field}: {tried.detail} (rollout.max_response_length={longest})"
    return None


def _wrong_datasets(data: ConfigDict) -> Iterator[str]:
    """What generated datasets say of their split and options."""
    held_out, options = data.eval_name or data.name, data.options.to_dict()
    if data.mixture or isinstance(DATASETS[data.name], Table):
        if options:
            yield f"data.options={shown(options)}: only a generated data.name has options"
    else:
        wrong = list(_wrong_options(data.name, options))
        wrong = wrong or list(_wrong_split("data.split", data.name, data.split, options))
        if wrong:
            yield from wrong
            return
    if not isinstance(DATASETS[held_out], Table):
        own = options if held_out == data.name else {}
        yield from _wrong_split("data.eval_split", held_out, data.eval_split, own)


def _wrong_options(name: str, options: Mapping[str, Any]) -> Iterator[str]:
    kinds = {n: p.annotation for n, p in inspect.signature(DATASETS[name]).parameters.items()}
    del kinds["split"]
    for option, value in options.items():
        field, kind = f"data.options.{option}", kinds.get(option)
        if kind is None:
            yield f"{field}: {name} has no such option; {nearest(option, kinds)}"
        elif kind in (bool, int, float, str):
            problem = refusal(field, value, kind)
            yield from [problem] if problem else []


def _wrong_split(field: str, name: str, split: str, options: Mapping[str, Any]) -> Iterator[str]:
    try:
        DATASETS[name](split=split, **options)
    except (DataError, TypeError, ValueError) as error:
        yield f"{field}={split!r}{', data.options' if options else ''}: {error}"


def _wrong_source(place: str, source: Any) -> Iterator[str]:
    """What is wrong with one source of a mixture."""
    if not isinstance(source, ConfigDict | Mapping):
        yield f"{place}={shown(source)} must be a section: {{'name': …, 'path': …, 'weight': …}}"
        return
    for name in source:
        if name not in SOURCE_FIELDS:
            yield f"{place}.{name}: no such field; {nearest(name, SOURCE_FIELDS)}"
        else:
            problem = refusal(f"{place}.{name}", source[name], *SOURCE_FIELDS[name])
            if problem:
                yield problem
    if "name" not in source:
        yield f"{place}: it needs a name, one of luspo_jax.datasets.DATASETS"


def _wrong_together(config: ConfigDict) -> Iterator[str]:
    """Values that are sound by themselves and do not go together."""
    for broken, message in _senseless(config):
        if broken:
            yield message
    yield from _wrong_sizes(config)
    yield from _wrong_packing(config)
    yield from _wrong_builds(config)


def _senseless(config: ConfigDict) -> list[tuple[bool, str]]:
    """(Whether it is so, what to do)."""
    data, train, held_out = config.data, config.train, config.eval
    parts = ", ".join(config.reward.parts)
    wandb = config.output.wandb_project
    return [
        (
            not held_out.metric and len(config.reward.parts) > 1,
            f"eval.metric is empty: say which of reward.parts counts as accuracy ({parts})",
        ),
        (
            held_out.metric != "" and held_out.metric not in config.reward.parts,
            f"eval.metric={held_out.metric!r} is not among reward.parts ({parts})",
        ),
        (
            held_out.temperature == 0 and held_out.num_samples > 1,
            f"eval.num_samples={held_out.num_samples} must be 1 at eval.temperature=0: greedy "
            "responses are all alike",
        ),
        (
            data.template in TEMPLATES
            and not TEMPLATES[data.template].chat
            and (data.system_prompt != "" or data.enable_thinking is not None),
            f"data.template={data.template!r} is no chat template: data.system_prompt and "
            "data.enable_thinking would be ignored; take data.template=chat, or leave them out",
        ),
        (
            data.template_chat is not None and data.template in TEMPLATES,
            "data.template_chat is of a template of your own, which holds {problem}: "
            f"data.template={data.template} is a named one, which says so itself",
        ),
        (
            0 < data.max_pixels < data.min_pixels,
            f"data.min_pixels={data.min_pixels} exceeds data.max_pixels={data.max_pixels}",
        ),
        *(
            (
                list(config[mesh].values()).count(-1) > 1,
                f"{' and '.join(f'{mesh}.{k}' for k in config[mesh] if config[mesh][k] == -1)} are "
                "-1: one axis may be, for as many devices as the others leave",
            )
            for mesh in ("mesh", "rollout_mesh")
        ),
        (
            train.ref_every > 0 and not _of_objective(config, "kl_coef"),
            "train.ref_every refreshes the reference of a KL term, but objective.kl_coef is 0",
        ),
        (
            train.learning_rate * train.weight_decay >= 1,
            f"train.weight_decay={train.weight_decay} times train.learning_rate="
            f"{train.learning_rate} must be less than 1: a step would wipe the weights out",
        ),
        (
            bool(wandb) and importlib.util.find_spec("wandb") is None,
            f"output.wandb_project={wandb!r}: wandb is not installed: pip install wandb, or leave "
            "the field empty",
        ),
    ]


def _wrong_sizes(config: ConfigDict) -> Iterator[str]:
    prompts, minibatches = config.rollout.prompts_per_step, config.train.num_minibatches
    if prompts % minibatches:
        yield (
            f"train.num_minibatches={minibatches} does not divide rollout.prompts_per_step="
            f"{prompts}: minibatches hold whole groups"
        )
    else:
        rows = prompts // minibatches * config.rollout.group_size
        if rows % config.train.num_microbatches:
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
            f"tokens: with train.packing, set it to {length} for each row to be computed at once"
        )
    if train.num_microbatches != 1:
        yield (
            f"train.num_microbatches={train.num_microbatches} cannot be set with train.packing: "
            f"micro-batches are sized by train.microbatch_tokens={train.microbatch_tokens}"
        )
