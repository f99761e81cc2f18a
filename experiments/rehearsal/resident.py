"""Bytes of a run's large arrays on one device, by shape and sharding."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from experiments.rehearsal import costs
from experiments.rehearsal.case import Case
from luspo_jax.learner.state import OFFLOADS
from luspo_jax.run.memory import base_bytes, param_bytes, value_bytes


def device_bytes(tree: Any) -> float:
    """Returns the bytes that a device holds of arrays, by their shapes and shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * value_bytes(x.dtype)
        for x in jax.tree.leaves(tree)
    )


def state_bytes(case: Case, *names: str) -> dict[str, float]:
    """Returns the bytes on a device of the given parts of the train state, if present."""
    one, made = case.trained_bytes, case.adapter
    marked = case.config.length.every > 0
    referred = case.rule.objective.kl_coef and case.rule.copies_reference
    sizes = {
        "params": one,
        "opt_state": 2 * one,
        "ref_params": one if referred else 0,
        "marked_params": one if marked else 0,
        "base": base_bytes(case.model, case.layouts[0], made) if made else 0,
    }
    return {name: sizes[name] for name in names if sizes[name]}


def parked(case: Case, *without: str) -> dict[str, float]:
    """The train state beside a rollout, what is offloaded left out; none on devices apart."""
    return {} if case.apart else kept(case, *without)


def kept(case: Case, *without: str) -> dict[str, float]:
    """The train state between steps where training is, what is offloaded left out."""
    gone = {*OFFLOADS[case.config.train.offload], *without}
    names = ("params", "opt_state", "ref_params", "marked_params", "base")
    return state_bytes(case, *[name for name in names if name not in gone])


def weights_bytes(case: Case) -> float:
    """Returns the bytes of the sampler's weights on a device; 0 if it reads the trainer's."""
    dtype = jnp.dtype(case.config.model.rollout_dtype)
    if not case.hands_over:
        return 0
    return param_bytes(case.model, case.engine.layout, dtype)


def kernels(case: Case) -> costs.Kernels:
    """Returns what the sampler's matrices, keys and values take to read."""
    dtype, engine = jnp.dtype(case.config.model.rollout_dtype), case.engine
    copied = dtype == jnp.int8 and engine.how.expert_kernel == "megablox"
    own_heads = case.model.num_kv_heads // case.rollout_parts.tensor
    vectors = 2 * case.model.num_layers * own_heads * engine.page_size
    cached = engine.page_bytes / (vectors * case.model.head_dim)
    return costs.Kernels(dtype.itemsize, copied, cached)


def pool_bytes(case: Case, held_out: bool = False) -> float:
    """Returns the bytes on a device of the pool of pages, of a step or a held-out evaluation."""
    engine = case.held_out if held_out else case.engine
    return engine.pool_bytes(case.responses(held_out))
