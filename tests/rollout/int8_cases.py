"""int8 by numpy, told by the names of axes, and the weights that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.models import decoder
from luspo_jax.models.quantised import Quantised
from tests.models import expert_cases
from tests.rollout import rollout_cases as cases

MODELS = {
    "dense, tied": cases.config(98, model_type="qwen2"),
    "dense, untied": cases.config(98, tie_embeddings=False),
    "experts and a dense layer": expert_cases.config(
        8, 2, vocab_size=98, num_layers=3, dense_layers=(1,)
    ),
}


def params(model):
    return expert_cases.params(model) if model.num_experts else cases.random_params(model)


def is_matrix(path, model):
    """Whether a parameter is int8: what a decode step multiplies with, but for routers."""
    name = path.split("/")
    if name[-1] == "embedding":
        return model.tie_embeddings
    return name[-1] in ("head", "kernel") and "router" not in name and name[0] != "vision"


def _summed(path, axes):
    """Places of the axes that a product sums over."""
    inner = {"out": ("heads", "head_dim"), "down": ("mlp",)}
    names = inner.get(path.split("/")[-2] if "/" in path else "", ("embed",))
    return tuple(i for i, axis in enumerate(axes) if axis in names)


def along(scales, path, axes):
    """Scales that broadcast against the matrix."""
    return np.expand_dims(scales, _summed(path, axes))


def rounded(matrix, path, axes):
    """(int8, float32) of a matrix, by numpy."""
    summed = _summed(path, axes)
    steps = np.abs(matrix).max(summed, keepdims=True) / np.float32(127)
    return np.round(matrix / steps).astype(np.int8), np.squeeze(steps, summed)


def dequantised(params, model):
    """The float32 weights that int8 ones stand for; others as they are."""
    axes = decoder.param_axes(model)

    def one(path, leaf):
        if not isinstance(leaf, Quantised):
            return jnp.asarray(leaf, jnp.float32)
        names = "/".join(key.key for key in path)
        here = axes
        for key in path:
            here = here[key.key]
        steps = along(np.asarray(leaf.scales, np.float64), names, here)
        return jnp.asarray(np.asarray(leaf.values, np.float64) * steps, jnp.float32)

    return jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda node: isinstance(node, Quantised)
    )
