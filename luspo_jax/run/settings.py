"""A whole configuration as one frozen object, and single sections of it."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from ml_collections import ConfigDict

from luspo_jax import objectives
from luspo_jax.experience import shaping
from luspo_jax.experience.shaping import Shaping
from luspo_jax.hosts.values import (
    SEED,
    ConfigError,
    Number,
    Rule,
    check_fields,
    refused_field,
    shown,
)
from luspo_jax.length.settings import LengthSettings
from luspo_jax.objectives import Objective
from luspo_jax.run.data_sections import DataSettings
from luspo_jax.run.output_sections import OutputSettings
from luspo_jax.run.sections import (
    EvalSettings,
    HostsSettings,
    LoraSettings,
    MeshSettings,
    ModelSettings,
    RewardSettings,
    RolloutMeshSettings,
    RolloutSettings,
    TrainSettings,
)
from luspo_jax.run.sft.sections import SftSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole configuration, frozen; each section is valid by itself.

    `checks.check` returns one whose sections also fit together.
    """

    seed: int = 0  # Of all random draws except held-out responses (eval.seed).
    num_steps: int = 100  # Rollout steps.
    model: ModelSettings
    lora: LoraSettings
    mesh: MeshSettings
    rollout_mesh: RolloutMeshSettings
    data: DataSettings
    reward: RewardSettings
    rollout: RolloutSettings
    shaping: Shaping
    objective: Objective
    train: TrainSettings
    length: LengthSettings
    eval: EvalSettings
    output: OutputSettings
    hosts: HostsSettings

    RULES: ClassVar[dict[str, Rule]] = {"seed": SEED, "num_steps": Number(1, 2**31 - 1)}

    def __post_init__(self):
        check_fields(self)

    @classmethod
    def of(cls, config: ConfigDict) -> "Settings":
        """Returns the settings of a configuration.

        Raises:
          ConfigError: with the problems inside its sections, one per argument.
        """
        built, problems = sections_of(config)
        if problems:
            raise ConfigError(*problems)
        return cls(**built)


# All are read alike: `config.rollout.group_size`.
Config = ConfigDict | Settings | SftSettings


def sections(kind: type) -> dict[str, type]:
    """Returns the sections of a kind of configuration, Settings or SftSettings, by name."""
    return {
        field.name: field.type
        for field in dataclasses.fields(kind)
        if dataclasses.is_dataclass(field.type)
    }


def rules(kind: type) -> dict[str, Rule]:
    """Returns field → rule for its value, besides its type.

    Every numeric field has one, except those of Objective and LengthSettings, which check their
    own.
    """
    found = dict(kind.RULES)
    for name, section in sections(kind).items():
        of_section = shaping.RULES if section is Shaping else getattr(section, "RULES", {})
        found |= {f"{name}.{field}": rule for field, rule in of_section.items()}
    return found


SECTIONS, RULES = sections(Settings), rules(Settings)


def kind_of(names: Iterable[str]) -> type:
    """Returns Settings or SftSettings: whose fields these (dotted) names are, or nearly are."""
    roots = {name.partition(".")[0] for name in names}
    known = {kind: {field.name for field in dataclasses.fields(kind)} for kind in KINDS}
    return min(KINDS, key=lambda kind: len(roots ^ known[kind]))


KINDS = (Settings, SftSettings)


def sections_of(config: ConfigDict, kind: type = Settings) -> tuple[dict[str, Any], list[str]]:
    """Returns (name → field or section, for the valid ones; problems of the others)."""
    built, problems = {}, []
    for field in dataclasses.fields(kind):
        try:
            built[field.name] = section(config, field.name, kind)
        except ValueError as error:
            problems += error.args
    return built, problems


def section(config: Config, name: str, kind: type = Settings) -> Any:
    """Returns one section as its dataclass, or a top-level field, whatever the others hold.

    Args:
      config: a ConfigDict, or settings, whose own section is returned.
      name: of the section.
      kind: of a ConfigDict: Settings or SftSettings.

    Raises:
      ConfigError: with the problems inside it, one per argument.
    """
    if isinstance(config, KINDS):
        return getattr(config, name)
    value, known = config[name], sections(kind)
    if name not in known:
        problem = refused_field(kind, name, value)
        if problem:
            raise ConfigError(problem)
        return value
    if not isinstance(value, ConfigDict):
        raise ConfigError(f"{name}={shown(value)} must be a section: {{'name': value, …}}")
    try:
        return _objective(config) if name == "objective" else known[name](**value.to_dict())
    except ConfigError:
        raise
    except ValueError as error:  # from a class that does not know the name of its section
        text = str(error).replace("Objective.", "objective.")
        raise ConfigError(text if text.startswith(f"{name}.") else f"{name}.{text}") from error


def _objective(config):
    """Returns the preset with the fields that the configuration sets.

    `max_response_length`, the constant of Dr.GRPO's aggregation, is the rollout's limit unless set.
    """
    chosen = {name: x for name, x in config.objective.to_dict().items() if x is not None}
    chosen.setdefault("max_response_length", config.rollout.max_response_length)
    return objectives.preset(chosen.pop("preset"), **chosen)
