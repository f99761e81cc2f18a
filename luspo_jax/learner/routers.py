"""Router statistics of a pass through a mixture of experts, and the load-balancing loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax import sharding
from luspo_jax.learner.plan import Plan
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.experts import load
from luspo_jax.sharding import Layout
from luspo_jax.types import TokenRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterPass:
    """Router statistics of a pass over rows; counts are over real tokens, prompts included.

    Attributes:
      expert_ids: [R, T, L, K] the routers' own choice at each token of the rows, whatever was
        replayed; None if not kept.
      load_LE: float32 number of tokens sent to each expert.
      mass_LE: float32 sums of the routers' probabilities.
      tokens: float32 number of real tokens.
      agreement: record → float32 share of a token's K expert ids that both chose, mean over layers,
        summed over real tokens.
    """

    expert_ids: jax.Array | None
    load_LE: jax.Array
    mass_LE: jax.Array
    tokens: jax.Array
    agreement: dict[str, jax.Array]


def router_pass(routed, back, real_RT, recorded):
    """Computes the statistics of a pass; `back` restores the row order of per-token values."""
    ids = back(routed.expert_ids)
    agreement = {}
    for name, others in recorded.items():
        shared = jnp.any(ids[..., :, None] == others[..., None, :], axis=-1)
        share_RT = jnp.mean(shared.astype(jnp.float32), axis=(-2, -1))
        agreement[name] = jnp.sum(jnp.where(real_RT, share_RT, 0))
    return RouterPass(
        expert_ids=ids,
        load_LE=routed.load_LE,
        mass_LE=routed.mass_LE,
        tokens=jnp.sum(real_RT, dtype=jnp.float32),
        agreement=agreement,
    )


def sequence_ids(router: RouterPass, plan: Plan, layout: Layout | None) -> list[np.ndarray]:
    """Returns the expert ids that a pass recorded, [n, L, K] per sequence, on every process.

    One micro-batch at a time, because each is replicated on the devices for a moment, and because
    the rows of a whole step take more host memory than its sequences.
    """
    found: list[np.ndarray | None] = [None] * len(plan.lengths_B)
    positions, size = plan.positions(), plan.rows_per_microbatch * plan.row_length
    for part in range(router.expert_ids.shape[0]):
        rows = np.asarray(_on_every_device(router.expert_ids, np.int32(part), layout=layout))
        flat = rows.reshape(-1, *rows.shape[2:])
        for i in np.flatnonzero(plan.parts_B == part):
            found[i] = flat[positions[i] - part * size]
    return found


@functools.partial(jax.jit, static_argnames=("layout",))
def _on_every_device(parts, index, *, layout):
    part = jax.lax.dynamic_index_in_dim(parts, index, keepdims=False)
    return sharding.constrain(part, (None,) * part.ndim, layout)


def balance_weights(rows: TokenRows, model: DecoderConfig, *, replay: str) -> jax.Array:
    """Returns c_LE such that Σ c · mass is the load-balancing loss of the rows.

    The loss is the mean over layers of E · Σ_e f_e · P_e: f_e the tokens that went to expert e over
    all tokens, P_e the mean of the router's probability (Switch Transformer, arXiv:2101.03961,
    equations 4–6); it is K for an even load. f comes from recorded expert ids, which are data: it
    is that of the whole minibatch, however it is cut, and every aggregation has the same scale.

    Raises:
      ValueError: no expert ids were recorded.
    """
    ids, used = rows.expert_ids, None
    if ids is not None:
        used = ids.sampler if replay == "sampler" or ids.old is None else ids.old
    if used is None:
        raise ValueError(
            "router_aux_coef > 0 needs the expert ids that the sampler recorded "
            "(TokenRows.expert_ids)"
        )
    real_RT = rows.segment_ids_RT > 0
    sent = jnp.where(real_RT[..., None, None], used.astype(jnp.int32), model.num_experts)
    counts_LE = jax.vmap(lambda ids: load(ids, model.num_experts))(jnp.moveaxis(sent, -2, 0))
    tokens = jnp.maximum(jnp.sum(real_RT), 1).astype(jnp.result_type(float))
    return model.num_experts / model.num_expert_layers / tokens * counts_LE / tokens


def router_metrics(
    router: RouterPass, balance_LE: jax.Array | None = None
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns agreement of the current routing with recorded ids, and load, as (sum, count).

    A layer's violation compares loads with the even one: the fullest expert's load over even, less
    1 (max), and the mean of |load over even − 1| (avg); 0 for an even load (arXiv:2408.15664).
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
    if "old" not in router.agreement:  # this pass is the old policy's own
        metrics["router/agreement/old_current"] = (router.tokens, router.tokens)
        if "sampler" in router.agreement:
            shared = router.agreement["sampler"]
            metrics["router/agreement/sampler_old"] = (shared, router.tokens)
    if balance_LE is not None:
        metrics["router/aux_loss"] = (jnp.sum(balance_LE * router.mass_LE), one)
    return metrics
