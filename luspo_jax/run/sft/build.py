"""Builds the parts of a supervised run from its configuration: model, data, optimizer, sampler."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from luspo_jax import sharding
from luspo_jax.hosts.values import ConfigError
from luspo_jax.learner import optimizer
from luspo_jax.learner.demonstrations import nll_objective
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.learner.programs import LogprobPass, StepPrograms
from luspo_jax.learner.rows import Planner
from luspo_jax.learner.state import UpdateRule, policy_params
from luspo_jax.models import decoder_weights
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.rollout import Engine, Sampling
from luspo_jax.rollout.handover import rollout_params
from luspo_jax.run import adapters, forwards
from luspo_jax.run import build as rl
from luspo_jax.run.checks import check_sft
from luspo_jax.run.model import Model, load_model
from luspo_jax.run.sft.data import SftData, load_data
from luspo_jax.run.sft.sections import SftSettings
from luspo_jax.sharding import Layout, MeshError
from luspo_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class SftRun:
    """The parts of a supervised run that its steps do not change; `sampler` may be None."""

    config: ConfigDict
    settings: SftSettings
    model: Model
    data: SftData
    rule: UpdateRule
    planner: Planner
    programs: StepPrograms
    sampler: Engine | None
    rollout_layout: Layout | None = None

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of step `step` (from 0)."""
        train = self.settings.train
        return optimizer.scheduled_rate(
            step,
            peak=train.learning_rate,
            warmup_steps=train.warmup_steps,
            num_steps=self.settings.num_steps,
            schedule=train.schedule,
            final=train.final_rate,
        )

    @property
    def held_out_pass(self) -> LogprobPass:
        """The pass that measures held-out demonstrations."""
        return LogprobPass("params", self.rule.logprobs)

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
        """Returns the weights as the sampler reads them."""
        return rollout_params(
            params,
            config=self.model.config,
            layout=self.rollout_layout,
            dtype=self.settings.model.rollout_dtype,
        )


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> SftRun:
    """Builds everything but the weights.

    Args:
      config: the configuration.
      devices: to run on; by default those of all processes.

    Raises:
      ConfigError, DataError, FileNotFoundError, MeshError, ValueError: naming the field or file.
    """
    settings = check_sft(config)
    if rl.roles(settings, devices).split:
        raise MeshError(
            f"rollout_mesh.apart={settings.rollout_mesh.apart}: in supervised fine-tuning no "
            "process only samples; set it to 0"
        )
    model = load_model(settings)
    _check_model(settings, model.config)
    train, rollout = rl.fitting_layouts(
        settings,
        model.config,
        {"rows of a micro-batch": ("batch", settings.rows_per_microbatch)},
        devices,
        advice=lambda layout: _advice(settings),
    )
    data = load_data(settings, model)
    rule = update_rule(settings, model, train)
    return SftRun(
        config=config,
        settings=settings,
        model=model,
        data=data,
        rule=rule,
        planner=planner(settings, model.config, train),
        programs=StepPrograms(rule),
        sampler=_sampler(settings, model, data, rollout),
        rollout_layout=rollout,
    )


def _check_model(settings, model):
    if settings.data.max_length > model.max_position:
        raise ConfigError(
            f"data.max_length={settings.data.max_length}: the model of {settings.model.path} holds "
            f"{model.max_position} tokens (max_position_embeddings): lower it"
        )
    if settings.train.router_aux_coef and not model.num_experts:
        raise ConfigError(
            f"train.router_aux_coef={settings.train.router_aux_coef} is of a mixture of experts, "
            f"and the model of {settings.model.path} has none: leave it at its default"
        )


def _advice(settings):
    rows = "train.microbatch_tokens" if settings.train.packing else "train.num_microbatches"
    return f"change config.{rows}, config.mesh or config.rollout_mesh"


def planner(settings: SftSettings, model: DecoderConfig, layout: Layout | None) -> Planner:
    """Returns the planner, which lays demonstrations into training rows."""
    train = settings.train
    return Planner(
        model=model,
        longest=settings.data.max_length,
        num_buckets=train.num_length_buckets,
        rows_per_microbatch=settings.rows_per_microbatch,
        pack_length=settings.row_length if train.packing else 0,
        pictured_at_once=train.batch_size,
        layout=layout,
    )


def update_rule(settings: SftSettings, model: Model, layout: Layout | None = None) -> UpdateRule:
    """Returns the rule of an optimizer step; a vision tower, which sees nothing, stays as it is."""
    train, sees = settings.train, model.config.vision is not None
    how = forwards.training(settings, model.config, layout)
    return UpdateRule(
        logprobs=LogprobRule(
            how,
            head_chunk_tokens=settings.model.head_chunk_tokens,
            freeze_vision=sees,
        ),
        objective=nll_objective(train.aggregation),
        optimizer=optimizer.adamw(
            b1=train.b1, b2=train.b2, eps=train.eps, weight_decay=train.weight_decay
        ),
        max_grad_norm=train.max_grad_norm,
        router_aux_coef=train.router_aux_coef,
        frozen=("vision",) if sees and how.adapter is None else (),
    )


def _sampler(settings, model, data, layout) -> Engine | None:
    """Returns the sampler of answers to held-out prompts; None if there is nothing to answer."""
    if not data.asked:
        return None
    asked, longest = settings.eval, max(len(d.prompt.tokens) for d in data.asked)
    room = model.config.max_position - longest
    if asked.max_response_length > room:
        raise ConfigError(
            f"eval.max_response_length={asked.max_response_length}: the longest held-out prompt "
            f"has {longest} tokens, and the model of {settings.model.path} holds "
            f"{model.config.max_position} (max_position_embeddings): at most {room} are left"
        )
    return Engine(
        forwards.sampling(settings, model.config, sharding.on_own_devices(layout)),
        Sampling(
            max_response_length=asked.max_response_length,
            stop_token_ids=model.stop_token_ids,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
        ),
        num_slots=asked.num_slots,
        max_prompt_length=longest,
        chunk_length=min(asked.chunk_length, asked.max_response_length),
    )


def facts(run: SftRun) -> dict[str, Any]:
    """Returns what a run's numbers depend on besides its configuration; fixed for a workdir."""
    return {
        "template_hash": run.data.template_hash,
        "datasets": [report.facts() for report in run.data.reports],
        "demonstrations": run.data.stream.get_state()["examples_hash"],
        "parameters": decoder_weights.num_params(run.model.config),
        **adapters.facts(run.settings, run.model, run.rule.logprobs.how.adapter),
    }
