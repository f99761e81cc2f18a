"""The configuration that users and flags set: built from the sections, read, set and compared."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from luspo_jax.hosts.values import nearest, refusal, shown
from luspo_jax.objectives import Objective
from luspo_jax.run.settings import Settings, kind_of, rules
from luspo_jax.run.sft.sections import SftSettings


def default_config(kind: type = Settings) -> ConfigDict:
    """Returns a new configuration with every field at its default; `configs/` fill it in.

    `kind` is Settings, or SftSettings for supervised fine-tuning (`default_sft_config`).
    """
    config = ConfigDict()
    for field in dataclasses.fields(kind):
        if field.type is Objective:
            config[field.name] = _unset_objective()
        elif dataclasses.is_dataclass(field.type):
            config[field.name] = ConfigDict()
            for inner in dataclasses.fields(field.type):
                config[field.name][inner.name] = _default(inner)
        else:
            config[field.name] = field.default
    config.lock()
    return config


def default_sft_config() -> ConfigDict:
    """Returns a new configuration of supervised fine-tuning, every field at its default."""
    return default_config(SftSettings)


def _unset_objective():
    """Returns every field unset: a preset gives the values."""
    section = ConfigDict({"preset": "luspo"})
    for field in dataclasses.fields(Objective):
        section[field.name] = placeholder(_plain_type(field))
    return section


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return ConfigDict()
    return placeholder(_plain_type(field)) if field.default is None else field.default


def _plain_type(field: dataclasses.Field) -> type:
    for plain in (bool, int, float, str):
        if field.type is plain or (plain.__name__ in str(field.type)):
            return plain
    raise TypeError(f"{field.name} has type {field.type}, which no flag can set")


# Sections whose field names the user chooses.
OPEN_SECTIONS = (
    "model.overrides.", "data.mixture.", "data.options.", "data.eval_options.", "reward.parts.",
    "reward.options.", "reward.group.", "reward.group_options.",
)  # fmt: skip


# Field of an older version → its present name.
RENAMED = {
    "model.experts": "model.expert_kernel",
    "output.wandb_project": "output.project",
}


def wrong_fields(config: Mapping[str, Any], kind: type = Settings) -> Iterator[str]:
    """Yields a line for each field that is unknown, missing, of another type or out of range."""
    yield from _wrong_fields(config, _known(kind), _rules(kind))


def instead_of(field: str, names: Iterable[str]) -> str:
    """Says what to use for an unknown field: its new name, or the nearest."""
    return f"it is {RENAMED[field]} now" if field in RENAMED else nearest(field, names)


_known, _rules = functools.cache(default_config), functools.cache(rules)  # never handed out


def _wrong_fields(config, known, ruled, prefix=""):
    for key in config:
        if key not in known:
            field, names = f"{prefix}{key}", [f"{prefix}{name}" for name in known]
            yield f"unknown field {field}: {instead_of(field, names)}"
    missing = [f"{prefix}{key}" for key in known if key not in config]
    if missing:
        begin = "default_sft_config" if "rollout.group_size" not in ruled else "default_config"
        yield f"missing {', '.join(missing)}: start from luspo_jax.run.fields.{begin}()"
    for key in config:
        if key not in known:
            continue
        field, kind = f"{prefix}{key}", known.get_type(key)
        if kind is ConfigDict:
            if not isinstance(config[key], ConfigDict | Mapping):
                yield f"{field}={shown(config[key])} must be a section: {{'name': value, …}}"
            elif f"{field}." not in OPEN_SECTIONS:
                yield from _wrong_fields(config[key], known[key], ruled, f"{field}.")
        elif config[key] is not None or known[key] is not None:  # None where the default is unset
            problem = refusal(field, config[key], kind, ruled.get(field))
            yield from [problem] if problem else []


# Fields that may change between a run and its continuation in the same workdir.
_FREE_TO_CHANGE = (
    "num_steps",
    "output.",
    "hosts.",
    "eval.num_slots",
    "eval.chunk_length",
    "rollout.num_slots",
    "rollout.cache_gb",
    "rollout.page_size",
    "rollout.chunk_length",
    "mesh.",
    "rollout_mesh.data",
    "rollout_mesh.expert",
    "rollout_mesh.context",
    "rollout_mesh.tensor",
    "train.offload",
    # Another mesh may need other micro-batches; they change results only by rounding.
    "train.num_microbatches",
    "train.microbatch_tokens",
)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens to dotted names of all leaves: {"rollout.group_size": 8, …}."""
    leaves = {}
    for key in config:
        value, name = config[key], f"{prefix}{key}"
        if isinstance(value, (ConfigDict, Mapping)):
            leaves |= flat(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


def assign(config: ConfigDict, leaves: Mapping[str, Any]) -> None:
    """Sets dotted fields, from `flat` of this or an older version.

    Raises:
      KeyError, TypeError: a field that does not exist, or a value of another type.
    """
    for name, value in _renamed(leaves).items():
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


def _renamed(leaves):
    return {RENAMED.get(name, name): value for name, value in leaves.items()}


def changes(old: Mapping[str, Any], config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns field → (old, new) where `config` differs, and may not, from a run's flat fields."""
    known = default_config(kind_of(config))
    new, defaults = (json.loads(json.dumps(flat(c))) for c in (config, known))
    old = defaults | _renamed(old)  # fields that are newer than the run have their defaults
    return {
        name: (old.get(name), new.get(name))
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and not name.startswith(_FREE_TO_CHANGE)
    }


def fingerprint(config: ConfigDict) -> str:
    """Returns twelve hex digits that change with any field."""
    return hashlib.sha256(json.dumps(flat(config), sort_keys=True).encode()).hexdigest()[:12]
