"""One optimizer step: log-probs → objective → gradient over micro-batches → optax."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from luspo_jax import objectives, optimizer, sharding
from luspo_jax.logprobs import LogprobRule, RouterPass, Scored, scored
from luspo_jax.models import decoder
from luspo_jax.models.experts import load
from luspo_jax.models.forward import Forward
from luspo_jax.objectives import Objective
from luspo_jax.ops.precision import wide_type
from luspo_jax.sharding import Layout
from luspo_jax.types import TokenBatch, TrainBatch, TrainState


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """Everything about an optimizer step that is static under jit.

    Attributes:
      logprobs: how log-probabilities are computed.
      objective: the loss.
      optimizer: an optax transformation (compared by identity: build it once).
      num_microbatches: parts a minibatch is cut into, one after another; the result does not
        depend on it. Packed rows bring their own.
      max_grad_norm: global-norm clipping, 0 = off.
      bin_edges: of the length bins of metrics, tokens; empty for none.
      frozen: top-level names of parameters that a step leaves as they are, weight decay included.
      router_aux_coef: of the load-balancing loss of a mixture of experts; needs recorded experts.
    """

    logprobs: LogprobRule
    objective: Objective
    optimizer: optax.GradientTransformation
    num_microbatches: int
    max_grad_norm: float
    bin_edges: tuple[int, ...] = ()
    router_aux_coef: float = 0.0
    frozen: tuple[str, ...] = ()


def initial_state(params: Any, rule: UpdateRule, *, marked: bool = False) -> TrainState:
    """A state that has taken no step; the reference policy, if the objective has one, is `params`.

    The arrays are copies, because `update_step` gives its state's memory away. `marked` makes
    room for `TrainState.marked_params`.
    """
    if rule.logprobs.how.layout is None:
        return _fresh(params, rule, marked)
    fresh = functools.partial(_fresh, rule=rule, marked=marked)
    where = state_shardings(jax.eval_shape(fresh, params), rule)
    return jax.jit(fresh, out_shardings=where)(params)


def abstract_state(rule: UpdateRule, *, marked: bool = False) -> TrainState:
    """Shapes, types and places of `initial_state`; nothing is allocated."""
    params = decoder.abstract_params(rule.logprobs.how.model)
    state = jax.eval_shape(functools.partial(_fresh, rule=rule, marked=marked), params)
    if rule.logprobs.how.layout is None:
        return state
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        state_shardings(state, rule),
    )


def state_shardings(state: TrainState, rule: UpdateRule) -> TrainState | None:
    """Where the leaves of a state lie: moments and copies as the parameters they belong to."""
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
    """Where the parameters lie; None on one device."""
    return sharding.shardings(decoder.param_axes(how.model), how.layout)


def _fresh(params, rule, marked):
    params = jax.tree.map(lambda x: jnp.array(x, wide_type(x)), params)
    reference = jax.tree.map(jnp.copy, params) if rule.objective.kl_coef else None
    return TrainState(
        params,
        rule.optimizer.init(params),
        jnp.zeros((), jnp.int32),
        reference,
        jax.tree.map(jnp.copy, params) if marked else None,
    )


@functools.partial(jax.jit, static_argnames=("rule", "num_microbatches", "record_experts"))
def score_rows(
    params: Any,
    rows: TokenBatch,
    *,
    rule: LogprobRule,
    num_microbatches: int,
    record_experts: bool = False,
) -> Scored:
    """Scores rows without gradients, one micro-batch at a time; everything on every device.

    `num_microbatches` is that of rows that are not packed. With `record_experts`,
    `router.expert_ids` are [micro-batches, rows, T, L, K] of the rows that the model read. A
    token's take L · K bytes (384 in Qwen3-30B-A3B, and its log-prob and entropy 8), so they stay
    where the rows lie, and `experts_on_host` fetches them.
    """

    def score(carry, part):
        found = scored(params, part, rule=rule)
        if found.router is not None and not record_experts:
            found = dataclasses.replace(
                found, router=dataclasses.replace(found.router, expert_ids=None)
            )
        return carry, found

    parts = _split(rows, _num_parts(rows, num_microbatches), rule.how.layout)
    step = score
    if rows.packed is not None:
        step = _unless_empty(score, lambda part: part, rule.how.model)
    _, result = jax.lax.scan(step, None, parts)

    def whole(x):  # on every process, because the host reads them
        x = x.reshape(-1, *x.shape[2:])
        return sharding.constrain(x, (None,) * x.ndim, rule.how.layout)

    router = result.router
    if router is not None:
        sums = jax.tree.map(
            lambda x: jnp.sum(x, axis=0), dataclasses.replace(router, expert_ids=None)
        )
        ids = router.expert_ids
        if ids is not None:
            axes = (None, "batch", *[None] * (ids.ndim - 2))
            ids = sharding.constrain(ids, axes, rule.how.layout)
        router = dataclasses.replace(sums, expert_ids=ids)
    return Scored(whole(result.logprobs_BT), whole(result.entropy_BT), router)


def experts_on_host(router: RouterPass, layout: Layout | None) -> np.ndarray:
    """The experts that `score_rows` recorded as [rows, T, L, K], on every process.

    Micro-batch by micro-batch, because each is on every device for a moment.
    """
    if layout is None:
        parts = np.asarray(router.expert_ids)
    else:
        parts = [
            np.asarray(_on_every_device(router.expert_ids, np.int32(part), layout=layout))
            for part in range(router.expert_ids.shape[0])
        ]
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("layout",))
def _on_every_device(parts, index, *, layout):
    part = jax.lax.dynamic_index_in_dim(parts, index, keepdims=False)
    return sharding.constrain(part, (None,) * part.ndim, layout)


@functools.partial(jax.jit, static_argnames=("rule",), donate_argnames=("state",))
def update_step(
    state: TrainState,
    batch: TrainBatch,
    rate: jax.Array,
    alpha_shift: jax.Array | float = 0.0,
    *,
    rule: UpdateRule,
) -> tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]:
    """Takes one optimizer step on one minibatch.

    Denominators and length scales come from the whole minibatch before it is cut, and each
    micro-batch's loss is its sum over them: gradients add up to the gradient of the whole,
    however it is cut. A non-finite gradient changes nothing but the count of skipped updates.

    Args:
      state: donated.
      batch: rows whose number `rule.num_microbatches` divides, or packed rows; whole groups.
      rate: float32 scalar, the learning rate.
      alpha_shift: float32 scalar, added to the exponent of an adaptive length scale.
      rule: the static part.

    Returns:
      The new state, and metrics as (sum, count).
    """
    objective = rule.objective
    response_mask_BT = batch.rows.response_mask_BT
    lengths_B = jnp.sum(response_mask_BT, axis=1, dtype=jnp.int32)
    length_scale_B = objectives.length_scales(objective, lengths_B, batch.group_ids_B, alpha_shift)
    denominators = objectives.denominators(objective, response_mask_BT, batch.old_entropy_BT)
    balance_LE = balance_weights(batch.rows, rule)

    def loss(params, part):
        micro, scale_B = part
        found = scored(params, micro.rows, rule=rule.logprobs)
        total, metrics = objectives.loss(
            objective,
            objectives.PolicyBatch(
                logprobs_BT=found.logprobs_BT,
                old_logprobs_BT=micro.old_logprobs_BT,
                advantages_B=micro.advantages_B,
                response_mask_BT=micro.rows.response_mask_BT,
                length_scale_B=scale_B,
                entropy_BT=found.entropy_BT,
                ref_logprobs_BT=micro.ref_logprobs_BT,
                sampler_logprobs_BT=micro.sampler_logprobs_BT,
            ),
            denominators,
            bin_edges=rule.bin_edges,
        )
        router = found.router
        if router is not None:
            if balance_LE is not None:
                total = total + rule.router_aux_coef * jnp.sum(balance_LE * router.mass_LE)
            router = jax.lax.stop_gradient(dataclasses.replace(router, expert_ids=None))
        return total, (metrics, router)

    def accumulate(grads, part):
        (_, found), new = jax.value_and_grad(loss, has_aux=True)(state.params, part)
        grads = jax.tree.map(lambda g, n: g + n.astype(g.dtype), grads, new)
        return sharding.constrain_tree(grads, param_shardings(rule.logprobs.how)), found

    # Gradients add up in float32, or float64 where the master weights are.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide_type(p)), state.params)
    num_parts = _num_parts(batch.rows, rule.num_microbatches)
    parts = _split((batch, length_scale_B), num_parts, rule.logprobs.how.layout)
    if batch.rows.packed is not None:
        accumulate = _unless_empty(accumulate, lambda part: part[0].rows, rule.logprobs.how.model)
    grads, found = jax.lax.scan(accumulate, zeros, parts)
    metrics, router = jax.tree.map(lambda x: jnp.sum(x, axis=0), found)
    if router is not None:
        metrics |= router_metrics(router, balance_LE)
    return _step(state, grads, rate, metrics, rule)


def balance_weights(rows: TokenBatch, rule: UpdateRule) -> jax.Array | None:
    """c_LE such that Σ c · mass is the load-balancing loss of the rows; None without such a loss.

    Mean over layers of E · Σ_e f_e · P_e: f_e the tokens that went to expert e over all tokens, P_e
    the mean of the router's probability (Switch Transformer, arXiv:2101.03961, equations 4–6); K
    where the load is even. f is of recorded experts, which are data: it is that of the whole
    minibatch however this is cut, and the loss has one scale under every aggregation.

    Raises:
      ValueError: where no experts were recorded.
    """
    if not rule.router_aux_coef:
        return None
    model, used = rule.logprobs.how.model, None
    if rows.packed is None:
        experts, real = rows.experts, rows.segment_ids_BT > 0
    else:
        experts, real = rows.packed.experts, rows.packed.segment_ids_RT > 0
    if experts is not None:
        sampled = rule.logprobs.replay == "sampler" or experts.old is None
        used = experts.sampler if sampled else experts.old
    if used is None:
        raise ValueError(
            "router_aux_coef > 0 needs the experts that the sampler recorded (TokenBatch.experts)"
        )
    sent = jnp.where(real[..., None, None], used.astype(jnp.int32), model.num_experts)
    counts_LE = jax.vmap(lambda ids: load(ids, model.num_experts))(jnp.moveaxis(sent, -2, 0))
    tokens = jnp.maximum(jnp.sum(real), 1).astype(jnp.result_type(float))
    return model.num_experts / model.num_expert_layers / tokens * counts_LE / tokens


def router_metrics(
    router: RouterPass, balance_LE: jax.Array | None = None
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Agreement of the current routing with recorded ones, and load, as (sum, count).

    Violation of a layer: the fullest expert's load over an even one's, less 1 (max), and the mean
    of |load over even − 1| (avg); 0 where the load is even (arXiv:2408.15664).
    """
    one = jnp.ones((), jnp.float32)
    even_L1 = jnp.maximum(jnp.mean(router.load_LE, axis=1, keepdims=True), 1e-9)
    excess_LE = router.load_LE / even_L1 - 1
    most_L, mean_L = jnp.max(excess_LE, axis=1), jnp.mean(jnp.abs(excess_LE), axis=1)
    metrics = {
        "router/max_violation": (jnp.mean(most_L), one),
        "router/max_violation/worst_layer": (jnp.max(most_L), one),
        "router/avg_violation": (jnp.mean(mean_L), one),
    }
    for layer in range(most_L.size):
        metrics[f"router/max_violation/layer_{layer:02d}"] = (most_L[layer], one)
        metrics[f"router/avg_violation/layer_{layer:02d}"] = (mean_L[layer], one)
    for name, shared in router.agreement.items():
        metrics[f"router/agreement/{name}_current"] = (shared, router.tokens)
    if "old" not in router.agreement:  # this pass is the one before the step
        metrics["router/agreement/old_current"] = (router.tokens, router.tokens)
        if "sampler" in router.agreement:
            shared = router.agreement["sampler"]
            metrics["router/agreement/sampler_old"] = (shared, router.tokens)
    if balance_LE is not None:
        metrics["router/aux_loss"] = (jnp.sum(balance_LE * router.mass_LE), one)
    return metrics


@functools.partial(jax.jit, static_argnames=("decay",), donate_argnames=("state",))
def refresh_reference(state: TrainState, *, decay: float) -> TrainState:
    """π_ref ← decay · π_ref + (1 − decay) · π: decay 0 copies the policy, 0.99 is an average."""
    reference = jax.tree.map(
        lambda ref, new: decay * ref + (1 - decay) * new, state.ref_params, state.params
    )
    return dataclasses.replace(state, ref_params=reference)


OFFLOADS = {
    "none": (),
    "reference": ("ref_params",),
    "optimizer": ("opt_state",),
    "both": ("ref_params", "opt_state"),
}


def parked(state: TrainState, offload: str) -> TrainState:
    """The state with the parts that OFFLOADS names in host memory, to make room for a rollout.

    What stays is tied to its device, as what comes back will be: jitted functions would compile
    again for that.
    """
    if OFFLOADS[offload]:
        state = _moved(state, [field.name for field in dataclasses.fields(state)], "device")
    return _moved(state, OFFLOADS[offload], "pinned_host")


def fetched(state: TrainState, offload: str) -> TrainState:
    """The state with all parts on the devices again."""
    return _moved(state, OFFLOADS[offload], "device")


def _moved(state, names, memory):
    parts = {name: getattr(state, name) for name in names}
    moved = {name: sharding.moved(x, memory) for name, x in parts.items() if x is not None}
    return dataclasses.replace(state, **moved)


def mark_params(state: TrainState) -> TrainState:
    """Remembers the policy as it is now, before an update whose effect is to be measured."""
    return dataclasses.replace(state, marked_params=_copied(state.params))


_copied = jax.jit(functools.partial(jax.tree.map, jnp.copy))


def _step(state, grads, rate, metrics, rule):
    """Clips, steps, and keeps the old state where the gradient is not finite."""
    grads, norm, clipped = optimizer.clip_by_global_norm(grads, rule.max_grad_norm)
    finite = jnp.isfinite(norm)
    params, opt_state = optimizer.apply(
        rule.optimizer, state.params, grads, state.opt_state, rate=rate
    )
    params = {**params, **{name: state.params[name] for name in rule.frozen}}
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    skipped = 1 - finite.astype(jnp.int32)
    one, taken = jnp.ones((), jnp.float32), finite.astype(jnp.float32)
    metrics = {
        **metrics,
        # The mean is over the updates taken: a skipped one is counted, not averaged in.
        "actor/grad_norm": (jnp.where(finite, norm, 0.0), taken),
        "actor/grad_clip_rate": (jnp.where(finite, clipped, False).astype(jnp.float32), taken),
        "actor/skipped_updates": (skipped.astype(jnp.float32), one),
    }
    state = dataclasses.replace(
        state,
        params=params,
        opt_state=opt_state,
        skipped_updates=state.skipped_updates + skipped,
    )
    return sharding.constrain_tree(state, state_shardings(state, rule)), metrics


def _num_parts(rows, num_microbatches):
    return num_microbatches if rows.packed is None else rows.packed.num_microbatches


def _unless_empty(step, rows_of, model):
    """A scan's `step` that leaves out packed micro-batches in which nothing is scored.

    The number of packed micro-batches is rounded up so that few programs are compiled; what is
    added is not computed. Its results are zeros, as those of a masked micro-batch are. Routers are
    judged by every token: with experts, only what holds none is left out.
    """

    def step_or_skip(carry, part):
        def skip(carry, part):
            _, result = jax.eval_shape(step, carry, part)
            return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)

        rows = rows_of(part)
        some = rows.packed.segment_ids_RT > 0 if model.num_experts else rows.response_mask_BT
        return jax.lax.cond(jnp.any(some), step, skip, carry, part)

    return step_or_skip


def _split(tree, num_parts, layout):
    """[B, ...] -> [num_parts, B / num_parts, ...]; None leaves stay None."""

    def cut(x):
        if x.shape[0] % num_parts:
            raise ValueError(
                f"num_microbatches={num_parts} does not divide the {x.shape[0]} rows of a batch"
            )
        return x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])

    return jax.tree.map(
        lambda x, axes: sharding.constrain(x, (None, *axes), layout),
        jax.tree.map(cut, tree),
        _row_axes(tree),
    )


def put_rows(tree: Any, layout: Layout | None) -> Any:
    """Puts a batch of NumPy arrays, the same on all processes, where a step reads it.

    Rows that the model reads are spread over the devices. Of packed rows, what belongs to a
    sequence and not to a row, some floats a token, is on every device.
    """
    if layout is None:
        return tree
    return jax.tree.map(lambda x, axes: sharding.put(x, axes, layout), tree, _row_axes(tree))


def abstract_rows(tree: Any, layout: Layout | None) -> Any:
    """Shapes and types of a batch with the places that `put_rows` gives; nothing is allocated."""
    if layout is None:
        return tree
    return jax.tree.map(
        lambda x, axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(axes)),
        tree,
        _row_axes(tree),
    )


def _row_axes(tree):
    """The logical axes of every leaf of a batch."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [[str(getattr(key, "name", "")) for key in path] for path, _ in leaves]
    packed = any("packed" in name for name in names)

    def spread(name):
        return not packed or ("packed" in name and name[-1] != "starts_B")

    return jax.tree.unflatten(
        structure,
        [
            _Axes(("batch" if spread(name) or "images" in name else None, *[None] * (x.ndim - 1)))
            for name, (_, x) in zip(names, leaves, strict=True)
        ],
    )


class _Axes(tuple):
    """A leaf of a tree, which a plain tuple is not."""
