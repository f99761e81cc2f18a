"""The training loop of the paper: RL with verifiable rewards.

A rollout step samples a group of responses to each prompt, rewards them, turns rewards into
advantages inside each group, and takes optimizer steps on the objective. The checkpoint contains
everything that decides the next step, so a killed run resumes bit for bit.
"""

import contextlib

from luspo_jax.experience import stages
from luspo_jax.experience.ahead import Beside, take
from luspo_jax.experience.groups import Rollouts
from luspo_jax.experience.rounds import Policy
from luspo_jax.hosts.guard import Preempted
from luspo_jax.hosts.preemption import Notice
from luspo_jax.learner.state import fetched, parked, refresh_reference
from luspo_jax.learner.updates import optimize
from luspo_jax.length import instruments
from luspo_jax.metrics import StepMetrics, timed
from luspo_jax.run.build import Run
from luspo_jax.run.keeping import Carried, Keeper, Outcome, Workdir, due
from luspo_jax.run.profile import Profile
from luspo_jax.types import TrainState


def train(run: Run, workdir: Workdir, profile: Profile | None = None) -> Outcome:
    """Trains from the workdir's last checkpoint to `config.num_steps` rollout steps.

    Args:
      run: the part that steps do not change.
      workdir: of the run.
      profile: traces some of the steps; None traces none.

    Raises:
      WorkdirError: the workdir was deleted or moved meanwhile.
      ConfigError: the steps to trace were taken before.
      Preempted: SIGTERM came, and what there is was saved.
    """
    try:
        return _train(run, workdir, profile or Profile())
    except Exception:
        workdir.check_there()  # a missing workdir explains the failure better
        raise


def _train(run: Run, workdir: Workdir, profile: Profile) -> Outcome:
    with Keeper(run, workdir, profile) as keeper, Beside() as beside, Notice() as notice:
        state, carried = keeper.begin()
        for step, first in keeper.steps():
            if notice.agreed():
                keeper.save(step, state, carried)
                raise Preempted
            metrics, stream = StepMetrics(), run.data.stream.get_state()
            ahead = run.apart and step + 1 < run.settings.num_steps
            try:
                state, carried, rollouts = rollout_step(
                    run,
                    state,
                    carried,
                    step,
                    metrics=metrics,
                    check_mismatch=first,
                    beside=beside if ahead else None,
                    notice=notice,
                )
            except Preempted:  # while it sampled: the state is still that of the step's beginning
                run.data.stream.set_state(stream)
                keeper.save(step, state, carried)
                raise
            keeper.keep(step, state, carried, rollouts, metrics)
        return keeper.outcome(state)


def rollout_step(
    run: Run,
    state: TrainState,
    carried: Carried,
    step: int,
    *,
    metrics: StepMetrics,
    check_mismatch: bool = False,
    beside: Beside | None = None,
    notice: Notice | None = None,
) -> tuple[TrainState, Carried, Rollouts]:
    """Takes one rollout step: sample, reward, compare inside groups, update.

    Args:
      run: the part that steps do not change.
      state: donated.
      carried: groups and running means of the previous step.
      step: rollout steps taken before this one.
      metrics: receives the step's metrics.
      check_mismatch: refuse to train if sampler and trainer disagree.
      beside: samples the next batch while this step trains; None does not.
      notice: may interrupt the sampling, before anything has changed; None does not.

    Returns:
      The new state, what the next step needs, and the responses with all their fields.
    """
    with timed(metrics, "step"):
        policy = Policy(run.rollout_params(run.policy(state)), version=step)
        with notice.interruptible() if notice else contextlib.nullcontext():
            rollouts, waiting = take(run.asker, policy, carried.waiting, step, metrics)
        following = beside and beside.begin(run.asker, policy, waiting, step)
        del policy
        length = carried.length
        if run.roles.trains:
            state, length, rollouts = _learn(
                run, state, length, rollouts, metrics=metrics, check_mismatch=check_mismatch
            )
        if following is not None:
            with timed(metrics, "wait"):
                waiting = following()
    return state, Carried(waiting, length), rollouts


def _learn(run, state, length, rollouts, *, metrics, check_mismatch):
    """Trains on rewarded responses; returns the state, the running means and the responses."""
    settings, objective, step = run.settings, run.settings.objective, rollouts.version
    limit = settings.rollout.mismatch_limit if check_mismatch else None
    lab = run.laboratory
    state = fetched(state, settings.train.offload)
    length, direction = instruments.observe(
        length, run.length, objective, rollouts.responses, run.metric, metrics
    )
    rollouts, width = stages.with_logprobs(
        rollouts, state, run.programs, run.planner, metrics, limit
    )
    with timed(metrics, "adv"):
        longest = settings.rollout.max_response_length
        penalty_B = instruments.penalty(
            run.length, rollouts.lengths_B, longest, direction=direction
        )
        weights = {**settings.reward.parts, **settings.reward.group}
        rollouts = stages.with_advantages(rollouts, objective, width, penalty_B, weights)
        metrics.update(stages.sign_reversal(rollouts, objective, settings.reward.parts))
        rollouts = stages.with_segments(rollouts, objective, run.model.decode)
    with timed(metrics, "length"):
        everything = instruments.Sampled(
            rollouts.prompts, rollouts.responses, rollouts.group_ids_B, width
        )
        sample = instruments.sample(run.length, everything, step=step, version=step)
        state = instruments.before_update(lab, run.length, state, sample, step, metrics)
    with timed(metrics, "update_actor"):
        batches = stages.train_batches(
            rollouts,
            run.planner,
            width,
            metrics,
            epochs=settings.train.num_epochs,
            minibatches=settings.train.num_minibatches,
            key=(settings.seed, step),
        )
        state, measured = optimize(
            run.programs,
            state,
            batches,
            rate=run.learning_rate(step),
            alpha_shift=length.alpha_shift,
        )
        metrics.update(measured)
        length = instruments.learn(
            length, run.length, objective, rollouts.responses, rollouts.group_ids_B, metrics
        )
        if state.ref_params is not None and due(settings.train.ref_every, step + 1):
            state = refresh_reference(state, decay=settings.train.ref_decay)
    with timed(metrics, "length"):
        length = instruments.after_update(lab, run.length, state, length, sample, step, metrics)
    return parked(state, settings.train.offload), length, rollouts
