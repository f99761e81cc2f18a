"""Random ragged batches for the objective tests, and one jitted loss-and-gradient for all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax import objectives
from luspo_jax.objectives import PRESETS, Objective, PolicyBatch

B, T = 6, 9
GROUP_IDS = np.array([7, 7, 7, 3, 3, 3], np.int32)


def case(
    seed: int = 0, *, rows: int = B, width: int = T, dtype=np.float64, drift: float = 0.15
) -> dict[str, np.ndarray]:
    """Arrays of one optimizer step: ragged rows, two groups, drifted policies, mixed rewards."""
    rng = np.random.default_rng(seed)
    lengths_B = rng.integers(1, width, rows)
    lengths_B[0] = width - 1
    # Position 0 is masked, as the alignment law has it.
    position_T = np.arange(width)
    mask_BT = (position_T >= 1) & (position_T <= lengths_B[:, None])
    logprobs_BT = -rng.gamma(1.0, 0.8, (rows, width)) - 0.01

    def drifted(scale):
        noise_BT = scale * rng.standard_normal((rows, width))
        return np.minimum(logprobs_BT + noise_BT, -1e-3).astype(dtype)

    group_ids_B = np.resize(GROUP_IDS, rows)
    rewards_B = rng.random(rows).round(2)
    return {
        "logprobs_BT": logprobs_BT.astype(dtype),
        "old_logprobs_BT": drifted(drift),
        "ref_logprobs_BT": drifted(2 * drift),
        "sampler_logprobs_BT": drifted(drift),
        "entropy_BT": rng.gamma(2.0, 0.5, (rows, width)).astype(dtype),
        # At least p² of the sampled token, at most what one other token adds.
        "collision_BT": np.exp(2 * logprobs_BT).astype(dtype),
        "segment_starts_BT": rng.random((rows, width)) < 0.3,
        "parts_BM": np.stack([rewards_B > 0.5, rng.random(rows)], axis=1).astype(dtype),
        "response_mask_BT": mask_BT,
        "rewards_B": rewards_B.astype(dtype),
        "group_ids_B": group_ids_B,
    }


def lengths(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Response lengths [B]."""
    return arrays["response_mask_BT"].sum(axis=1).astype(np.int32)


def batch_of(objective: Objective, arrays: dict[str, np.ndarray], **changes) -> PolicyBatch:
    """The whole step as one `PolicyBatch`; advantages and scales are computed unless given."""
    changes = dict(changes)
    if "advantages_B" not in changes:
        changes |= formed(objective, arrays)
    if "length_scale_B" not in changes:
        changes["length_scale_B"] = objectives.length_scales(
            objective, lengths(arrays), arrays["group_ids_B"]
        )
    fields = {f.name for f in dataclasses.fields(PolicyBatch)}
    values = {name: x for name, x in arrays.items() if name in fields} | changes
    return PolicyBatch(**jax.tree.map(jnp.asarray, values))


PART_WEIGHTS = (1.0, 0.5)


def formed(objective: Objective, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Advantages of the step, of responses and, if the objective has them, of tokens."""
    dtype = arrays["logprobs_BT"].dtype
    mask_BT = arrays["response_mask_BT"]
    found = objectives.advantages(
        objective,
        arrays["rewards_B"],
        arrays["group_ids_B"],
        lengths(arrays),
        parts=objectives.RewardParts(arrays["parts_BM"], np.array(PART_WEIGHTS, dtype)),
        tokens=objectives.TokenStatistics(
            mask_BT, arrays["old_logprobs_BT"], arrays["collision_BT"]
        )
        if objective.token_advantages
        else None,
    )
    if not objective.token_advantages:
        return {"advantages_B": found}
    mean_B = np.asarray(found).sum(axis=1) / np.maximum(mask_BT.sum(axis=1), 1)
    return {"token_advantages_BT": found, "advantages_B": mean_B.astype(dtype)}


def denominators_of(objective: Objective, batch: PolicyBatch) -> objectives.Denominators:
    """Denominators of a step that is one batch."""
    return objectives.denominators(
        objective,
        batch.response_mask_BT,
        batch.entropy_BT,
        batch.old_logprobs_BT,
        batch.sampler_logprobs_BT,
    )


@functools.partial(jax.jit, static_argnums=0)
def loss_grad_metrics(objective, batch, denominators):
    """(loss, ∂loss/∂logprobs_BT, metric sums)."""

    def value(logprobs_BT):
        changed = dataclasses.replace(batch, logprobs_BT=logprobs_BT)
        return objectives.loss(objective, changed, denominators)

    (total, metrics), grad_BT = jax.value_and_grad(value, has_aux=True)(batch.logprobs_BT)
    return total, grad_BT, metrics


@functools.partial(jax.jit, static_argnums=0)
def loss_grad(objective, batch, denominators):
    """The same without metrics, which compiles three times faster."""
    return loss_grad_metrics.__wrapped__(objective, batch, denominators)[:2]


def whole_step(objective: Objective, arrays: dict[str, np.ndarray], **changes):
    """(loss, gradient) of a step taken as one batch, as NumPy."""
    batch = batch_of(objective, arrays, **changes)
    value, grad_BT = loss_grad(objective, batch, denominators_of(objective, batch))
    return np.asarray(value), np.asarray(grad_BT)


def step_with_means(objective: Objective, arrays: dict[str, np.ndarray]):
    """(loss, gradient, metric means) of a step taken as one batch, as NumPy."""
    batch = batch_of(objective, arrays)
    value, grad_BT, metrics = loss_grad_metrics(objective, batch, denominators_of(objective, batch))
    means = {name: float(mean) for name, mean in objectives.metric_means(metrics).items()}
    return np.asarray(value), np.asarray(grad_BT), means


# Presets, and each of them with every per-token term there is: where other systems had their bugs.
LOADED = {
    f"{name}+terms": dataclasses.replace(
        objective,
        kl_coef=0.1,
        entropy_coef=0.01,
        correction="none" if objective.surrogate == "vespo" else "tis+binary-kl+m2po",
        binary_kl_max=0.1,
        m2po_max=0.1,
        off_policy_max=0.05,
        top_entropy_quantile=0.6,
    )
    for name, objective in PRESETS.items()
    if name in ("dapo", "luspo", "gmpo", "vespo")
}
ALL = PRESETS | LOADED
