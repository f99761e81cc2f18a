"""What a configuration resolves to: model, data, sampler, rewards, and a workdir of its own."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from luspo_jax import config as configuration
from luspo_jax import sharding, sources
from luspo_jax.experience.rounds import Asker
from luspo_jax.experience.shaping import Shaping
from luspo_jax.learner import optimizer
from luspo_jax.learner.logprobs import Scoring
from luspo_jax.learner.programs import StepPrograms
from luspo_jax.learner.rows import Planner
from luspo_jax.learner.state import UpdateRule
from luspo_jax.length import laboratory
from luspo_jax.length.laboratory import Laboratory
from luspo_jax.length.settings import LengthSettings
from luspo_jax.models import decoder, decoder_weights
from luspo_jax.models.decoder_config import DecoderConfig, decoder_config, read_config
from luspo_jax.models.locate import model_folder
from luspo_jax.ops import attention as attention_op
from luspo_jax.ops import grouped_matmul
from luspo_jax.rewards import Scorer
from luspo_jax.rollout import Engine, Sampling
from luspo_jax.rollout.handover import rollout_params
from luspo_jax.sharding import Layout, MeshError
from luspo_jax.sources import Model


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything of a run that its steps do not change."""

    config: ConfigDict
    model: Model
    data: sources.Data
    scorer: Scorer
    sampler: Engine
    held_out_sampler: Engine
    rule: UpdateRule
    shaping: Shaping
    length: LengthSettings
    laboratory: Laboratory
    planner: Planner
    programs: StepPrograms
    rollout_layout: Layout | None = None

    @property
    def asker(self) -> Asker:
        """What samples and judges the responses of a step."""
        rollout = self.config.rollout
        return Asker(
            stream=self.data.stream,
            sampler=self.sampler,
            scorer=self.scorer,
            decode=self.model.decode,
            num_prompts=rollout.prompts_per_step,
            group_size=rollout.group_size,
            seed=self.config.seed,
        )

    @property
    def metric(self) -> str:
        """The part of the reward that counts as being right."""
        return self.config.eval.metric or next(iter(self.config.reward.parts))  # the only one

    def initial_params(self) -> Any:
        """The base policy's weights, or random ones where the configuration says so."""
        model, layout = self.config.model, self.rule.scoring.layout
        if model.random_weights:
            key = jax.random.key(self.config.seed)
            return decoder.init_params(key, self.model.config, layout=layout)
        return decoder_weights.load_params(
            self.model.folder, self.model.config, dtype=jnp.float32, layout=layout
        )

    def rollout_params(self, params: Any) -> Any:
        """Weights of the policy as the sampler reads them."""
        return rollout_params(
            params,
            config=self.model.config,
            layout=self.rollout_layout,
            dtype=self.config.model.rollout_dtype,
        )


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Run:
    """Resolves a configuration, all but the weights.

    Args:
      config: the configuration.
      devices: to run on; all of all processes unless given.

    Raises:
      ConfigError, DataError, FileNotFoundError, MeshError, ValueError: naming the field or file.
    """
    objective = configuration.check(config)
    model, length = load_model(config), configuration.build_length(config)
    _check_model(config, model.config)
    layout, rollout_layout = layouts(config, model.config, devices)
    longest, rule = config.rollout.max_response_length, update_rule(config, model, layout)
    return Run(
        config=config,
        model=model,
        data=sources.load_data(config, model),
        scorer=Scorer(
            config.reward.parts.to_dict(),
            options=config.reward.options.to_dict(),
            workers=config.reward.num_workers,
            time_limit=config.reward.timeout_s,
            max_failure_rate=config.reward.max_failure_rate,
        ),
        sampler=sampler(config, model, config.rollout, rollout_layout),
        held_out_sampler=sampler(config, model, config.eval, rollout_layout),
        rule=rule,
        shaping=configuration.build_shaping(config),
        length=length,
        laboratory=laboratory.laboratory(
            length,
            # Length pressure differentiates the backward pass, which kernels do not allow.
            dataclasses.replace(
                rule.scoring,
                attention="reference",
                experts="reference",
                vision_attention="reference",
            ),
            objective,
            max_response_length=longest,
            rows_at_once=configuration.batch_arithmetic(config).responses_per_microbatch,
        ),
        planner=planner(config, model.config, layout),
        programs=StepPrograms(rule, configuration.batch_arithmetic(config).updates_per_step),
        rollout_layout=rollout_layout,
    )


def planner(config: ConfigDict, model: DecoderConfig, layout: Layout | None) -> Planner:
    """How responses are laid into the rows that training reads."""
    sizes = configuration.batch_arithmetic(config)
    return Planner(
        model=model,
        longest=sizes.tokens_per_row,
        num_buckets=config.train.num_length_buckets,
        rows_per_microbatch=sizes.rows_per_microbatch,
        pack_length=sizes.pack_length,
        pictured_at_once=sizes.responses_per_minibatch,
        layout=layout,
    )


def _check_model(config, model):
    """Refuses what the configuration asks of a model that it cannot give."""
    prompt, response = config.data.max_prompt_length, config.rollout.max_response_length
    if prompt + response > model.max_position:
        raise configuration.ConfigError(
            f"rollout.max_response_length={response} and data.max_prompt_length={prompt} make "
            f"{prompt + response} tokens, and the model of {config.model.path} holds "
            f"{model.max_position} (max_position_embeddings): lower one of them"
        )
    for field in ("router_replay", "router_aux_coef"):
        value = config.train[field]
        if not model.num_experts and value not in ("none", 0):
            raise configuration.ConfigError(
                f"train.{field}={value} is of a mixture of experts, and the model of "
                f"{config.model.path} has none: leave it at its default"
            )


def layouts(
    config: ConfigDict, model: DecoderConfig, devices: Sequence[jax.Device] | None = None
) -> tuple[Layout | None, Layout | None]:
    """Where training and rollout lay out their arrays over `devices`.

    Raises:
      MeshError: naming every number that does not fit the devices or the model.
    """
    train = sharding.layout("train", config.mesh, devices)
    rollout = sharding.layout("rollout", config.rollout_mesh, devices)
    arithmetic = configuration.batch_arithmetic(config)
    rows = {
        "responses of a micro-batch (train.num_microbatches)": (
            "batch",
            arithmetic.responses_per_microbatch,
        )
    }
    if config.train.packing:
        rows = {
            "packed rows of a micro-batch (train.microbatch_tokens)": (
                "batch",
                arithmetic.packed_rows_per_microbatch,
            )
        }
    sizes = decoder.cut_sizes(model)
    problems = [
        *sharding.misfits(train, sizes | rows),
        *sharding.misfits(rollout, sizes),
    ]
    if problems:
        raise MeshError(
            "the mesh does not fit:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + f"\n{mesh_advice(config, train)}"
        )
    return train, rollout


def mesh_advice(config: ConfigDict, train: Layout | None) -> str:
    """What to change where a mesh does not fit: of rows, the flag that makes them fit."""
    arithmetic, parts = configuration.batch_arithmetic(config), train.size("batch") if train else 1
    rows = arithmetic.packed_rows_per_microbatch
    if config.train.packing and rows % parts:
        tokens = -(-rows // parts) * parts * arithmetic.pack_length
        return (
            f"set --config.train.microbatch_tokens={tokens}, or change config.mesh or "
            "config.rollout_mesh"
        )
    return "change config.mesh or config.rollout_mesh"


def update_rule(config: ConfigDict, model: Model, layout: Layout | None = None) -> UpdateRule:
    """What an optimizer step does, and with it the layout of the train state."""
    return UpdateRule(
        scoring=_scoring(config, model, layout),
        objective=configuration.build_objective(config),
        optimizer=optimizer.adamw(
            b1=config.train.b1,
            b2=config.train.b2,
            eps=config.train.eps,
            weight_decay=config.train.weight_decay,
        ),
        max_grad_norm=config.train.max_grad_norm,
        bin_edges=configuration.build_length(config).bins(config.rollout.max_response_length),
        router_aux_coef=config.train.router_aux_coef,
        frozen=("vision",) if _freezes(config, model.config) else (),
    )


def load_model(config: ConfigDict) -> Model:
    """Architecture and tokenizer of `config.model`."""
    from transformers import AutoTokenizer  # Slow to import; nothing else here needs it.

    folder = model_folder(config.model.path)
    if config.model.random_weights:
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: model.path must hold a config.json")
        hf = json.loads(path.read_text()) | config.model.overrides.to_dict()
        architecture = decoder_config(hf)
    else:
        architecture = read_config(folder)
    source = model_folder(config.model.tokenizer) if config.model.tokenizer else folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises many types for a missing or broken file
        raise FileNotFoundError(
            f"no tokenizer could be read from {source} ({str(error).splitlines()[0][:200]}): put "
            "tokenizer files there, or name another folder in model.tokenizer"
        ) from error
    model = _with_stops(config, Model(folder, architecture, tokenizer))
    if len(tokenizer) > architecture.vocab_size:
        raise configuration.ConfigError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and the model of {folder} a "
            f"vocabulary of {architecture.vocab_size}: they do not belong together"
        )
    return model


def _with_stops(config, model):
    """The model with the tokens of `model.stop_token_ids` among those that end a response."""
    own, size = configuration.stop_token_ids(config), model.config.vocab_size
    if any(token >= size for token in own):
        raise configuration.ConfigError(
            f"model.stop_token_ids={config.model.stop_token_ids!r} must be tokens of the model's "
            f"vocabulary of {size}"
        )
    ids = tuple(sorted({*model.config.eos_token_ids, *own}))
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=ids))
    if not model.stop_token_ids and config.model.stop_token_ids != "none":
        raise configuration.ConfigError(
            f"no token ends a response: neither config.json nor generation_config.json of "
            f"{model.folder} nor its tokenizer names an eos token, and every response would be cut "
            "at its limit: add eos_token_id to generation_config.json, or set model.stop_token_ids "
            '("none" where that is meant)'
        )
    return model


def _scoring(config, model, layout):
    return Scoring(
        model=model.config,
        temperature=config.rollout.temperature,
        dtype=config.model.dtype,
        remat=config.model.remat,
        attention=_attention(config, model.config, layout),
        head_chunk_tokens=config.model.head_chunk_tokens,
        layout=layout,
        experts=expert_products(layout, config.model.experts),
        replay=config.train.router_replay,
        freeze_vision=_freezes(config, model.config),
        vision_attention=vision_attention(
            model.config, layout, config.model.dtype, config.model.attention
        ),
    )


def _freezes(config, model):
    return model.vision is not None and config.train.freeze_vision


def sampler(config: ConfigDict, model: Model, section: ConfigDict, layout: Layout | None) -> Engine:
    """What samples as `section` says: config.rollout (experts are recorded), or config.eval."""
    return Engine(
        model.config,
        Sampling(
            max_response_length=config.rollout.max_response_length,
            stop_token_ids=model.stop_token_ids,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
        ),
        num_slots=section.num_slots,
        # No response takes more steps than its limit.
        chunk_length=min(config.rollout.chunk_length, config.rollout.max_response_length),
        max_prompt_length=config.data.max_prompt_length,
        dtype=jnp.dtype(config.model.rollout_dtype),
        layout=sharding.on_own_devices(layout),
        attention=prefill_attention(
            model.config, layout, config.model.rollout_dtype, config.model.attention
        ),
        experts=expert_products(layout, config.model.experts),
        record_experts=section is config.rollout and model.config.num_experts > 0,
        vision_attention=vision_attention(
            model.config, layout, config.model.rollout_dtype, config.model.attention
        ),
    )


def _attention(config, model, layout):
    """The name of the trainer's attention on this platform."""
    return _resolved(
        config.model.attention,
        layout,
        packed=config.train.packing,
        head_dim=model.head_dim,
        dtype=config.model.dtype,
        context=layout.size("length") if layout else 1,
    )


def prefill_attention(
    model: DecoderConfig, layout: Layout | None, dtype: str, name: str = "auto"
) -> str:
    """The name of the sampler's attention over prompts, which lie one in a row."""
    return _resolved(name, layout, packed=False, head_dim=model.head_dim, dtype=dtype)


def vision_attention(
    model: DecoderConfig, layout: Layout | None, dtype: str, name: str = "auto"
) -> str:
    """The name of the vision tower's attention over an image; its heads have a size of their own.

    Patches are not one run in their slots, as a packed row's tokens are not: what reads segment ids
    is needed. "reference" is kept, of any other name what fits the platform is taken.
    """
    if model.vision is None or name == "reference":
        return "reference"
    return _resolved("auto", layout, packed=True, head_dim=model.vision.head_dim, dtype=dtype)


def expert_products(layout: Layout | None, name: str = "auto") -> str:
    """The name of the grouped product of experts on this platform."""
    try:
        return grouped_matmul.resolve(name, platform=_platform(layout))
    except ValueError as error:
        raise configuration.ConfigError(f"model.experts: {error}") from None


def _platform(layout):
    return (layout.mesh.devices.flat[0] if layout else sharding.available_devices()[0]).platform


def _resolved(name, layout, **needs):
    try:
        return attention_op.resolve(name, platform=_platform(layout), **needs)
    except ValueError as error:
        raise configuration.ConfigError(f"model.attention: {error}") from None


def memory_estimate(
    config: ConfigDict, model: DecoderConfig, layouts: tuple[Layout | None, Layout | None]
) -> dict[str, int]:
    """Bytes of the large arrays of a step on one device, by name.

    Activations are those of one micro-batch at its longest: per token and layer about
    16·D + 3·F + 4·N·H values without remat, D with it; of experts, which always compute theirs
    again, 6·D + 7·F for each of a token's K, of one layer. An estimate, not a promise.
    """
    sizes = configuration.batch_arithmetic(config)
    compute, sampling = (
        jnp.dtype(config.model[name]).itemsize for name in ("dtype", "rollout_dtype")
    )
    train, rollout = layouts
    params = param_bytes(model, train, jnp.float32)
    tokens = sizes.responses_per_microbatch * sizes.tokens_per_row
    if config.train.packing:
        tokens = sizes.packed_rows_per_microbatch * sizes.pack_length
    tokens //= _parts(train, "batch", "length")
    slots = config.rollout.num_slots * sizes.tokens_per_row
    slots //= _parts(sharding.on_own_devices(rollout), "batch", "cache_length")
    mlp_dim = model.mlp_dim if model.num_expert_layers < model.num_layers else 0
    inside = 16 * model.embed_dim + 3 * mlp_dim + 4 * model.num_heads * model.head_dim
    kept = (
        model.embed_dim * model.num_layers + inside
        if config.model.remat != "none"
        else (inside * model.num_layers)
    )
    kept += model.experts_per_token * (6 * model.embed_dim + 7 * model.expert_dim)
    cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    cached //= _parts(rollout, "kv_heads")
    return {
        "master weights (float32)": params,
        "Adam moments (float32)": 2 * params,
        "gradients (float32)": params,
        "reference policy": params if configuration.build_objective(config).kl_coef else 0,
        "policy before a measured update": params if config.length.every else 0,
        "rollout weights": param_bytes(model, rollout, config.model.rollout_dtype)
        if sampling != 4 or rollout
        else 0,
        "rollout KV cache": sampling * slots * cached,
        "activations of a micro-batch": compute * tokens * kept,
        "head logits": 8
        * config.model.head_chunk_tokens
        * model.vocab_size
        // _parts(train, "vocab"),
    }


@functools.cache  # traces the model
def param_bytes(model: DecoderConfig, layout: Layout | None, dtype: Any) -> int:
    """Bytes of one device's part of the parameters in `dtype`, routers in float32 at least.

    What is cut over which axes differs by parameter: experts over the expert axis, norms over none.
    """
    params = decoder.abstract_params(model, jnp.dtype(dtype))
    axes = jax.tree.leaves(decoder.param_axes(model), is_leaf=lambda node: isinstance(node, tuple))
    return sum(
        math.prod(layout.sharding(names).shard_shape(x.shape) if layout else x.shape)
        * x.dtype.itemsize
        for x, names in zip(jax.tree.leaves(params), axes, strict=True)
    )


def _parts(layout, *axes):
    return math.prod(layout.size(axis) for axis in axes) if layout else 1


def facts(run: Run) -> dict[str, Any]:
    """What a run's numbers depend on beside its configuration; a workdir keeps to one set."""
    return {
        "template_hash": run.data.template_hash,
        "scorers": run.scorer.labels,
        "datasets": [
            dataclasses.asdict(report) for report in (*run.data.reports, run.data.held_out_report)
        ],
        "parameters": decoder_weights.num_params(run.model.config),
    }
