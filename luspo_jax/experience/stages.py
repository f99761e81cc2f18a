"""Stages of a step between rewards and update; each adds fields to the responses.

All that a step trains on is computed on the host, once, before its first update.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from luspo_jax import objectives
from luspo_jax.experience.groups import Rollouts
from luspo_jax.learner.plan import one_a_row
from luspo_jax.learner.policies import (
    Laid,
    PolicyLogprobs,
    laid,
    laid_rows,
    policy_logprobs,
    sequence_lengths,
)
from luspo_jax.learner.programs import StepPrograms
from luspo_jax.learner.rows import Planner
from luspo_jax.metrics import StepMetrics, timed
from luspo_jax.objectives import Objective, corrections
from luspo_jax.types import ResponseRows, TrainBatch, TrainState


class MismatchError(RuntimeError):
    """Sampler and trainer disagree about the probabilities of sampled tokens."""


def with_logprobs(
    rollouts: Rollouts,
    state: TrainState,
    programs: StepPrograms,
    planner: Planner,
    metrics: StepMetrics,
    mismatch_limit: float | None = None,
) -> tuple[Rollouts, int]:
    """Adds log-probs of the old and the reference policy that no update computes itself.

    Args:
      rollouts: rewarded responses.
      state: contains the policies.
      programs: of the step.
      planner: of the run.
      metrics: receives times and the gap between sampler and trainer.
      mismatch_limit: largest allowed gap, in nats; None does not check.

    Returns:
      The rollouts, and the length of arrays with one row per response.

    Raises:
      MismatchError: sampler and trainer disagree.
    """
    check, stale = mismatch_limit is not None, not rollouts.fresh_B.all()
    passes = programs.passes(stale=stale, check=check)
    width = planner.width(sequence_lengths(rollouts.prompts, rollouts.responses))
    first, rest = rollouts.parted(_spared_groups(rollouts, programs, stale))
    with timed(metrics, "old_log_prob"):
        if "old" in passes:
            read = rollouts if check else rest
            plans = laid(planner, read.prompts, read.responses, width)
            found = policy_logprobs(state, passes["old"], plans, planner)
            if check:
                check_gap(largest_gap(rollouts, found), mismatch_limit)
            # A continued run checks too, and must not report what an uninterrupted one does not.
            if rollouts.version > 0:
                read, found = rest, found.last(len(rest.responses))
            if passes["old"].kept or rollouts.version == 0:
                metrics.add("rollout_corr/max_abs_diff", largest_gap(read, found))
            if passes["old"].kept:
                known = with_old_logprobs(
                    rest,
                    found.last(len(rest.responses)),
                    old_policy=programs.rule.objective.old_policy,
                    keep_entropy=programs.keeps_entropy,
                )
                rollouts = Rollouts([*first.groups, *known.groups], rollouts.version)
                if found.agreement is not None:  # without this pass, the update reports it
                    metrics.add("router/agreement/sampler_old", found.agreement)
    with timed(metrics, "ref"):
        if "ref" in passes:
            plans = laid(planner, rollouts.prompts, rollouts.responses, width)
            found = policy_logprobs(state, passes["ref"], plans, planner)
            rollouts = rollouts.enriched(ref_logprobs=found.logprobs)
    return rollouts, width


def _spared_groups(rollouts, programs, stale):
    """Returns how many groups, the first, need no pass of the old policy."""
    if not programs.spares_first(stale=stale):
        return 0
    return len(np.split(np.unique(rollouts.group_ids_B), programs.minibatches)[0])


def with_old_logprobs(
    rollouts: Rollouts,
    found: PolicyLogprobs,
    *,
    old_policy: str = "behaviour",
    keep_entropy: bool = False,
) -> Rollouts:
    """Adds log-probs of the old policy: of the one that starts the step, computed by the trainer.

    Under "behaviour", a token that another policy sampled keeps the sampler's log-prob, which is
    under that policy; its expert ids are the sampler's, too.

    Args:
      rollouts: the responses.
      found: results of the pass of the policy that starts the step.
      old_policy: of the objective.
      keep_entropy: whether the objective ranks entropies.
    """
    responses = rollouts.responses
    decoupled = old_policy == "decoupled"
    own = [decoupled | (versions == rollouts.version) for versions in rollouts.column("versions")]
    columns = {
        "old_logprobs": [
            np.where(is_own, computed, response.logprobs)
            for is_own, computed, response in zip(own, found.logprobs, responses, strict=True)
        ]
    }
    if keep_entropy:
        columns["old_entropy"] = found.entropies
    if found.collisions is not None:
        columns["old_collision"] = found.collisions
    if found.expert_ids is not None:
        columns["old_expert_ids"] = [
            _chosen_ids(*pair) for pair in zip(own, found.expert_ids, responses, strict=True)
        ]
    return rollouts.enriched(**columns)


def _chosen_ids(own, computed, response):
    if own.all():
        return computed
    of_prompt = np.full(len(computed) - len(own), own.all())
    own = np.concatenate([of_prompt, own])[:, None, None]
    sampled = np.concatenate([response.prompt_expert_ids, response.expert_ids])
    return np.where(own, computed, sampled)


def largest_gap(rollouts: Rollouts, found: PolicyLogprobs) -> float:
    """Returns the largest log-prob difference of a trained token, sampler to trainer, in nats.

    Tokens that another policy sampled are left out. With experts so are the later tokens of such a
    response: the recorded experts of what comes before them are that policy's, and the sampler read
    it again with its own.
    """
    gaps = []
    for computed, r in zip(found.logprobs, rollouts.responses, strict=True):
        fresh = r.versions == rollouts.version
        if r.expert_ids is None or fresh.all():
            gaps.append(np.abs(computed - r.logprobs)[r.trained & fresh])
    return float(np.max(np.concatenate([np.zeros(0), *gaps]), initial=0.0))


def check_gap(gap: float, limit: float) -> None:
    """Refuses to train if sampler and trainer disagree.

    Raises:
      MismatchError: naming the gap, in nats, and what to do.
    """
    if not gap <= limit:
        raise MismatchError(
            f"sampler and trainer log-probs of the same tokens differ by up to {gap:.3g} nats at "
            f"the first step, more than rollout.mismatch_limit={limit:g}: in float32 this is a "
            "fault; in bfloat16 (model.products, too) rounding makes 0.2 to 0.5 and more in large "
            "runs: set the limit to 1, or model.rollout_dtype=float32"
        )


def with_advantages(
    rollouts: Rollouts,
    objective: Objective,
    width: int,
    penalty_B: np.ndarray | float = 0.0,
    part_weights: Mapping[str, float] | None = None,
) -> Rollouts:
    """Adds advantages, computed inside each group of responses to one prompt.

    Args:
      rollouts: with the log-probs that a KL term in the reward or a baseline of tokens reads.
      objective: defines the advantages.
      width: tokens of the longest sequence, rounded up to few sizes.
      penalty_B: float32, subtracted from the reward of each response.
      part_weights: part of the rewards → its weight; needed if each part is normalised by itself.
    """
    rewards_B = rollouts.rewards_B - np.float32(penalty_B)
    plan = one_a_row(
        sequence_lengths(rollouts.prompts, rollouts.responses),
        width=width,
        rows_per_microbatch=len(rewards_B),
    )

    def placed(*names):
        return [plan.place(rollouts.column(name)) for name in names]

    if objective.kl_in_reward:
        rewards_B = rewards_B + np.asarray(
            objectives.reward_adjustment(
                *placed("old_logprobs", "ref_logprobs", "trained"),
                kl_coef=objective.kl_coef,
                kl_estimator=objective.kl_estimator,
            )
        )
    found = np.asarray(
        objectives.advantages(
            objective,
            rewards_B,
            rollouts.group_ids_B,
            np.where(rollouts.counted_B, rollouts.lengths_B, 0),
            parts=_parts(rollouts, part_weights) if objective.advantage == "gdpo" else None,
            tokens=_token_statistics(objective, placed) if objective.token_advantages else None,
        ),
        np.float32,
    )
    if not objective.token_advantages:
        return rollouts.enriched(advantage=found.tolist())
    of_tokens = plan.take_last(found, rollouts.lengths_B)
    return rollouts.enriched(
        advantage=[float(values.mean()) for values in of_tokens], token_advantages=of_tokens
    )


def sign_reversal(
    rollouts: Rollouts, objective: Objective, part_weights: Mapping[str, float]
) -> dict[str, float]:
    """Measures how many advantages have another sign than without control of length.

    `length/sign_reversal` is the share of responses with a verdict that were better than their
    group and now are pushed down, or the reverse: they say the wrong thing about quality (GR³,
    arXiv 2603.10535). Without control means: rewards without those of the group and without a
    penalty, the advantage without its shaping. Empty if they do not differ; tokens are not told.

    Args:
      rollouts: with advantages.
      objective: that defined them.
      part_weights: verifier → its weight.
    """
    shaped = objective.advantage_shaping != "none"
    added = any(reward.length for reward in rollouts.column("reward"))
    if objective.token_advantages or objective.kl_in_reward or not (shaped or added):
        return {}
    plain = dataclasses.replace(objective, advantage_shaping="none")
    without = [reward.value - reward.length for reward in rollouts.column("reward")]
    before_B = np.asarray(
        objectives.advantages(
            plain,
            np.array(without, np.float32),
            rollouts.group_ids_B,
            np.where(rollouts.counted_B, rollouts.lengths_B, 0),
            parts=_parts(rollouts, part_weights) if plain.advantage == "gdpo" else None,
        )
    )
    after_B, counted_B = rollouts.advantages_B, rollouts.counted_B
    turned = np.mean((before_B * after_B < 0)[counted_B]) if counted_B.any() else 0.0
    return {"length/sign_reversal": float(turned)}


def _parts(rollouts, weights):
    rewards = rollouts.column("reward")
    values_BM = [[reward.parts[name] for name in weights] for reward in rewards]
    return objectives.RewardParts(
        np.array(values_BM, np.float32), np.array(list(weights.values()), np.float32)
    )


def _token_statistics(objective, placed):
    """The sums are over tokens that are trained on; ρ is that of truncated importance sampling."""
    mask_BT, logprobs_BT, collision_BT = placed("trained", "old_logprobs", "old_collision")
    weight_BT = None
    if "tis" in objective.corrections:
        (sampler_BT,) = placed("logprobs")
        weight_BT = corrections.tis(logprobs_BT - sampler_BT, tis_max=objective.tis_max)
    return objectives.TokenStatistics(mask_BT, logprobs_BT, collision_BT, weight_BT)


# A token whose text ends with one of these, or holds a line break, ends a sentence.
SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")


def with_segments(
    rollouts: Rollouts, objective: Objective, decode: Callable[[np.ndarray], str]
) -> Rollouts:
    """Adds the tokens that begin a segment, if the objective's ratio has segments.

    Args:
      rollouts: with the old policy's entropies, if these cut.
      objective: says what begins a segment.
      decode: tokens → text.
    """
    if objective.ratio != "segment":
        return rollouts
    if objective.segment_by == "entropy":
        entropies = rollouts.column("old_entropy")
        trained = np.concatenate(rollouts.column("trained"))
        least = np.inf
        if trained.any():
            of_trained = np.concatenate(entropies)[trained]
            least = np.quantile(of_trained, 1 - objective.segment_share)
        return rollouts.enriched(segment_starts=[values >= least for values in entropies])
    tokens = rollouts.column("tokens")
    known = np.unique(np.concatenate(tokens))
    texts = [decode(np.array([token])) for token in known]
    ends = np.array([text.rstrip(" ").endswith(SENTENCE_ENDS) or "\n" in text for text in texts])
    after = [np.roll(ends[np.searchsorted(known, each)], 1) for each in tokens]
    for starts in after:
        starts[:1] = True
    return rollouts.enriched(segment_starts=after)


def train_batch(
    rollouts: Rollouts, planner: Planner, chosen: np.ndarray, width: int
) -> tuple[TrainBatch, dict[str, float]]:
    """Returns the batch of one optimizer step in NumPy, and metrics of how full its rows are.

    Args:
      rollouts: with everything that the objective reads.
      planner: of the run.
      chosen: indices of the responses; whole groups.
      width: length of the arrays with one row per response, the same throughout a step.
    """
    prompts, responses = (
        [column[i] for i in chosen] for column in (rollouts.prompts, rollouts.responses)
    )
    plan = planner.plan(sequence_lengths(prompts, responses), width, prompts)
    known = {
        f"{name}_BT": plan.place([getattr(r, name) for r in responses])
        for name in ("old_entropy", "ref_logprobs", "token_advantages", "segment_starts")
        if getattr(responses[0], name) is not None
    }
    known |= _old_logprobs(rollouts, plan, responses)
    if _trains_on_stale(rollouts):
        ages = [np.int64(rollouts.version) - r.versions for r in responses]
        known["ages_BT"] = plan.place([x.astype(np.int32) for x in ages])
    rows = laid_rows(
        planner,
        Laid(prompts, responses, plan),
        old_ids=responses[0].old_expert_ids is not None,
    )
    objective_rows = ResponseRows(
        starts_B=plan.place_one(plan.firsts_B),
        response_mask_BT=plan.place([r.trained for r in responses]),
        advantages_B=plan.place_one(rollouts.advantages_B[chosen]),
        group_ids_B=plan.place_one(rollouts.group_ids_B[chosen]),
        sampler_logprobs_BT=plan.place([r.logprobs for r in responses]),
        **known,
    )
    return TrainBatch(rows, objective_rows), dict(plan.metrics)


def _old_logprobs(rollouts, plan, responses):
    # Of the whole step, as ages are: the first minibatch has the structure of the others.
    missing = [values is None for values in rollouts.column("old_logprobs")]
    if all(missing):
        return {}
    values = [
        np.zeros(len(r.tokens), np.float32) if r.old_logprobs is None else r.old_logprobs
        for r in responses
    ]
    known = {"old_logprobs_BT": plan.place(values)}
    if any(missing):
        known["starts_step_B"] = plan.place_one(
            np.array([r.old_logprobs is None for r in responses])
        )
    return known


def _trains_on_stale(rollouts):
    # Of the whole step: its batches then have one structure, and ages one denominator.
    responses = rollouts.responses
    return any((r.trained & (r.versions != rollouts.version)).any() for r in responses)


def train_batches(
    rollouts: Rollouts,
    planner: Planner,
    width: int,
    metrics: StepMetrics,
    *,
    epochs: int,
    minibatches: int,
    key: Sequence[int],
) -> Iterator[TrainBatch]:
    """Yields the batches of a step: `epochs` passes over its groups, cut into `minibatches` each.

    Groups come in sampled order in the first pass, and shuffled in later passes.

    Args:
      rollouts: with everything that the objective reads.
      planner: of the run.
      width: from `with_logprobs`.
      metrics: receives how full rows are.
      epochs, minibatches: of the step.
      key: integers that decide the order of later passes.
    """
    ids_B = rollouts.group_ids_B
    for epoch in range(epochs):
        groups = np.unique(ids_B)
        if epoch:
            groups = np.random.default_rng([*key, epoch]).permutation(groups)
        for part in np.split(groups, minibatches):
            chosen = np.concatenate([np.flatnonzero(ids_B == group) for group in part])
            batch, filled = train_batch(rollouts, planner, chosen, width)
            metrics.update(filled)
            yield batch
