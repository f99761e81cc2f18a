"""The train state, its sharding over a mesh, and the rule by which a step changes it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from luspo_jax import sharding
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.models import decoder
from luspo_jax.models.forward import Forward
from luspo_jax.objectives import Objective
from luspo_jax.ops.precision import wide_type
from luspo_jax.types import AdapterState, TrainState


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """The part of an optimizer step that is static under jit.

    Attributes:
      logprobs: how log-probabilities are computed.
      objective: the loss.
      optimizer: an optax transformation (compared by identity: build it once).
      max_grad_norm: global-norm clipping, 0 = off.
      bin_edges: edges of the length bins in metrics, in tokens; empty for none.
      frozen: top-level names of parameters that a step does not change, weight decay included.
      router_aux_coef: weight of the load-balancing loss; needs recorded expert ids.
      copies_reference: whether the state holds the reference policy of a KL term; if not, it is the
        frozen weights, with the adapter switched off.
    """

    logprobs: LogprobRule
    objective: Objective
    optimizer: optax.GradientTransformation
    max_grad_norm: float
    bin_edges: tuple[int, ...] = ()
    router_aux_coef: float = 0.0
    frozen: tuple[str, ...] = ()
    copies_reference: bool = True


def initial_state(params: Any, rule: UpdateRule, *, marked: bool = False) -> TrainState:
    """Returns a state that has taken no step; its reference policy, if needed, is `params`.

    The arrays are copies, because `update_step` donates its state. `marked` makes room for
    `TrainState.marked_params`.
    """
    if rule.logprobs.how.layout is None:
        return _fresh(params, rule, marked)
    fresh = functools.partial(_fresh, rule=rule, marked=marked)
    where = state_shardings(jax.eval_shape(fresh, params), rule)
    return jax.jit(fresh, out_shardings=where)(params)


def abstract_state(rule: UpdateRule, *, marked: bool = False) -> TrainState:
    """Returns shapes, types and shardings of `initial_state`; allocates nothing."""
    params = decoder.abstract_trained(rule.logprobs.how)
    state = jax.eval_shape(functools.partial(_fresh, rule=rule, marked=marked), params)
    return _placed(state, state_shardings(state, rule))


def abstract_base(how: Forward) -> Any:
    """Returns shapes, types and shardings of the frozen weights; None without an adapter."""
    if how.adapter is None:
        return None
    where = sharding.shardings(decoder.frozen_axes(how), how.layout)
    return _placed(decoder.abstract_frozen(how), where)


def _placed(shapes, where):
    """Adds shardings to shapes; none on one device."""
    if where is None:
        return shapes
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, where
    )


def state_shardings(state: TrainState, rule: UpdateRule) -> TrainState | None:
    """Returns the shardings of a state: moments and copies are sharded as their parameters."""
    layout = rule.logprobs.how.layout
    if layout is None:
        return None
    of_params, whole = param_shardings(rule.logprobs.how), layout.sharding(())
    return TrainState(
        of_params,
        optax.tree_utils.tree_map_params(
            rule.optimizer,
            lambda _, where: where,
            state.opt_state,
            of_params,
            transform_non_params=lambda _: whole,
        ),
        whole,
        None if state.ref_params is None else of_params,
        None if state.marked_params is None else of_params,
    )


def param_shardings(how: Forward) -> Any:
    """Returns the shardings of what a step changes, weights or adapter; None on one device."""
    return sharding.shardings(decoder.trained_axes(how), how.layout)


def with_base(state: TrainState, base: Any) -> TrainState:
    """Returns the state of an adapter and its frozen weights; the state itself if `base` is None.

    The next update donates them with the rest.
    """
    return state if base is None else AdapterState(**_fields(state), base=base)


def without_base(state: TrainState) -> TrainState:
    """Returns what a checkpoint holds of a state."""
    fields = _fields(state)
    fields.pop("base", None)
    return TrainState(**fields)


def _fields(state):
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def policy_params(state: TrainState, how: Forward, policy: str = "params") -> Any:
    """Returns what a forward pass of a policy reads.

    Args:
      state: of any kind; `NO_STATE` has no policy.
      how: of the update, which says whether there is an adapter.
      policy: the field that holds it; where it is None, the policy is the frozen weights alone.
    """
    params = getattr(state, policy)
    if how.adapter is None:
        return params
    base = getattr(state, "base", None)
    return base if params is None else decoder.whole_params(base, params, how)


def _fresh(params, rule, marked):
    params = jax.tree.map(lambda x: jnp.array(x, wide_type(x)), params)
    copied = rule.objective.kl_coef and rule.copies_reference
    reference = jax.tree.map(jnp.copy, params) if copied else None
    return TrainState(
        params,
        rule.optimizer.init(params),
        jnp.zeros((), jnp.int32),
        reference,
        jax.tree.map(jnp.copy, params) if marked else None,
    )


@functools.partial(jax.jit, static_argnames=("decay",), donate_argnames=("state",))
def refresh_reference(state: TrainState, *, decay: float) -> TrainState:
    """Sets π_ref ← decay · π_ref + (1 − decay) · π: 0 copies the policy, 0.99 is an average."""
    reference = jax.tree.map(
        lambda ref, new: decay * ref + (1 - decay) * new, state.ref_params, state.params
    )
    return dataclasses.replace(state, ref_params=reference)


def mark_params(state: TrainState) -> TrainState:
    """Stores a copy of the policy before an update whose effect is to be measured."""
    return dataclasses.replace(state, marked_params=_copied(state.params))


_copied = jax.jit(functools.partial(jax.tree.map, jnp.copy))


OFFLOADS = {
    "none": (),
    "reference": ("ref_params",),
    "optimizer": ("opt_state",),
    "both": ("ref_params", "opt_state"),
}


def parked(state: TrainState, offload: str) -> TrainState:
    """Moves the parts that OFFLOADS names to host memory, to make room for a rollout.

    The other parts are committed to their device, as moved parts will be on return; otherwise
    jitted functions would compile again.
    """
    if OFFLOADS[offload]:
        state = _moved(state, [field.name for field in dataclasses.fields(state)], "device")
    return _moved(state, OFFLOADS[offload], "pinned_host")


def fetched(state: TrainState, offload: str) -> TrainState:
    """Moves all parts back to the devices."""
    return _moved(state, OFFLOADS[offload], "device")


def _moved(state, names, memory):
    parts = {name: getattr(state, name) for name in names}
    moved = {name: sharding.moved(x, memory) for name, x in parts.items() if x is not None}
    return dataclasses.replace(state, **moved)
