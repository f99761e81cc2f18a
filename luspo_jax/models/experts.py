"""Mixture-of-experts MLPs: routing, dispatch without dropped tokens, and exchange over a mesh.

A router sends each token to K of E experts. The device that holds an expert sorts the tokens it has
for each, multiplies group by group (`ops.grouped_matmul`), and restores the order by gathers alone.
The backward pass does the same, and recomputes the hidden layer instead of keeping it. If experts
are sharded over the mesh's expert axis, tokens travel to them and back.

Letters besides those of types.py: A assignments (token, expert), M rows sorted by expert and padded
for the grouped product, X devices along the expert axis, C assignments sent to one of them at once.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from luspo_jax import sharding
from luspo_jax.models.layers import gathered, project, swiglu
from luspo_jax.models.quantised import Quantised, scaled, split
from luspo_jax.ops.grouped_matmul import grouped_matmul, grouped_outer, row_multiple
from luspo_jax.ops.precision import wide, wide_type
from luspo_jax.sharding import Layout

ROUTER_AXES = ("embed", None)
EXPERT_AXES = (
    ("experts", "embed", "mlp"),
    ("experts", "embed", "mlp"),
    ("experts", "mlp", "embed"),
)  # axes of the kernels gate, up and down
ROOM = 1.25  # assignments sent to one device at once, relative to an even load


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """The routing of a forward pass; for one layer, without the L.

    Attributes:
      expert_ids: [..., L, K], the routers' choice, whatever was replayed, in the order of their
        weight; of type `id_type`.
      load_LE: float32, how many real tokens each expert got.
      mass_LE: float32, sum over real tokens of the router's probability of each expert.
    """

    expert_ids: jax.Array
    load_LE: jax.Array
    mass_LE: jax.Array


def id_type(num_experts: int) -> Any:
    """Returns the dtype of recorded expert ids."""
    return jnp.uint8 if num_experts <= 256 else jnp.uint16


def route(x, kernel_DE, *, count, normalise, replayed=None, real=None, layout=None):
    """Returns (weights, Routed of the layer, ids to send to): softmax over experts, the K largest.

    p = softmax(x · W), float32; weights are p of the K experts, divided by their sum with
    `normalise` (Qwen3-MoE's norm_topk_prob).

    Args:
      x: [..., D] normed hidden states.
      kernel_DE: the router's kernel, float32.
      count: K.
      replayed: ids [..., K] that replace the K most likely; weights are still the router's.
      real: bool [...], false on padding, which is sent nowhere (id E); None: all are real.
      layout: sharding of x, [B, T, D] or [B, D].
    """
    logits = project(wide(x), kernel_DE, 1, ROUTER_AXES, layout, lax.Precision.HIGHEST)
    probs = jax.nn.softmax(logits, axis=-1)
    num_experts = probs.shape[-1]
    # Each device sorts its own rows: XLA may gather those of all for it.
    axes = _rows(probs.ndim)
    of_own = sharding.shard_map(lambda own: lax.top_k(own, count)[1], layout, [axes], axes)
    chosen = of_own(lax.stop_gradient(probs))
    used = chosen if replayed is None else replayed.astype(jnp.int32)
    weights = _of_experts(probs, used)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True) if normalise else weights
    sent = used if real is None else jnp.where(real[..., None], used, num_experts)
    if real is not None:
        probs = jnp.where(real[..., None], probs, 0)
    rows = tuple(range(probs.ndim - 1))
    chosen = chosen.astype(id_type(num_experts))
    load_E = load(sent, num_experts).astype(probs.dtype)
    return weights, Routed(chosen, load_E, jnp.sum(probs, axis=rows)), sent


@functools.partial(jax.checkpoint, prevent_cse=False)
def _of_experts(probs, ids):
    """Selects probs [..., E] at ids [..., K] by a sum over E: a gather's gradient is a scatter."""
    return jnp.sum(
        jax.nn.one_hot(ids, probs.shape[-1], dtype=probs.dtype) * probs[..., None, :], -1
    )


def load(ids, num_experts):
    """Counts the ids [..., K] of each expert, int32 [E]; ids ≥ num_experts are ignored."""
    hits = jax.nn.one_hot(ids, num_experts, dtype=jnp.int32)
    return jnp.sum(hits, axis=tuple(range(ids.ndim)), dtype=jnp.int32)


def check_ids(ids, tokens_BT, config, name):
    """Checks recorded ids [B, T, L, K] against their rows and model.

    Raises:
      ValueError: an invalid shape or type; names `name`, both shapes, and the type.
    """
    if not config.num_experts:
        raise ValueError(f"{name} is of a mixture of experts, and the model has none: leave it out")
    shape = (*tokens_BT.shape, config.num_expert_layers, config.experts_per_token)
    if ids.shape != shape:
        raise ValueError(
            f"{name} is {list(ids.shape)} and must be [rows, tokens, layers with experts, experts "
            f"of a token] = {list(shape)}"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} must hold expert ids, integers, not {ids.dtype}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def expert_mlp(x, ids, weights, kernels, implementation="reference", layout=None):
    """Computes Σ_k weight_k · down_e(silu(gate_e x) ⊙ up_e x), e = id_k; in x's type.

    Args:
      x: [B, T, D], or [B, D] for one token per row.
      ids: int32 [..., K] expert ids; E for none.
      weights: float32 [..., K].
      kernels: gate [E, D, F], up [E, D, F], down [E, F, D], in their own type, or Quantised.
      implementation: of `ops.grouped_matmul`.
      layout: sharding of x and kernels.
    """
    cast = _gathered_all(kernels, x.dtype, layout)
    if x.ndim == 2 and _is_small(ids, kernels, implementation, layout):
        local = _picked
    elif x.ndim == 2 and _parts(layout) > 1:
        local = _broadcast
    else:
        local = _exchanged
    rows = _rows(x.ndim)
    run = sharding.shard_map(
        functools.partial(_flat_forward, local, implementation, layout),
        layout,
        (*(rows,) * 3, *_whole_axes(kernels)),
        rows,
    )
    return run(x, ids, weights, *cast)


def _forward(x, ids, weights, kernels, implementation, layout):
    out = expert_mlp(x, ids, weights, kernels, implementation, layout)
    return out, (x, ids, weights, kernels)


def _backward(implementation, layout, residuals, grad):
    x, ids, weights, kernels = residuals
    rows = _rows(x.ndim)
    run = sharding.shard_map(
        functools.partial(_flat_backward, implementation, layout),
        layout,
        (*(rows,) * 4, *_whole_axes(kernels)),
        (rows, rows, *EXPERT_AXES),
    )
    dx, dweights, *dkernels = run(x, ids, weights, grad, *_gathered_all(kernels, x.dtype, layout))
    dkernels = tuple(d.astype(k.dtype) for d, k in zip(dkernels, kernels, strict=True))
    return dx, None, dweights, dkernels


expert_mlp.defvjp(_forward, _backward)


def _gathered_all(kernels, dtype, layout):
    if isinstance(kernels[0], Quantised):  # cast where they are read; a rollout gathers nothing
        return kernels
    return [gathered(k, dtype, axes, layout) for k, axes in zip(kernels, EXPERT_AXES, strict=True)]


def _whole_axes(kernels):
    whole = [tuple(None if a == "embed" else a for a in axes) for axes in EXPERT_AXES]
    if isinstance(kernels[0], Quantised):
        return [Quantised(axes, (axes[0], axes[2])) for axes in whole]
    return whole


def _rows(ndim):
    return ("batch", None) if ndim == 2 else ("batch", "length", None)


def _parts(layout: Layout | None) -> int:
    return 1 if layout is None else layout.size("experts")


def _is_small(ids, kernels, implementation, layout):
    """Whether so few tokens are decoded that reading K kernels for each is the least work.

    Never on CPU, because XLA copies the kernels it picks: with E/4 assignments, blocks take from a
    third to all of that time, with 4 E a tenth (8 to 128 experts of 256 × 192 and 512 × 256).
    """
    rows = ids.size if layout is None else ids.size // layout.size("batch")
    few = 2 * rows <= kernels[0].shape[0]
    return few and _parts(layout) == 1 and implementation != "blocks"


# ---------------------------------------------------------------- on one device of the mesh


def _flat_forward(local, implementation, layout, x, ids, weights, *kernels):
    lead = x.shape[:-1]
    x_ND, ids_NK, weights_NK = (v.reshape(-1, v.shape[-1]) for v in (x, ids, weights))
    out_ND = local(x_ND, ids_NK, weights_NK, kernels, implementation, layout)
    return _over_tensor(out_ND, layout).astype(x.dtype).reshape(*lead, -1)


def _flat_backward(implementation, layout, x, ids, weights, grad, *kernels):
    flat = (v.reshape(-1, v.shape[-1]) for v in (x, ids, weights, grad))
    dx_ND, dweights_NK, dkernels = _exchanged_backward(*flat, kernels, implementation, layout)
    dx = _over_tensor(dx_ND, layout).astype(x.dtype).reshape(x.shape)
    dweights = _over_tensor(dweights_NK, layout).reshape(weights.shape)
    dkernels = [
        sharding.summed_over_rows(d, axes, layout)
        for d, axes in zip(dkernels, EXPERT_AXES, strict=True)
    ]
    return dx, dweights.astype(weights.dtype), *dkernels


def _over_tensor(part, layout):
    """Sums over the devices that hold parts of each expert's hidden layer."""
    names = () if layout is None else layout.axis_names("mlp")
    return lax.psum(part, names) if names else part


def _picked(x_ND, ids_NK, weights_NK, kernels, implementation, layout):
    """Handles few tokens: picks the kernels of each token's experts."""
    num_experts = kernels[0].shape[0]
    weights_NK = jnp.where(ids_NK < num_experts, weights_NK, 0)
    taken = jax.tree.map(lambda k: jnp.take(k, ids_NK, axis=0, mode="clip"), kernels)

    def product(dims, x, kernel):
        values, scales = split(kernel)
        y = jnp.einsum(dims, x, values.astype(x.dtype), preferred_element_type=wide_type(x))
        return scaled(y, scales)

    gate, up, down = taken
    hidden_NKF = swiglu(
        product("nd,nkdf->nkf", x_ND, gate), product("nd,nkdf->nkf", x_ND, up)
    ).astype(x_ND.dtype)
    out_NKD = product("nkf,nkfd->nkd", hidden_NKF, down)
    return jnp.sum(out_NKD * weights_NK[..., None], axis=1)


def _broadcast(x_ND, ids_NK, weights_NK, kernels, implementation, layout):
    """Handles one token per row: every expert device sees all tokens, each computes its experts."""
    axis, own = layout.axis_names("experts"), kernels[0].shape[0]
    x_ND, ids_NK, weights_NK = (
        lax.all_gather(v, axis, axis=0, tiled=True) for v in (x_ND, ids_NK, weights_NK)
    )
    ids_NK = ids_NK - lax.axis_index(axis) * own
    ids_NK = jnp.where((ids_NK >= 0) & (ids_NK < own), ids_NK, own)
    out_ND = _alone(x_ND, ids_NK, weights_NK, kernels, implementation)
    return lax.psum_scatter(out_ND, axis, scatter_dimension=0, tiled=True)


def _alone(x_ND, ids_NK, weights_NK, kernels, implementation):
    """Computes Σ_k weight · expert(x), float32, over the experts on this device."""
    out_NKD = _rows_forward(x_ND, ids_NK, kernels, implementation)
    return jnp.sum(wide(out_NKD) * weights_NK[..., None], axis=1)


def _rows_forward(x_ND, ids_NK, kernels, implementation):
    """Returns every assignment's result [N, K, D]; 0 if the expert is on another device."""
    gate, up, down = kernels
    plan = _sorted(ids_NK, gate.shape[0], implementation)

    def product(x, kernel):
        values, scales = split(kernel)
        y = grouped_matmul(x, values, plan.group_sizes_E, implementation=implementation)
        return scaled(y, None if scales is None else scales[plan.groups_M])

    x_MD = _taken(x_ND, plan.tokens_M)
    out_MD = product(swiglu(product(x_MD, gate), product(x_MD, up)), down)
    return _taken(out_MD, plan.rows_NK)


def _rows_backward(x_ND, ids_NK, weights_NK, grad_ND, kernels, implementation):
    """Returns (dx of every assignment [N, K, D], dweights [N, K], dkernels in float32)."""
    gate, up, down = kernels
    plan = _sorted(ids_NK, gate.shape[0], implementation)
    product, outer = (
        functools.partial(f, group_sizes_E=plan.group_sizes_E, implementation=implementation)
        for f in (grouped_matmul, grouped_outer)
    )
    x_MD, grad_MD = _taken(x_ND, plan.tokens_M), _taken(grad_ND, plan.tokens_M)
    gate_MF, up_MF = product(x_MD, gate), product(x_MD, up)
    hidden_MF, pull = jax.vjp(swiglu, gate_MF, up_MF)
    # The weight is multiplied in last: its own gradient is what it multiplies.
    dhidden_MF = product(grad_MD, down, transposed=True)
    dweights_M = jnp.sum(wide(hidden_MF) * wide(dhidden_MF), axis=-1)
    weights_M1 = _taken(weights_NK.reshape(-1, 1), plan.assignments_M)

    def weighted(values_MF):
        return (wide(values_MF) * weights_M1).astype(values_MF.dtype)

    dgate_MF, dup_MF = pull(weighted(dhidden_MF))
    dx_MD = product(dgate_MF, gate, transposed=True) + product(dup_MF, up, transposed=True)
    dkernels = (
        outer(x_MD, dgate_MF),
        outer(x_MD, dup_MF),
        outer(weighted(hidden_MF), grad_MD),
    )
    return (
        _taken(dx_MD, plan.rows_NK),
        _taken(dweights_M[:, None], plan.rows_NK)[..., 0],
        dkernels,
    )


@dataclasses.dataclass(frozen=True)
class _Sorted:
    """Assignments sorted by expert; each group starts at the multiple that the product requires.

    Attributes:
      group_sizes_E: rows of each expert, padding included.
      rows_NK: row of each assignment; M if none.
      assignments_M: assignment of each row; N·K on padding.
      tokens_M: token of each row; N on padding.
      groups_M: expert of each row; any on padding.
    """

    group_sizes_E: jax.Array
    rows_NK: jax.Array
    assignments_M: jax.Array
    tokens_M: jax.Array
    groups_M: jax.Array


def _sorted(ids_NK, num_experts, implementation):
    """Sorts by expert; leaves out ids ≥ num_experts. Gathers only, no scatter."""
    N, K = ids_NK.shape
    A = N * K
    multiple = row_multiple(implementation, A, num_experts)
    M = -(-(A + min(num_experts, A) * (multiple - 1)) // multiple) * multiple
    ids_A = jnp.minimum(ids_NK.reshape(-1), num_experts)
    order_A = _order(ids_A, num_experts)
    counts_E = load(ids_A, num_experts)
    sizes_E = -(-counts_E // multiple) * multiple
    ends_E, padded_ends_E = jnp.cumsum(counts_E), jnp.cumsum(sizes_E)
    shift_E = (padded_ends_E - sizes_E) - (ends_E - counts_E)  # shift of a group's first row
    rows_A = _order(order_A, A - 1) + jnp.append(shift_E, 0)[ids_A]
    rows_A = jnp.where(ids_A < num_experts, rows_A, M)
    rows_M = lax.iota(jnp.int32, M)
    group_M = jnp.searchsorted(padded_ends_E, rows_M, side="right", method="compare_all")
    group_M = jnp.minimum(group_M, num_experts - 1)
    place_M = rows_M - shift_E[group_M]
    used_M = (place_M < ends_E[group_M]) & (rows_M < padded_ends_E[-1])
    assignments_M = jnp.where(used_M, order_A[jnp.clip(place_M, 0, A - 1)], A)
    tokens_M = assignments_M // K
    return _Sorted(sizes_E, rows_A.reshape(N, K), assignments_M, tokens_M, group_M)


def _order(keys_A, most):
    """Returns the stable argsort of integers from 0 to `most`.

    If it fits, key and index are packed into one number: sorting those takes a quarter to a half of
    the time of pairs (measured on two cores, 1,024 to 16,384 assignments).
    """
    A = keys_A.size
    if (most + 1) * A > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(keys_A, stable=True).astype(jnp.int32)
    return jnp.sort(keys_A * A + lax.iota(jnp.int32, A)) % A


def _taken(values, index):
    """Returns rows of `values`; 0 if the index is out of range."""
    return jnp.take(values, index, axis=0, mode="fill", fill_value=0)


# ---------------------------------------------------------------- over the expert axis


def _exchanged(x_ND, ids_NK, weights_NK, kernels, implementation, layout):
    """Computes Σ_k weight · expert(x), float32, with experts on any device of the expert axis."""
    if _parts(layout) == 1:
        return _alone(x_ND, ids_NK, weights_NK, kernels, implementation)
    trade = _Exchange(ids_NK, kernels[0].shape[0], layout)

    def one_round(out_ND, start):
        ids_C1, x_CD = trade.received(trade.ids(start)), trade.received(trade.sent(x_ND, start))
        out_C1D = _rows_forward(x_CD, ids_C1, kernels, implementation)
        back_NKD = trade.back(trade.received(out_C1D[:, 0]), start)
        return out_ND + jnp.sum(wide(back_NKD) * weights_NK[..., None], axis=1)

    return trade.rounds(one_round, jnp.zeros(x_ND.shape, wide_type(x_ND)))


def _exchanged_backward(x_ND, ids_NK, weights_NK, grad_ND, kernels, implementation, layout):
    """Returns (dx_ND float32, dweights_NK, dkernels float32)."""
    if _parts(layout) == 1:
        dx_NKD, dweights_NK, dkernels = _rows_backward(
            x_ND, ids_NK, weights_NK, grad_ND, kernels, implementation
        )
        return jnp.sum(wide(dx_NKD), axis=1), dweights_NK, dkernels
    trade = _Exchange(ids_NK, kernels[0].shape[0], layout)

    def one_round(carry, start):
        dx_ND, dweights_NK, dkernels = carry
        arrays = (
            trade.sent(x_ND, start),
            trade.sent(grad_ND, start),
            trade.sent_of(weights_NK, start),
        )
        x_CD, grad_CD, weights_C1 = map(trade.received, arrays)
        dx_C1D, dweights_C1, new = _rows_backward(
            x_CD, trade.received(trade.ids(start)), weights_C1, grad_CD, kernels, implementation
        )
        back_NKD = trade.back(trade.received(dx_C1D[:, 0]), start)
        back_NK1 = trade.back(trade.received(dweights_C1), start)
        return (
            dx_ND + jnp.sum(wide(back_NKD), axis=1),
            dweights_NK + back_NK1[..., 0],
            jax.tree.map(jnp.add, dkernels, new),
        )

    width = wide_type(x_ND)
    zeros = (
        jnp.zeros(x_ND.shape, width),
        jnp.zeros(weights_NK.shape, width),
        tuple(jnp.zeros(k.shape, width) for k in kernels),
    )
    return trade.rounds(one_round, zeros)


class _Exchange:
    """Sends assignments to the devices of their experts and back, some at a time.

    A round sends C assignments to each device, whether there are as many or not. The fullest device
    determines the number of rounds: one if the load is even. Nothing is dropped.
    """

    def __init__(self, ids_NK, own_experts, layout):
        (self.axis,) = layout.axis_names("experts")
        self.parts, self.own = layout.size("experts"), own_experts
        self.N, self.K = ids_NK.shape
        A, most = self.N * self.K, self.N * min(self.K, own_experts)
        self.room = min(most, 8 * math.ceil(ROOM * A / self.parts / 8))
        self.num_rounds = -(-most // self.room)
        self.ids_A = ids_NK.reshape(-1)
        self.owner_A = jnp.minimum(self.ids_A // own_experts, self.parts)
        self.order_A = _order(self.owner_A, self.parts)
        counts_X = load(self.owner_A, self.parts)
        self.ends_X = jnp.cumsum(counts_X)
        self.starts_X = self.ends_X - counts_X
        place_A = _order(self.order_A, A - 1)
        self.rank_A = place_A - jnp.append(self.starts_X, 0)[self.owner_A]

    def rounds(self, one_round, carry):
        """Runs `one_round(carry, start)` for as many rounds as any device along the axis needs."""
        needed = lax.pmax(jnp.max(self.ends_X - self.starts_X), self.axis)

        def step(carry, start):
            return lax.cond(start < needed, one_round, lambda c, _: c, carry, start), None

        starts = self.room * jnp.arange(self.num_rounds, dtype=jnp.int32)
        if self.num_rounds == 1:
            return one_round(carry, starts[0])
        return lax.scan(step, carry, starts)[0]

    def _assignments(self, start):
        """Returns the assignment in each of the X · C slots; A for an empty one."""
        place_XC = self.starts_X[:, None] + start + jnp.arange(self.room, dtype=jnp.int32)[None]
        there_XC = place_XC < self.ends_X[:, None]
        order_A = self.order_A
        taken_XC = order_A[jnp.clip(place_XC, 0, order_A.size - 1)]
        return jnp.where(there_XC, taken_XC, order_A.size).reshape(-1)

    def ids(self, start):
        """Returns ids of the receiver's own experts [X · C, 1]; its number of experts for none."""
        ids = jnp.take(self.ids_A, self._assignments(start), mode="fill", fill_value=-1)
        return jnp.where(ids < 0, self.own, ids % self.own)[:, None]

    def sent(self, values_ND, start):
        """Returns the token of each slot."""
        return _taken(values_ND, self._assignments(start) // self.K)

    def sent_of(self, values_NK, start):
        """Returns a value of each slot's assignment, [X · C, 1]."""
        return _taken(values_NK.reshape(-1, 1), self._assignments(start))

    def received(self, values):
        """Exchanges [X · C, ...] between all devices."""
        return lax.all_to_all(values, self.axis, split_axis=0, concat_axis=0, tiled=True)

    def back(self, values, start):
        """Returns this round's results at their assignments [N, K, ...]; 0 elsewhere."""
        rank_A = self.rank_A - start
        here_A = (rank_A >= 0) & (rank_A < self.room) & (self.owner_A < self.parts)
        place_A = jnp.where(here_A, self.owner_A * self.room + rank_A, values.shape[0])
        return _taken(values, place_A.reshape(self.N, self.K))
