"""Rows of one training step: tokens, log-probs of other policies, advantages.

NumPy in, NumPy out: what a step trains on is settled on the host, once, before its first update.
"""

import dataclasses

import jax
import numpy as np

from luspo_jax import image_rows, objectives, packing
from luspo_jax.experience import Rollouts
from luspo_jax.logprobs import Scored
from luspo_jax.metrics import StepMetrics
from luspo_jax.ops.sizes import bucket_length
from luspo_jax.run.arithmetic import batch_arithmetic
from luspo_jax.run.build import Run
from luspo_jax.types import Experts, TrainBatch, TrainState
from luspo_jax.update import experts_on_host, put_rows, score_rows


class MismatchError(RuntimeError):
    """Sampler and trainer disagree about the probabilities of sampled tokens."""


def train_batch(run: Run, rollouts: Rollouts) -> TrainBatch:
    """Training rows of the step in NumPy, without advantages and other policies' log-probs."""
    config = run.config
    sizes = batch_arithmetic(config)
    prompts = [prompt.tokens for prompt in rollouts.prompts]
    tokens = [response.tokens for response in rollouts.responses]
    longest = max(len(p) + len(t) for p, t in zip(prompts, tokens, strict=True))
    length = bucket_length(
        longest, sizes.tokens_per_row, num_buckets=config.train.num_length_buckets
    )
    rows = packing.padded_rows(prompts, tokens, length=length, pad_id=run.model.pad_token_id)
    sampler_logprobs_BT = packing.place_responses(
        [response.logprobs for response in rollouts.responses], rows.response_mask_BT
    )
    mask_BT = rows.response_mask_BT & rollouts.trained_B[:, None]
    experts = _sampler_experts(run, rollouts, length)
    rows = image_rows.with_positions(rows, rollouts.prompts, run.model.config)
    return TrainBatch(
        rows=dataclasses.replace(rows, response_mask_BT=mask_BT, experts=experts),
        advantages_B=np.zeros(len(tokens), np.float32),
        group_ids_B=rollouts.group_ids_B,
        old_logprobs_BT=None,
        old_entropy_BT=None,
        ref_logprobs_BT=None,
        sampler_logprobs_BT=sampler_logprobs_BT,
    )


def with_old_logprobs(
    run: Run,
    state: TrainState,
    rollouts: Rollouts,
    batch: TrainBatch,
    metrics: StepMetrics,
    check_mismatch: bool,
) -> TrainBatch:
    """Adds log-probs of the policy that sampled, as the trainer computes them, where needed.

    A step of one update does not need them: its first forward pass is that policy's. Groups that
    were carried over were sampled by the policy of an earlier step, whose log-probs the sampler
    recorded: those are taken. So it is with the experts of a mixture.
    """
    objective = run.rule.objective
    sizes = batch_arithmetic(run.config)
    ranks_entropy = objective.top_entropy_quantile < 1
    carried_B = rollouts.carried_B
    needed = (
        sizes.updates_per_step > 1
        or ranks_entropy
        or _kl_in_reward(objective)
        or bool(carried_B.any())
    )
    if not (needed or check_mismatch):
        return batch
    scored = _score(run, rollouts, state.params, batch, record_experts=needed)
    logprobs_BT, entropy_BT = scored.logprobs_BT, scored.entropy_BT
    if scored.router is not None and needed:  # else the update's own pass says it
        shared, tokens = scored.router.agreement["sampler"], scored.router.tokens
        metrics.add("router/agreement/sampler_old", float(shared / tokens))
    mask_BT = batch.rows.response_mask_BT & ~carried_B[:, None]
    gap = float(np.max(np.abs(logprobs_BT - batch.sampler_logprobs_BT)[mask_BT], initial=0.0))
    metrics.add("rollout_corr/max_abs_diff", gap)
    limit = run.config.rollout.mismatch_limit
    if check_mismatch and not gap <= limit:
        raise MismatchError(
            f"sampler and trainer log-probs of the same tokens differ by up to {gap:.3g} nats at "
            f"the first step, more than rollout.mismatch_limit={limit:g}: in float32 this is a "
            "fault; in bfloat16 rounding makes 0.2 to 0.5 and more in large runs: set the limit to "
            "1, or model.rollout_dtype=float32"
        )
    if not needed:
        return batch
    rows = batch.rows
    if scored.router is not None:
        old = np.where(carried_B[:, None, None, None], rows.experts.sampler, scored.router.experts)
        rows = dataclasses.replace(rows, experts=dataclasses.replace(rows.experts, old=old))
    return dataclasses.replace(
        batch,
        rows=rows,
        old_logprobs_BT=np.where(carried_B[:, None], batch.sampler_logprobs_BT, logprobs_BT),
        old_entropy_BT=entropy_BT if ranks_entropy else None,
    )


def with_ref_logprobs(
    run: Run, state: TrainState, rollouts: Rollouts, batch: TrainBatch
) -> TrainBatch:
    """Adds log-probs of the reference policy, where the objective has a KL term."""
    if state.ref_params is None:
        return batch
    # Its routers choose for themselves: another policy's experts are not its own.
    logprobs_BT = _score(run, rollouts, state.ref_params, batch, replay="none").logprobs_BT
    return dataclasses.replace(batch, ref_logprobs_BT=logprobs_BT)


def with_advantages(
    run: Run, rollouts: Rollouts, batch: TrainBatch, *, shorten: bool = False
) -> TrainBatch:
    """Adds advantages, formed inside each group of responses to one prompt.

    `shorten` takes a reward from each response in proportion to its length, where the run says
    so for a degenerate phase.
    """
    objective, rewards_B = run.rule.objective, rollouts.rewards_B
    if shorten and run.length.mitigation == "penalty":
        share_B = rollouts.lengths_B / run.config.rollout.max_response_length
        rewards_B = rewards_B - np.float32(run.length.penalty) * share_B.astype(np.float32)
    if _kl_in_reward(objective):
        rewards_B = rewards_B + np.asarray(
            objectives.reward_adjustment(
                batch.old_logprobs_BT,
                batch.ref_logprobs_BT,
                batch.rows.response_mask_BT,
                kl_coef=objective.kl_coef,
                kl_estimator=objective.kl_estimator,
            )
        )
    lengths_B = np.where(rollouts.counted_B, rollouts.lengths_B, 0)
    advantages_B = objectives.advantages(objective, rewards_B, rollouts.group_ids_B, lengths_B)
    return dataclasses.replace(batch, advantages_B=np.asarray(advantages_B, np.float32))


def minibatch(
    run: Run, rollouts: Rollouts, batch: TrainBatch, chosen: np.ndarray, metrics: StepMetrics
) -> TrainBatch:
    """The chosen rows, packed where the configuration says so, with the images that they hold."""
    part = jax.tree.map(lambda x: x[chosen], batch)
    prompts = [rollouts.prompts[row] for row in chosen]
    num_parts, plan = run.config.train.num_microbatches, None
    if run.config.train.packing:
        plan = _plan(run, part.rows)
        metrics.update(plan.metrics)
    rows = _with_images(run, prompts, part.rows, num_parts, plan)
    part = dataclasses.replace(part, rows=rows)
    return part if plan is None else packing.packed_batch(part, plan)


def _with_images(run, prompts, rows, num_parts, plan):
    """`with_images` of the micro-batches that the configuration or a plan makes of the rows."""
    if plan is None:
        parts_B = np.arange(len(prompts)) // (len(prompts) // num_parts)
    else:
        num_parts = plan.num_microbatches
        parts_B = plan.places_B // plan.responses_per_microbatch
    config, layout = run.model.config, run.rule.scoring.layout
    return image_rows.with_images(rows, prompts, parts_B, num_parts, config=config, layout=layout)


def _plan(run, rows):
    sizes = batch_arithmetic(run.config)
    return packing.plan(
        (rows.segment_ids_BT > 0).sum(axis=1),
        row_length=sizes.pack_length,
        rows_per_microbatch=sizes.packed_rows_per_microbatch,
    )


def _score(run, rollouts, params, batch, record_experts=False, **changes):
    """Scored of all rows in NumPy; recorded experts row by row, as everything else.

    With images, as many rows at a time as an update reads: pixels take more memory than all else,
    and a micro-batch of few prompts encodes few images.
    """
    prompts, scoring = rollouts.prompts, dataclasses.replace(run.rule.scoring, **changes)
    if not any(prompt.images for prompt in prompts):
        return _score_rows(run, prompts, params, batch.rows, scoring, record_experts)
    size = batch_arithmetic(run.config).responses_per_minibatch
    found = [
        _score_rows(
            run,
            prompts[start : start + size],
            params,
            jax.tree.map(lambda x, start=start: x[start : start + size], batch.rows),
            scoring,
        )
        for start in range(0, len(prompts), size)
    ]
    logprobs_BT, entropy_BT = (
        np.concatenate([getattr(one, name) for one in found])
        for name in ("logprobs_BT", "entropy_BT")
    )
    return Scored(logprobs_BT, entropy_BT)  # no model that reads images has experts


def _score_rows(run, prompts, params, rows, scoring, record_experts=False):
    sizes = batch_arithmetic(run.config)
    width = rows.tokens_BT.shape[1]
    plan, parts = None, len(prompts) // sizes.responses_per_microbatch
    if run.config.train.packing:
        plan = _plan(run, rows)
    rows = _with_images(run, prompts, rows, parts, plan)
    if plan is not None:
        rows, parts = packing.packed_rows(rows, plan), 1
    scored = score_rows(
        params,
        put_rows(rows, scoring.layout),
        scoring=scoring,
        num_microbatches=parts,
        record_experts=record_experts,
    )
    router, experts = scored.router, None
    if router is not None:
        if record_experts:
            experts = experts_on_host(router, scoring)
        router = jax.tree.map(np.asarray, dataclasses.replace(router, experts=None))
    of_rows = [np.asarray(x) for x in (scored.logprobs_BT, scored.entropy_BT)]
    if plan is not None:
        of_rows = [packing.from_places(x, plan) for x in of_rows]
        if experts is not None:
            experts = packing.from_rows(experts, plan, width)
    return Scored(*of_rows, router and dataclasses.replace(router, experts=experts))


def _sampler_experts(run, rollouts, length):
    """What the sampler's routers chose, at the tokens of each row; None without experts."""
    model = run.model.config
    if not model.num_experts:
        return None
    layers, count = model.num_expert_layers, model.experts_per_token
    kind = np.uint8 if model.num_experts <= 256 else np.uint16
    placed = np.zeros((len(rollouts.responses), length, layers, count), kind)
    for row, (prompt, response) in enumerate(
        zip(rollouts.prompts, rollouts.responses, strict=True)
    ):
        start, end = len(prompt.tokens), len(prompt.tokens) + len(response.tokens)
        for name, part in (
            ("prompt_experts", placed[row, :start]),
            ("experts", placed[row, start:end]),
        ):
            ids = getattr(response, name)
            if ids is None or ids.shape != part.shape:
                raise ValueError(
                    f"{name} of the response {response.sample_id} to prompt {prompt.prompt_id} "
                    f"must be the sampler's, {list(part.shape)}, and is "
                    f"{None if ids is None else list(ids.shape)}: sample with record_experts=True"
                )
            part[:] = ids
    return Experts(sampler=placed)


def _kl_in_reward(objective):
    return objective.kl_coef > 0 and objective.kl_placement == "reward"
