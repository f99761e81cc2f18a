"""Moves weights from their training layout to their rollout layout."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax import sharding
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.models.low_rank import is_composed
from luspo_jax.sharding import Layout


def rollout_params(params: Any, *, config: DecoderConfig, layout: Layout | None, dtype: Any) -> Any:
    """Casts weights and shards them by the rollout's table over this process's devices.

    Cast and reshard are one program: the sampler's type travels, and no device receives more of a
    parameter than the shard that it samples with. int8 makes `models.quantised` matrices: each
    channel's maximum is taken where the weights lie, whichever devices have parts of it.

    Args:
      params: master weights in the training layout.
      config: of the model.
      layout: the rollout's, over the devices of all processes; None on one device.
      dtype: of the sampler.
    """
    dtype = jnp.dtype(dtype)
    if layout is None:
        as_it_is = dtype == jnp.float32 and not is_composed(params)
        return params if as_it_is else cast_program(dtype)(params)
    return _placed(params, Forward(config), layout, dtype)


def apart_params(params: Any, *, how: Forward, layout: Layout | None) -> Any:
    """Shards frozen weights and their adapter by the rollout's table, each in the type it has.

    On one device they are those of the trainer.

    Args:
      params: the frozen weights with the adapter in place, in the training layout.
      how: of the trainer.
      layout: the rollout's, as in `rollout_params`.
    """
    if layout is None:
        return params
    return _placed(params, Forward(how.model, adapter=how.adapter), layout, None)


def _placed(params, how, layout, dtype):
    """Casts and shards; `dtype` is None where an adapter stays apart."""
    axes = _axes(how, dtype)
    trained_on = jax.tree.leaves(params)[0].sharding
    if trained_on.device_set.isdisjoint(layout.mesh.devices.flat):
        # Devices of their own: the cast is made where the weights lie, and then each part travels.
        return jax.device_put(cast_program(dtype)(params), sharding.shardings(axes, layout))
    if not sharding.same_order(trained_on, layout):
        # The devices of the mesh were ordered by their links; XLA wants one order in a program.
        params = cast_program(dtype)(params)
        params = jax.device_put(params, sharding.in_order_of(layout, params))
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    return sharding.own_part(_moved(dtype, mesh, layout, how)(params), axes, layout)


def _axes(how, dtype):
    return decoder.whole_axes(how) if dtype is None else decoder.param_axes(how.model, dtype)


def lower_rollout_params(
    params: Any, *, config: DecoderConfig, layout: Layout | None, dtype: Any
) -> Any:
    """Returns the lowered hand-over, to inspect its traffic and memory; `params` may be shapes.

    On one device it is the cast.
    """
    if layout is None:
        return cast_program(jnp.dtype(dtype)).lower(params)
    places = sharding.in_order_of(layout, params)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places
    )
    mesh = jax.tree.leaves(places)[0].mesh
    return _moved(jnp.dtype(dtype), mesh, layout, Forward(config)).lower(params)


@functools.cache
def _moved(dtype, mesh, layout, how):
    axes, between = _axes(how, dtype), layout.halfway()
    start = sharding.shardings(axes, Layout(mesh, "train"))
    even = how.model.embed_dim % between.size("embed") == 0
    halfway = sharding.shardings(axes, between) if even else None

    def move(params):
        # Cast before moving, so that the sampler's type travels. Without the stop halfway, XLA may
        # build whole stacks of layers on every device before it shards them.
        params = sharding.constrain_tree(_cast_all(params, dtype), start)
        return sharding.constrain_tree(params, halfway)

    return jax.jit(move, out_shardings=sharding.shardings(axes, layout))


@functools.cache
def cast_program(dtype: Any) -> Callable[[Any], Any]:
    """Returns the program that casts weights to the sampler's type where they lie."""
    return jax.jit(functools.partial(_cast_all, dtype=dtype))


def _cast_all(params, dtype):
    return params if dtype is None else decoder.cast(params, dtype)
