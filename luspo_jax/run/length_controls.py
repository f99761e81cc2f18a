"""What steers length besides the objective: what cannot run together, and what is said of the rest.

Rewards of a group, the choice of responses, and lengths that prompts ask for.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from luspo_jax.hosts.values import Number, nearest, refusal, shown
from luspo_jax.rewards.group import TARGET, group_reward
from luspo_jax.run.settings import Settings

# What a group reward does to lengths, for those that have a direction.
_SHORTENS = (
    *("alp", "cosine", "gr3", "grlc", "kimi", "l1_max", "laser", "laser_d", "leash", "linear"),
)
_LENGTHENS = ("lie",)
# Beyond it, squares of rewards overflow float32.
WEIGHT = Number(-1e15, 1e15)


def wrong_entries(config: ConfigDict) -> Iterator[str]:
    """Yields problems in the group rewards, one by one."""
    parts, options = config.reward.group, config.reward.group_options
    measured = str(config.length.objectives).replace("+", ",").split(",")
    for name in options:
        if name not in parts and name not in map(str.strip, measured):
            yield f"reward.group_options.{name}: no reward of a group; {nearest(name, parts)}"
    for name, weight in parts.items():
        problem = refusal(f"reward.group.{name}", weight, float, WEIGHT)
        if problem:
            yield problem
        if name in config.reward.parts:
            yield f"reward.group.{name}: reward.parts has a part of that name; call one otherwise"
        problem = _wrong_part(name, options.get(name, {}))
        if problem:
            yield problem


def _wrong_part(name, options) -> str | None:
    field = f"reward.group_options.{name}"
    if not isinstance(options, ConfigDict | Mapping):
        return f"{field}={shown(options)} must be a section: {{'option': value, …}}"
    options = _plain(options)
    try:
        group_reward(name, options)
    except (ValueError, TypeError) as error:
        return f"{f'{field}={shown(options)}' if options else f'reward.group.{name}'}: {error}"
    return None


def _plain(options: Any) -> dict[str, Any]:
    return options.to_dict() if isinstance(options, ConfigDict) else dict(options)


def wrong_together(config: ConfigDict) -> Iterator[str]:
    """Yields group rewards and choices of responses that conflict with other sections."""
    options, group_size = config.reward.group_options, config.rollout.group_size
    for name in config.reward.group:
        made = group_reward(name, _plain(options.get(name, {})))
        if made.targeted and not config.data.length_target_high:
            yield (
                f"reward.group.{name} pays for the length that the prompt asks for: set "
                f"data.length_target_low and data.length_target_high, and a data.template with "
                f"{{{TARGET}}}, such as length"
            )
    kept = config.shaping.gfpo_adaptive
    if kept and max(map(int, kept.split(","))) > group_size:
        yield f"shaping.gfpo_adaptive={kept} exceeds rollout.group_size={group_size}"
    most = (group_size - 1) / math.sqrt(group_size)
    if config.shaping.dot and most <= config.shaping.dot_deviations:
        yield (
            f"shaping.dot_deviations={config.shaping.dot_deviations:g} cuts nothing: of "
            f"rollout.group_size={group_size} responses none is more than {most:.2f} standard "
            "deviations above their mean; lower it, or take larger groups"
        )


def notices(settings: Settings) -> Iterator[str]:
    """Yields a line on each two controls of length that do the same or undo each other."""
    names = list(settings.reward.group)
    shorten = [f"reward.group.{name}" for name in names if name in _SHORTENS]
    lengthen = [f"reward.group.{name}" for name in names if name in _LENGTHENS]
    if settings.objective.advantage_shaping != "none":
        shorten.insert(0, f"objective.advantage_shaping={settings.objective.advantage_shaping}")
        if len(shorten) > 1:
            yield (
                f"{_joined(shorten)} each favour short responses: the advantage is shaped on top "
                "of the reward"
            )
    scale = settings.objective.length_scale
    if scale in ("length", "power", "adaptive"):
        weight = f"objective.length_scale={scale}"
        if shorten:
            yield (
                f"{weight} weighs long responses more and {_joined(shorten)} "
                f"{_pays(shorten)} less for them: they pull length in opposite directions"
            )
        if lengthen:
            yield f"{weight} and {_joined(lengthen)} both favour long responses: their pulls add up"
    if len(names) > 1:
        every = _joined([f"reward.group.{name}" for name in names])
        what = ", some for short ones and some for long" if shorten and lengthen else ""
        yield f"{every} all reward responses by their group{what}: the reward has their sum"
    both = [*shorten, *lengthen]
    if "overlong" in settings.reward.parts and both:
        yield (
            f"reward.parts.overlong and {_joined(both)} both change the reward by length: near "
            "rollout.max_response_length their sum counts"
        )
    if settings.length.mitigation == "penalty" and both:
        yield (
            f"length.mitigation=penalty comes on top of {_joined(both)} when length degenerates: "
            "both are in the reward then"
        )
    yield from _bands(settings.objective)
    yield from _choices(settings, both)


def _bands(objective):
    if objective.clip_length_exponent > 0 and objective.length_scale != "none":
        yield (
            f"objective.length_scale={objective.length_scale} weighs long responses and "
            f"objective.clip_length_exponent={objective.clip_length_exponent:g} clips them sooner: "
            "the one makes their gradient larger, the other cuts more of it"
        )


def _choices(settings, rewards):
    shaping = settings.shaping
    keeps_short = shaping.gfpo_by == "length" and max(shaping.kept_by_quarter) > 0
    if keeps_short and rewards:
        yield (
            f"shaping.gfpo_by=length keeps the shortest responses alone, and {_joined(rewards)} "
            f"{_pays(rewards)} for length among them, by the lengths of the whole group"
        )
    if shaping.dot and shaping.overlong_filter:
        yield (
            "shaping.dot cuts outliers so that they lose their reward, and shaping.overlong_filter "
            "takes the gradient of cut responses away: what dot cuts has none"
        )


def _joined(names):
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _pays(names):
    return "pays" if len(names) == 1 else "pay"
