"""Checks that a configuration can run, within its sections and across them."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from luspo_jax import objectives
from luspo_jax.benchmarks.budgets import budgets
from luspo_jax.datasets import DATASETS, DataError
from luspo_jax.datasets.table import Table
from luspo_jax.hosts.values import ConfigError, nearest, refusal, shown
from luspo_jax.length.candidates import candidate
from luspo_jax.length.settings import LengthSettings
from luspo_jax.rewards import Sample
from luspo_jax.rewards.group import group_reward
from luspo_jax.rewards.record import run as judge
from luspo_jax.rewards.registry import verifier
from luspo_jax.run import length_controls
from luspo_jax.run.data_sections import SOURCE_FIELDS, wrong_filter
from luspo_jax.run.fields import wrong_fields
from luspo_jax.run.settings import Settings, sections_of
from luspo_jax.run.sft.sections import SftSettings
from luspo_jax.run.trackers.registry import not_installed

# Reward → the dataset whose items it scores.
_OWN_DATASET = dict.fromkeys(("reasoning_gym", "reasoning_gym_solved"), "reasoning_gym")


def check(config: ConfigDict) -> Settings:
    """Checks that a configuration can run, reporting all problems at once; returns its settings.

    Values are checked one by one, then together if each is valid. Reads neither model nor data.

    Raises:
      ConfigError: naming every unknown field, bad value and size that does not divide.
    """
    refuse(config, (wrong_fields, _wrong_entries, _wrong_together))
    return Settings.of(config)


def check_sft(config: ConfigDict) -> SftSettings:
    """Does the same for a configuration of supervised fine-tuning."""
    refuse(config, (functools.partial(wrong_fields, kind=SftSettings), _wrong_sft))
    return SftSettings(**sections_of(config, SftSettings)[0])


def refuse(config: ConfigDict, looks: Sequence[Callable[[ConfigDict], Iterable[str]]]) -> None:
    """Refuses a configuration in which a check finds problems.

    Args:
      config: to check.
      looks: the checks; each relies on what the earlier ones have found valid.

    Raises:
      ConfigError: with all problems that the first such check finds.
    """
    for look in looks:
        problems = list(look(config))
        if len(problems) == 1:
            raise ConfigError(f"this configuration cannot run: {problems[0]}")
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise ConfigError(f"this configuration cannot run:\n{lines}")


def _wrong_sft(config: ConfigDict) -> Iterator[str]:
    """Yields values of supervised fine-tuning that conflict, within or across sections."""
    built, problems = sections_of(config, SftSettings)
    yield from problems
    yield from _wrong_trackers(built)
    if not problems:
        try:
            SftSettings(**built)
        except ConfigError as error:
            yield from error.args


def _wrong_entries(config: ConfigDict) -> Iterator[str]:
    """Yields problems in the sections whose names the user chooses."""
    yield from _wrong_rewards(config)
    yield from length_controls.wrong_entries(config)
    yield from _wrong_scorers(config)
    yield from _wrong_datasets(config.data)
    for name, source in config.data.mixture.items():
        yield from _wrong_source(f"data.mixture.{name}", source)


def _wrong_rewards(config: ConfigDict) -> Iterator[str]:
    parts, options = config.reward.parts, config.reward.options
    if not parts:
        yield "reward.parts is empty: name a verifier and its weight, as {'boxed_math': 1.0}"
        return
    for name in options:
        if name not in parts:
            yield f"reward.options.{name}: no part of the reward; {nearest(name, parts)}"
    for name, weight in parts.items():
        problem = refusal(f"reward.parts.{name}", weight, float, length_controls.WEIGHT)
        if problem:
            yield problem
        problem = _wrong_part(name, options.get(name, {}), config.rollout.max_response_length)
        if problem:
            yield problem


def _wrong_scorers(config: ConfigDict) -> Iterator[str]:
    """Yields rewards that score the items of one dataset, where the problems are of another."""
    data, scorers = config.data, [name for name in config.reward.parts if name in _OWN_DATASET]
    if not scorers:
        return
    fields = {"data.name": data.name}
    if data.mixture:
        mixture = data.mixture.to_dict()
        named = {k: s.get("name") for k, s in mixture.items() if isinstance(s, Mapping)}
        fields = {f"data.mixture.{key}.name": name for key, name in named.items()}
    fields["data.eval_name"] = data.eval_name or data.name
    for scorer in scorers:
        owner = _OWN_DATASET[scorer]
        for field, name in fields.items():
            if name != owner:
                yield (
                    f"reward.parts.{scorer}: it scores the items of data.name={owner} alone, and "
                    f"{field}={name!r}"
                )


def _wrong_part(name, options, longest) -> str | None:
    """Returns why a verifier cannot be built, or cannot judge the longest response."""
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
    """Yields problems in the split and options of generated datasets."""
    held_out, options = data.eval_name or data.name, data.options.to_dict()
    own = data.eval_options.to_dict()
    if data.mixture or isinstance(DATASETS[data.name], Table):
        if options:
            yield f"data.options={shown(options)}: only a generated data.name has options"
    else:
        wrong = list(_wrong_generator("data.", data.name, data.split, options))
        wrong += _of_files("data.", data, data.name, ("subset", "filter", "limit", "streaming"))
        if wrong:
            yield from wrong
            return
    if not isinstance(DATASETS[held_out], Table):
        yield from _of_files("data.eval_", data, held_out, ("subset", "filter", "limit"))
    if isinstance(DATASETS[held_out], Table):
        if own:
            yield f"data.eval_options={shown(own)}: only a generated held-out set has options"
    elif own:
        yield from _wrong_generator("data.eval_", held_out, data.eval_split, own)
    else:
        own = options if held_out == data.name else {}
        yield from _wrong_split("data.eval_", held_out, data.eval_split, own)


def _of_files(prefix: str, data: ConfigDict, name: str, fields: Sequence[str]) -> list[str]:
    """Returns a line for each field that chooses rows of a file, where problems are generated."""
    return [
        f"{prefix}{field}={data[f'{prefix}{field}'.removeprefix('data.')]!r} chooses rows of "
        f"files, and {name} is generated"
        for field in fields
        if data[f"{prefix}{field}".removeprefix("data.")]
    ]


def _wrong_generator(
    prefix: str, name: str, split: str, options: Mapping[str, Any]
) -> Iterator[str]:
    wrong = list(_wrong_options(f"{prefix}options", name, options))
    yield from wrong or _wrong_split(prefix, name, split, options)


def _wrong_options(place: str, name: str, options: Mapping[str, Any]) -> Iterator[str]:
    parameters = dict(inspect.signature(DATASETS[name]).parameters)
    del parameters["split"]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return  # a task's own, which the dataset checks
    kinds = {n: p.annotation for n, p in parameters.items()}
    for option, value in options.items():
        field, kind = f"{place}.{option}", kinds.get(option)
        if kind is None:
            yield f"{field}: {name} has no such option; {nearest(option, kinds)}"
        elif kind in (bool, int, float, str):
            problem = refusal(field, value, kind)
            yield from [problem] if problem else []


def _wrong_split(prefix: str, name: str, split: str, options: Mapping[str, Any]) -> Iterator[str]:
    try:
        DATASETS[name](split=split, **options)
    except (DataError, TypeError, ValueError) as error:
        if str(error).startswith("options"):  # the dataset names the option
            yield f"{prefix}{error}"
        else:
            told = f", {prefix}options" if options else ""
            yield f"{prefix}split={split!r}{told}: {error}"


def _wrong_source(place: str, source: Any) -> Iterator[str]:
    """Yields problems in one source of a mixture."""
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
    if isinstance(source.get("filter"), str):
        yield from wrong_filter(f"{place}.filter", source["filter"])
    if source.get("streaming") and not source.get("limit"):
        yield f"{place}.streaming takes the first rows: set {place}.limit"
    if "name" not in source:
        yield f"{place}: it needs a name, one of luspo_jax.datasets.DATASETS"
    elif source["name"] == "reasoning_gym":
        yield (
            f"{place}.name=reasoning_gym: a source of a mixture has no options, which choose the "
            "task; mix its tasks by weight in data.options.tasks"
        )


def _wrong_together(config: ConfigDict) -> Iterator[str]:
    """Yields values that are valid by themselves but conflict, within or across sections."""
    sound, problems = sections_of(config)
    yield from problems
    yield from _wrong_metric(config)
    yield from _wrong_budgets(config)
    yield from _wrong_sizes(config)
    yield from _wrong_packing(config)
    yield from _wrong_age(config)
    if config.train.ref_every > 0 and not _of_objective(config, "kl_coef"):
        yield "train.ref_every refreshes the reference of a KL term, but objective.kl_coef is 0"
    if config.lora.rank and config.train.ref_every > 0 and config.train.ref_decay:
        yield (
            f"train.ref_decay={config.train.ref_decay:g} averages A and B of a low-rank adapter, "
            "whose product is no average of policies: set it to 0, which copies"
        )
    yield from _wrong_trackers(sound)
    if "objective" in sound:
        yield from _wrong_group(config, sound["objective"])
    keep, group_size = config.shaping.gfpo_keep, config.rollout.group_size
    if "shaping" in sound and keep > group_size:
        yield f"shaping.gfpo_keep={keep} exceeds rollout.group_size={group_size}"
    if "shaping" in sound:
        yield from length_controls.wrong_together(config)
    if "length" in sound:
        yield from _wrong_length(config, sound["length"])


def _wrong_trackers(built: Mapping[str, Any]) -> Iterator[str]:
    """Yields trackers that are not installed, if their names are valid."""
    if "output" in built:
        yield from not_installed(built["output"].trackers)


def _wrong_metric(config: ConfigDict) -> Iterator[str]:
    metric, parts = config.eval.metric, ", ".join(config.reward.parts)
    if not metric and len(config.reward.parts) > 1:
        yield f"eval.metric is empty: say which of reward.parts counts as accuracy ({parts})"
    if metric and metric not in config.reward.parts:
        yield f"eval.metric={metric!r} is not among reward.parts ({parts})"


def _wrong_budgets(config: ConfigDict) -> Iterator[str]:
    try:
        budgets(config.eval.budgets, config.rollout.max_response_length)
    except ValueError as error:
        yield f"eval.{error}"


def _wrong_group(config: ConfigDict, objective: objectives.Objective) -> Iterator[str]:
    try:
        objectives.validate_group_size(objective, config.rollout.group_size)
    except ValueError as error:
        text = str(error).replace("Objective.", "objective.")
        yield text if text.startswith(("objective.", "rollout.")) else f"objective.{text}"


def _wrong_length(config: ConfigDict, length: LengthSettings) -> Iterator[str]:
    """Yields conflicts of the length instruments and controls with other sections."""
    group_size, longest = config.rollout.group_size, config.rollout.max_response_length
    yield from itertools.islice(_wrong_candidates(config, length), 1)
    if length.every and group_size < 4:
        yield (
            f"length.every={length.every} measures length pressure inside halves of a group: "
            f"rollout.group_size={group_size} must be at least 4"
        )
    if length.mitigation == "penalty" and _of_objective(config, "advantage") == "gdpo":
        yield (
            "length.mitigation=penalty changes the sum of a reward's parts, and "
            "objective.advantage=gdpo normalises each part by itself: use mitigation=none"
        )
    if length.lambda_rate and _of_objective(config, "length_scale") != "lambda-grpo":
        yield (
            f"length.lambda_rate={length.lambda_rate:g} learns λ of "
            "objective.length_scale=lambda-grpo, which is not set"
        )
    steers = length.steer != "none" or length.mitigation == "scale"
    adaptive = _of_objective(config, "length_scale") == "adaptive"
    if steers and not adaptive:
        yield (
            'length.steer and mitigation="scale" move α of an adaptive scale: set '
            "objective.length_scale=adaptive"
        )
    start = _of_objective(config, "length_alpha")
    if adaptive and not length.alpha_low <= start <= length.alpha_high:
        yield (
            f"length.alpha_low={length.alpha_low:g} and alpha_high={length.alpha_high:g} must "
            f"enclose objective.length_alpha={start:g}, where α starts"
        )
    if length.steer == "band" and length.target_low > longest:
        yield (
            f"length.target_low={length.target_low:g} is out of reach: no response is longer than "
            f"rollout.max_response_length={longest}"
        )


def _wrong_candidates(config, length):
    """Yields what is wrong with the objectives whose pressure is measured."""
    segments = _of_objective(config, "ratio") == "segment"
    for name in length.names:
        try:
            chosen = candidate(name, max_response_length=config.rollout.max_response_length)
        except ValueError as error:
            yield f"length.objectives: {error}"
            continue
        if chosen.objective.ratio == "segment" and not segments:
            yield (
                f"length.objectives: {name!r} needs segments, which are cut only where "
                "objective.ratio=segment"
            )
        if not chosen.reward:
            continue
        try:
            options = config.reward.group_options.get(chosen.reward, {})
            made = group_reward(chosen.reward, options)
        except ValueError as error:
            yield (
                f"length.objectives: {name!r} needs reward.group_options.{chosen.reward}: {error}"
            )
            continue
        if made.targeted and not config.data.length_target_high:
            yield (
                f"length.objectives: {name!r} pays for the length that the prompt asks for: set "
                "data.length_target_low and data.length_target_high"
            )


def _of_objective(config, field):
    """Returns a field of the objective, which may be invalid: the configured or preset value."""
    value = config.objective[field]
    preset = objectives.PRESETS.get(config.objective.preset, objectives.Objective())
    return getattr(preset, field) if value is None else value


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


def _wrong_age(config: ConfigDict) -> Iterator[str]:
    """Yields responses that would be older than they may be."""
    apart, rollout = config.rollout_mesh.apart, config.rollout
    if not apart:
        return
    most = (rollout.max_age - 1) * rollout.prompts_per_step
    if rollout.max_age < 1:
        yield (
            f"rollout_mesh.apart={apart} samples for the next step, and rollout.max_age=0 allows "
            "no such responses: set it to 1 or more"
        )
    elif rollout.overlap > most and rollout.late == "wait":
        yield (
            f"rollout.overlap={rollout.overlap} with rollout_mesh.apart, which takes one of "
            f"rollout.max_age={rollout.max_age} steps, may be at most {most}: rollout.max_age − 1 "
            f"steps of rollout.prompts_per_step={rollout.prompts_per_step} prompts"
        )


def _wrong_packing(config: ConfigDict) -> Iterator[str]:
    train, prompt, response = (
        config.train, config.data.max_prompt_length, config.rollout.max_response_length
    )  # fmt: skip
    if not train.packing:
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
