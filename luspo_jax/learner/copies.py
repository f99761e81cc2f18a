"""Copies of the weights, one for each part of the mesh's data axis, and the sum of their gradients.

Weights are the same on all parts of the data axis, which may be slices with a network between them.
A gradient by "the" weights is a sum over all rows, so each micro-batch would send it across. By a
copy [copies, …], of which each part of the axis has its own, it is a sum over that part's rows
alone. Such gradients add up over micro-batches, and are summed across once an update. On a device
neither takes more memory: its part of a copy is its part of the weights.
"""

from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.learner.state import param_shardings
from luspo_jax.models import decoder
from luspo_jax.models.forward import Forward

_WHOLE = "vision"  # not copied: images are not sharded with the rows that show them


def has_copies(how: Forward) -> bool:
    """Whether weights have copies: whether the mesh has a data axis."""
    return how.layout is not None and how.layout.size("copies") > 1


def copied(params: Any, how: Forward) -> Any:
    """Returns the copies [copies, …] of weights that have any, and the others as they are."""
    if not has_copies(how):
        return params
    count = how.layout.size("copies")
    own = {
        name: jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)
        for name, tree in params.items()
        if name != _WHOLE
    }
    return constrained({**params, **own}, how)


def constrained(tree: Any, how: Forward) -> Any:
    """Constrains copies, or sums of their gradients, to their places; for use under jit."""
    return sharding.constrain_tree(tree, _shardings(how))


def summed(grads: Any, how: Forward) -> Any:
    """Sums gradients over copies: [copies, …] → […], each in its parameter's place."""
    if not has_copies(how):
        return grads
    sums = {
        name: tree if name == _WHOLE else jax.tree.map(lambda g: jnp.sum(g, axis=0), tree)
        for name, tree in grads.items()
    }
    return sharding.constrain_tree(sums, param_shardings(how))


def _shardings(how):
    if not has_copies(how):
        return param_shardings(how)
    places = {}
    for name, axes in decoder.trained_axes(how).items():
        first = () if name == _WHOLE else ("copies",)
        places[name] = sharding.shardings(_after(first, axes), how.layout)
    return places


def _after(first, axes_tree):
    return jax.tree.map(
        lambda axes: (*first, *axes), axes_tree, is_leaf=lambda node: isinstance(node, tuple)
    )
