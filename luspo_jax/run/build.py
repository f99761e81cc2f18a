"""Builds the parts of a run from its configuration: model, data, sampler, rewards, optimizer."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from luspo_jax import sharding
from luspo_jax.benchmarks.budgets import budgets
from luspo_jax.experience import held_out
from luspo_jax.experience.held_out import Evaluation
from luspo_jax.experience.rounds import Asker
from luspo_jax.experience.shaping import Shaping
from luspo_jax.hosts.roles import Roles
from luspo_jax.hosts.values import ConfigError
from luspo_jax.learner import optimizer
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.learner.programs import StepPrograms
from luspo_jax.learner.rows import Planner
from luspo_jax.learner.state import UpdateRule, policy_params
from luspo_jax.length import laboratory
from luspo_jax.length.candidates import Rescorer
from luspo_jax.length.laboratory import Laboratory
from luspo_jax.length.settings import LengthSettings
from luspo_jax.models import decoder, decoder_weights
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.rewards import Scorer
from luspo_jax.rewards.group import GroupScorer
from luspo_jax.rollout import Cache, Engine, Sampling
from luspo_jax.rollout.handover import apart_params, rollout_params
from luspo_jax.rollout.sending import sent_params
from luspo_jax.run import adapters, checks, forwards
from luspo_jax.run.arithmetic import batch_arithmetic
from luspo_jax.run.data import Data, load_data
from luspo_jax.run.memory import device_memory, room_for_pages
from luspo_jax.run.model import Model, load_model
from luspo_jax.run.settings import Config, Settings, section
from luspo_jax.sharding import Layout, MeshError
from luspo_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that its steps do not change."""

    config: ConfigDict
    settings: Settings
    model: Model
    data: Data
    scorer: Scorer
    group_scorer: GroupScorer
    sampler: Engine
    held_out_sampler: Engine
    rule: UpdateRule
    shaping: Shaping
    length: LengthSettings
    laboratory: Laboratory
    planner: Planner
    programs: StepPrograms
    rollout_layout: Layout | None = None
    roles: Roles = Roles()  # noqa: RUF009  (frozen)

    @property
    def asker(self) -> Asker:
        """The Asker, which samples and rewards the responses of a step."""
        rollout = self.settings.rollout
        return Asker(
            stream=self.data.stream,
            sampler=self.sampler,
            scorer=self.scorer,
            decode=self.model.decode,
            num_prompts=rollout.prompts_per_step,
            group_size=rollout.group_size,
            seed=self.settings.seed,
            shaping=self.shaping,
            metric=self.metric,
            overlap=rollout.overlap,
            # What is sampled beside a step is one step old when it is trained on.
            max_age=rollout.max_age - self.apart,
            late=rollout.late,
            order=rollout.order,
            compare=self.group_scorer,
            length=self.length,
            roles=self.roles,
        )

    @property
    def apart(self) -> bool:
        """Whether other devices sample the next step's responses beside this step."""
        return self.settings.rollout_mesh.apart > 0

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of rollout step `step` (from 0)."""
        train = self.settings.train
        return optimizer.learning_rate(
            step, peak=train.learning_rate, warmup_steps=train.warmup_steps
        )

    def evaluate(self, params: Any) -> Evaluation:
        """Measures accuracy and length on the held-out problems, with the same noise every time."""
        weights = self.rollout_params(params)

        def measured():
            settings, decode = self.settings.eval, self.model.decode
            groups = held_out.ask(
                self.held_out_sampler,
                weights,
                self.data.held_out,
                self.scorer,
                decode=decode,
                num_samples=settings.num_samples,
                seed=settings.seed,
            )
            longest = self.settings.rollout.max_response_length
            under = held_out.under_budgets(
                groups,
                budgets(settings.budgets, longest),
                self.scorer,
                decode=decode,
                max_length=longest,
                metric=self.metric,
            )
            found = held_out.summarize(groups, metric=self.metric)
            return dataclasses.replace(found, under_budgets=under)

        return self.roles.sampled(measured, "evaluation")

    @property
    def metric(self) -> str:
        """The reward part that counts as accuracy."""
        return accuracy_part(self.settings)

    def initial_params(self) -> Any:
        """Returns the weights that training begins with, random ones if so configured."""
        return self.initial_parts()[0]

    def initial_parts(self) -> tuple[Any, Any]:
        """Returns (what is trained, the frozen weights of an adapter): `adapters.beginning`."""
        return adapters.beginning(self.settings, self.model, self.rule.logprobs.how)

    def policy(self, state: TrainState) -> Any:
        """Returns the policy's weights, an adapter in its place."""
        return policy_params(state, self.rule.logprobs.how)

    def rollout_params(self, params: Any) -> Any:
        """Returns the policy's weights as the sampler reads them, in the processes that sample.

        All processes must call, those that only sample with anything.
        """
        if self.settings.rollout.lora == "apart":
            return apart_params(params, how=self.rule.logprobs.how, layout=self.rollout_layout)
        how = {
            "config": self.model.config,
            "layout": self.rollout_layout,
            "dtype": self.settings.model.rollout_dtype,
        }
        if self.roles.split:
            return sent_params(params, self.roles, **how)
        return rollout_params(params, **how)


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Run:
    """Builds everything but the weights.

    Args:
      config: the configuration.
      devices: to run on; by default those of all processes.

    Raises:
      ConfigError, DataError, FileNotFoundError, MeshError, ValueError: naming the field or file.
    """
    settings = checks.check(config)
    model = load_model(settings)
    _check_model(settings, model.config)
    layout, rollout_layout = layouts(settings, model.config, devices)
    rule = update_rule(settings, model, layout)
    adapters.check_rollout(settings, rule.logprobs.how.adapter, roles(settings, devices))
    return Run(
        config=config,
        settings=settings,
        model=model,
        data=load_data(settings, model),
        scorer=Scorer(
            settings.reward.parts,
            options=settings.reward.options,
            workers=settings.reward.num_workers,
            time_limit=settings.reward.timeout_s,
            max_failure_rate=settings.reward.max_failure_rate,
        ),
        group_scorer=group_scorer(settings),
        sampler=sampler(settings, model, settings.rollout, (layout, rollout_layout)),
        held_out_sampler=sampler(settings, model, settings.eval, (layout, rollout_layout)),
        rule=rule,
        shaping=settings.shaping,
        length=settings.length,
        laboratory=laboratory.laboratory(
            settings.length,
            # Length pressure differentiates the backward pass, which kernels do not support.
            dataclasses.replace(rule.logprobs, how=rule.logprobs.how.with_reference_kernels()),
            settings.objective,
            max_response_length=settings.rollout.max_response_length,
            rows_at_once=batch_arithmetic(settings).responses_per_microbatch,
            rescorer=functools.partial(rescorer, settings),
        ),
        planner=planner(settings, model.config, layout),
        programs=StepPrograms(rule, settings.train.num_minibatches, settings.train.num_epochs),
        rollout_layout=rollout_layout,
        roles=roles(settings, devices),
    )


def group_scorer(settings: Config) -> GroupScorer:
    """Returns the run's rewards of a group."""
    reward = settings.reward
    return GroupScorer(reward.group, reward.group_options, metric=accuracy_part(settings))


def rescorer(settings: Config, names: Sequence[str]) -> Rescorer:
    """Returns what rewards halves of groups, by the run's rewards or by others of a group."""
    return Rescorer(
        settings.reward.parts,
        group_scorer(settings),
        names=names,
        options=settings.reward.group_options,
        metric=accuracy_part(settings),
        max_length=settings.rollout.max_response_length,
    )


def accuracy_part(settings: Config) -> str:
    """Returns the reward part that counts as accuracy."""
    return settings.eval.metric or next(iter(settings.reward.parts))  # the only one


def planner(config: Config, model: DecoderConfig, layout: Layout | None) -> Planner:
    """Returns the planner, which lays responses into training rows."""
    sizes = batch_arithmetic(config)
    return Planner(
        model=model,
        longest=sizes.tokens_per_row,
        num_buckets=config.train.num_length_buckets,
        rows_per_microbatch=sizes.rows_per_microbatch,
        pack_length=sizes.pack_length,
        share_prompts=forwards.shares_prompts(config, model, layout),
        gathers=forwards.gathers(config, model, layout),
        pictured_at_once=sizes.responses_per_minibatch,
        layout=layout,
    )


def _check_model(config, model):
    """Refuses a configuration that asks for something that the model lacks."""
    prompt, response = config.data.max_prompt_length, config.rollout.max_response_length
    if prompt + response > model.max_position:
        raise ConfigError(
            f"rollout.max_response_length={response} and data.max_prompt_length={prompt} make "
            f"{prompt + response} tokens, and the model of {config.model.path} holds "
            f"{model.max_position} (max_position_embeddings): lower one of them"
        )
    for field in ("router_replay", "router_aux_coef"):
        value = getattr(config.train, field)
        if not model.num_experts and value not in ("none", 0):
            raise ConfigError(
                f"train.{field}={value} is of a mixture of experts, and the model of "
                f"{config.model.path} has none: leave it at its default"
            )


def layouts(
    config: Config, model: DecoderConfig, devices: Sequence[jax.Device] | None = None
) -> tuple[Layout | None, Layout | None]:
    """Returns the mesh layouts of training and of rollout over `devices`.

    Raises:
      MeshError: naming every size that does not fit the devices or the model.
    """
    arithmetic = batch_arithmetic(config)
    rows = {arithmetic.row_unit: ("batch", arithmetic.rows_per_microbatch)}
    return fitting_layouts(
        config, model, rows, devices, advice=lambda train: mesh_advice(config, train)
    )


def fitting_layouts(
    config: Config,
    model: DecoderConfig,
    rows: Mapping[str, tuple[str, int]],
    devices: Sequence[jax.Device] | None,
    *,
    advice: Callable[[Layout | None], str],
) -> tuple[Layout | None, Layout | None]:
    """Returns the layouts of `config.mesh` and `config.rollout_mesh`, if they fit.

    Args:
      config: of any kind of run.
      model: its architecture.
      rows: what a micro-batch's rows are called → (axis, number).
      devices: to run on; None for those of all processes.
      advice: layout of training → what to change if something does not fit.

    Raises:
      MeshError: naming every size that does not fit the devices or the model.
    """
    for_training, for_rollout = _devices(section(config, "rollout_mesh").apart, devices)
    train = sharding.layout("train", section(config, "mesh").sizes, for_training)
    rollout = sharding.layout("rollout", section(config, "rollout_mesh").sizes, for_rollout)
    sizes = decoder.cut_sizes(model)
    problems = [
        *sharding.misfits(train, sizes | rows),
        *sharding.misfits(rollout, sizes),
    ]
    if problems:
        raise MeshError(
            "the mesh does not fit:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + f"\n{advice(train)}"
        )
    return train, rollout


def _devices(apart, devices):
    """Returns the devices that train and those that sample: all, or the last `apart` for sampling.

    Raises:
      MeshError: there are too few, or a process would have some of both.
    """
    if not apart:
        return devices, devices
    devices = sharding.available_devices() if devices is None else list(devices)
    devices.sort(key=lambda device: device.process_index)
    if apart >= len(devices):
        raise MeshError(
            f"rollout_mesh.apart={apart} leaves no device to train on: there are {len(devices)}"
        )
    counts = collections.Counter(device.process_index for device in devices)
    if len(counts) > 1 and {d.process_index for d in devices[:-apart]} & {
        d.process_index for d in devices[-apart:]
    }:
        each = min(counts.values())
        raise MeshError(
            f"rollout_mesh.apart={apart}: of several processes, whole ones sample apart, so it "
            f"must be a multiple of {each}, the devices of each, and at most "
            f"{len(devices) - each}, as one must train"
        )
    return devices[:-apart], devices[-apart:]


def roles(config: Config, devices: Sequence[jax.Device] | None = None) -> Roles:
    """Returns which processes train and which sample, of a run on `devices` (None: all).

    Raises:
      MeshError: a process would have devices of both roles.
    """
    devices = sharding.available_devices() if devices is None else devices
    parts = _devices(section(config, "rollout_mesh").apart, devices)
    return Roles(*(tuple(sorted({d.process_index for d in part})) for part in parts))


def mesh_advice(config: Config, train: Layout | None) -> str:
    """Says what to change if a mesh does not fit: for rows, the flag that makes them fit."""
    rows = batch_arithmetic(config).advice(train.size("batch") if train else 1)
    return f"{rows}change config.mesh or config.rollout_mesh"


def update_rule(config: Config, model: Model, layout: Layout | None = None) -> UpdateRule:
    """Returns the rule of an optimizer step, which includes the mesh layout of the train state."""
    logprobs = _logprob_rule(config, model.config, layout)
    how = logprobs.how
    return UpdateRule(
        logprobs=logprobs,
        objective=section(config, "objective"),
        optimizer=optimizer.adamw(
            b1=config.train.b1,
            b2=config.train.b2,
            eps=config.train.eps,
            weight_decay=config.train.weight_decay,
        ),
        max_grad_norm=config.train.max_grad_norm,
        bin_edges=section(config, "length").bins(config.rollout.max_response_length),
        router_aux_coef=config.train.router_aux_coef,
        frozen=("vision",) if _freezes(config, model.config) and not how.adapter else (),
        copies_reference=adapters.copies_reference(config),
    )


def _logprob_rule(config, model, layout):
    return LogprobRule(
        how=forwards.training(config, model, layout),
        temperature=config.rollout.temperature,
        head_chunk_tokens=config.model.head_chunk_tokens,
        replay=config.train.router_replay,
        freeze_vision=_freezes(config, model),
    )


def _freezes(config, model):
    return model.vision is not None and config.train.freeze_vision


def sampler(
    config: Config,
    model: Model,
    asked: Any,
    layouts: tuple[Layout | None, Layout | None],
    memory: float | None = None,
) -> Engine:
    """Returns the sampler for `asked`: config.rollout (which records expert ids) or config.eval.

    Args:
      config: of the run.
      model: its Model.
      asked: the section.
      layouts: of training and of the rollout.
      memory: bytes of a device; by default those of the device at hand.

    Raises:
      ConfigError: pages that are too few for one response, or that the platform's kernel refuses.
    """
    try:
        engine = _sampler(config, model, asked, layouts[1])
    except ValueError as error:
        if str(error).startswith(("cache_gb", "page_size", "cache_dtype")):
            raise ConfigError(f"rollout.{error}") from None
        raise
    if not config.rollout.cache_gb:
        memory = device_memory(engine.device) if memory is None else memory
        engine.take_room(room_for_pages(config, model.config, layouts, memory))
    return engine


def _sampler(config, model, asked, layout):
    chosen = config.rollout
    return Engine(
        forwards.sampling(config, model.config, sharding.on_own_devices(layout)),
        Sampling(
            max_response_length=config.rollout.max_response_length,
            stop_token_ids=model.stop_token_ids,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
        ),
        num_slots=asked.num_slots,
        # No response takes more steps than the length limit.
        chunk_length=min(chosen.chunk_length, chosen.max_response_length),
        max_prompt_length=config.data.max_prompt_length,
        record_experts=asked is config.rollout and model.config.num_experts > 0,
        cache=Cache(chosen.cache_gb or None, chosen.page_size, chosen.cache_dtype),
    )


def facts(run: Run) -> dict[str, Any]:
    """Returns what a run's numbers depend on besides its configuration; fixed for a workdir."""
    return {
        "template_hash": run.data.template_hash,
        "scorers": {**run.scorer.labels, **run.group_scorer.labels},
        "datasets": [report.facts() for report in (*run.data.reports, run.data.held_out_report)],
        "parameters": decoder_weights.num_params(run.model.config),
        **adapters.facts(run.settings, run.model, run.rule.logprobs.how.adapter),
    }
