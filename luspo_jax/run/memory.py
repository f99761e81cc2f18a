"""Device memory of a run: an estimate of its arrays, and the peak in use."""

import functools
import math
import os
import resource
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.learner.state import OFFLOADS
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.models.low_rank import Adapter
from luspo_jax.models.quantised import activation_type
from luspo_jax.rollout.engine import PREFILL_TOKENS
from luspo_jax.run import adapters
from luspo_jax.run.arithmetic import batch_arithmetic
from luspo_jax.run.settings import Config, section
from luspo_jax.sharding import Layout


def memory_estimate(
    config: Config,
    model: DecoderConfig,
    layouts: tuple[Layout | None, Layout | None],
    pages: int,
) -> dict[str, int]:
    """Estimates the bytes of a step's large arrays on one device, by name.

    Activations are those of one micro-batch at its longest: per token and layer about
    16·D + 3·F + 4·N·H values without remat, D with it. Experts, which always recompute theirs, add
    6·D + 7·F for each of a token's K, in one layer. An estimate, not a promise.

    Args:
      config: of the run.
      model: its decoder.
      layouts: of training and of the rollout.
      pages: bytes of the rollout's pool of pages on a device.
    """
    sizes = batch_arithmetic(config)
    train, rollout = layouts
    made = adapters.adapter(config, model)
    trained = trained_bytes(model, train, made)
    return {
        **state_memory(model, train, made),
        "reference policy": trained if _has_reference(config) else 0,
        "policy before a measured update": trained if config.length.every else 0,
        "rollout weights": _rollout_weights(config, model, rollout),
        "rollout pages": pages,
        **pass_memory(config, model, train, sizes.rows_per_microbatch * sizes.row_length),
    }


def device_memory(device: jax.Device) -> float:
    """Returns the bytes of a device; of a CPU, an equal part of the machine's for each."""
    if device.process_index != jax.process_index():
        device = jax.local_devices()[0]  # all processes have the same kind
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / jax.local_device_count()


def room_for_pages(
    config: Config,
    model: DecoderConfig,
    layouts: tuple[Layout | None, Layout | None],
    memory: float,
) -> float:
    """Returns the bytes of a device of `memory` bytes that a rollout can use for pages.

    A tenth is the compiler's and jax's. Of the rest, the train state that is not offloaded, the
    sampler's weights, a prefill's activations and the logits of a decode step are subtracted. It
    depends on nothing but these numbers, so a resumed run has the same pages.
    """
    train, rollout = layouts
    own = sharding.on_own_devices(rollout)
    made = adapters.adapter(config, model)
    trained = trained_bytes(model, train, made)
    held = {
        "params": trained,
        "opt_state": 2 * trained,
        "ref_params": trained if _has_reference(config) else 0,
        "marked_params": trained if config.length.every else 0,
        "base": 0 if made is None else base_bytes(model, train, made),
    }
    gone = OFFLOADS[config.train.offload]
    state = sum(size for name, size in held.items() if name not in gone)
    if config.rollout_mesh.apart:
        state = 0
    width = jnp.dtype(activation_type(config.model.rollout_dtype)).itemsize
    mlp_dim = max(model.mlp_dim, model.experts_per_token * model.expert_dim)
    values = 16 * model.embed_dim + 3 * mlp_dim + 4 * model.num_heads * model.head_dim
    prefill = PREFILL_TOKENS // _parts(own, "batch") * values * width
    rows = config.rollout.num_slots // _parts(own, "batch")
    logits = 4 * 4 * rows * model.vocab_size
    weights = _rollout_weights(config, model, rollout)
    return max(0.0, 0.9 * memory - state - weights - prefill - logits)


def _rollout_weights(config, model, rollout):
    """Bytes of the sampler's weights on a device; 0 if it reads the trainer's."""
    if config.rollout.lora == "apart":
        made = adapters.adapter(config, model)
        parts = (base_bytes(model, rollout, made), trained_bytes(model, rollout, made))
        return sum(parts) if rollout else 0
    as_they_are = rollout is None and jnp.dtype(config.model.rollout_dtype) == jnp.float32
    if as_they_are and not section(config, "lora").rank:
        return 0
    return param_bytes(model, rollout, config.model.rollout_dtype)


def _has_reference(config):
    """Whether the state holds the reference policy of a KL term."""
    return bool(section(config, "objective").kl_coef) and adapters.copies_reference(config)


def state_memory(
    model: DecoderConfig, layout: Layout | None, made: Adapter | None = None
) -> dict[str, int]:
    """Returns the bytes of weights, moments and gradients on one device, by name."""
    trained = trained_bytes(model, layout, made)
    weights = {"master weights (float32)": trained}
    if made is not None:
        weights = {
            f"frozen weights ({made.base})": base_bytes(model, layout, made),
            "adapter (float32)": trained,
        }
    return {
        **weights,
        "Adam moments (float32)": 2 * trained,
        "gradients (float32)": trained,
    }


def pass_memory(
    config: Config, model: DecoderConfig, layout: Layout | None, tokens: int
) -> dict[str, int]:
    """Estimates the bytes that a micro-batch of so many tokens takes on one device, by name."""
    tokens //= _parts(layout, "batch", "length")
    mlp_dim = model.mlp_dim if model.num_expert_layers < model.num_layers else 0
    inside = 16 * model.embed_dim + 3 * mlp_dim + 4 * model.num_heads * model.head_dim
    kept = (
        model.embed_dim * model.num_layers + inside
        if config.model.remat != "none"
        else (inside * model.num_layers)
    )
    kept += model.experts_per_token * (6 * model.embed_dim + 7 * model.expert_dim)
    logits = 8 * config.model.head_chunk_tokens * model.vocab_size // _parts(layout, "vocab")
    return {
        "activations of a micro-batch": jnp.dtype(config.model.dtype).itemsize * tokens * kept,
        "head logits": logits,
    }


@functools.cache  # traces the model
def param_bytes(model: DecoderConfig, layout: Layout | None, dtype: Any) -> int:
    """Returns the bytes of one device's shard of the parameters in `dtype`, as `decoder.cast` makes
    them.

    Mesh axes differ by parameter: experts are sharded over the expert axis, norms over none.
    """
    params = decoder.abstract_params(model, jnp.dtype(dtype))
    return _tree_bytes(params, decoder.param_axes(model, dtype), layout)


@functools.cache  # traces the model
def trained_bytes(model: DecoderConfig, layout: Layout | None, made: Adapter | None) -> int:
    """Returns the bytes of one device's shard of what is trained: weights, or an adapter."""
    how = Forward(model, adapter=made)
    return _tree_bytes(decoder.abstract_trained(how), decoder.trained_axes(how), layout)


@functools.cache  # traces the model
def base_bytes(model: DecoderConfig, layout: Layout | None, made: Adapter) -> int:
    """Returns the bytes of one device's shard of an adapter's frozen weights."""
    how = Forward(model, adapter=made)
    return _tree_bytes(decoder.abstract_frozen(how), decoder.frozen_axes(how), layout)


def _tree_bytes(tree, axes_tree, layout):
    axes = jax.tree.leaves(axes_tree, is_leaf=lambda node: isinstance(node, tuple))
    size = sum(
        math.prod(layout.sharding(names).shard_shape(x.shape) if layout else x.shape)
        * value_bytes(x.dtype)
        for x, names in zip(jax.tree.leaves(tree), axes, strict=True)
    )
    return math.ceil(size)


def value_bytes(dtype: Any) -> float:
    """Returns the bytes of an array's value on a device; 4 bits are packed, but not on a CPU."""
    return 0.5 if jnp.dtype(dtype) == jnp.uint4 else jnp.dtype(dtype).itemsize


def _parts(layout, *axes):
    return math.prod(layout.size(axis) for axis in axes) if layout else 1


def peak_memory() -> int:
    """Returns peak bytes of the accelerator if it counts them, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
