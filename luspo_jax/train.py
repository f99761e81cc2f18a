"""The training loop: RL with verifiable rewards, as the paper tells it.

A rollout step samples a group of responses to each prompt, rewards them, turns rewards into
advantages inside each group, and takes optimizer steps on the objective. Everything that decides
the next step is in the checkpoint, so that a run that was killed goes on bit for bit.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from tqdm import tqdm

from luspo_jax import objectives
from luspo_jax.experience import held_out, measures, shaping, stages
from luspo_jax.experience.groups import Group, Rollouts
from luspo_jax.experience.held_out import Evaluation
from luspo_jax.experience.rounds import rounds
from luspo_jax.hosts import guard, processes
from luspo_jax.learner import optimizer
from luspo_jax.learner.offload import fetched, parked
from luspo_jax.learner.policies import laid, policy_logprobs, sequence_lengths
from luspo_jax.learner.rows import put
from luspo_jax.learner.state import refresh_reference
from luspo_jax.length import instruments
from luspo_jax.length.laboratory import Sampled
from luspo_jax.metrics import StepMetrics, timed
from luspo_jax.run import writers
from luspo_jax.run.beginning import Carried, begin, host_state
from luspo_jax.run.build import Run
from luspo_jax.run.checkpoint import Checkpointer
from luspo_jax.run.export import export_policy
from luspo_jax.run.workdir import Workdir
from luspo_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to: held-out results as (steps taken, Evaluation), oldest first."""

    evaluations: list[tuple[int, Evaluation]]
    export: pathlib.Path | None

    @property
    def base(self) -> Evaluation:
        """Before training."""
        return self.evaluations[0][1]

    @property
    def final(self) -> Evaluation:
        """After training."""
        return self.evaluations[-1][1]


def train(run: Run, workdir: Workdir) -> Outcome:
    """Trains from where the workdir stands to `config.num_steps` rollout steps.

    Raises:
      WorkdirError: the workdir was deleted or moved meanwhile.
    """
    try:
        return _train(run, workdir)
    except Exception:
        workdir.check_there()  # else this is not why it failed
        raise


def _train(run: Run, workdir: Workdir) -> Outcome:
    output, num_steps = run.config.output, run.config.num_steps
    checkpointer = Checkpointer(
        workdir.path / "checkpoints", keep_latest=output.keep_latest, keep_best=output.keep_best
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(checkpointer))
        stack.enter_context(run.scorer)
        stack.enter_context(contextlib.closing(run.data))
        with guard.phase("restore"):
            state, start, evaluations, carried = begin(run, checkpointer, workdir.forked_from)
            state = parked(state, run.config.train.offload)
        silent = None if processes.is_writer() else True  # None: silent where there is no console
        bar = stack.enter_context(
            tqdm(total=num_steps, initial=start, unit="step", leave=False, disable=silent)
        )
        writer = stack.enter_context(contextlib.closing(writers.writer(run, workdir, bar)))
        # A run without a checkpoint starts over, whatever an earlier attempt has written.
        writer.truncate_after(start if evaluations else start - 1)
        if not evaluations:
            with guard.phase("evaluate"):
                evaluations = [(start, evaluate(run, state))]
            writer.write(start, _held_out_metrics(run, evaluations[0][1]))
        for step in range(start, num_steps):
            guard.at_step(step + 1)
            workdir.check_there()
            metrics = StepMetrics()
            state, carried, rollouts = rollout_step(
                run, state, carried, step, metrics=metrics, check_mismatch=step == start
            )
            taken = step + 1
            measured = None
            if taken == num_steps or _due(run.config.eval.every, taken):
                with timed(metrics, "testing"):
                    measured = evaluate(run, state)
                metrics.update(_held_out_metrics(run, measured))
                evaluations.append((taken, measured))
            if _due(output.dump_every, taken):
                writer.write_rollouts(taken, measures.records(rollouts))
            writer.write(taken, {"training/global_step": taken, **metrics.result()})
            if taken == num_steps or _due(output.checkpoint_every, taken):
                host, waiting = host_state(run, evaluations, carried)
                score = measured.accuracy if measured else None
                with guard.phase("checkpoint"):
                    checkpointer.save(taken, state, host, waiting, metric=score)
                    workdir.note_checkpoint(taken)
            bar.update()
        export = workdir.path / "export" if output.export else None
        if export is not None:
            with guard.phase("export"):
                export_policy(run.config, run.model, state.params, export, own=True)
    return Outcome(evaluations, export)


def rollout_step(
    run: Run,
    state: TrainState,
    carried: Carried,
    step: int,
    *,
    metrics: StepMetrics,
    check_mismatch: bool = False,
) -> tuple[TrainState, Carried, Rollouts]:
    """Takes one rollout step: sample, reward, compare inside groups, update.

    Args:
      run: what does not change.
      state: donated.
      carried: groups and running means of the step before.
      step: rollout steps taken before this one.
      metrics: receives the step's metrics.
      check_mismatch: refuse to go on where sampler and trainer disagree.

    Returns:
      The new state, what is carried over, and the responses with all that is known of them.
    """
    settings, objective, lab = run.length, run.rule.objective, run.laboratory
    offload = run.config.train.offload
    with timed(metrics, "step"):
        rollouts, surplus = collect(run, state, step, carried.surplus, metrics)
        state = fetched(state, offload)
        length, flagged = instruments.observe(
            carried.length, settings, objective, rollouts.responses, run.metric, metrics
        )
        rollouts, width = with_logprobs(run, state, rollouts, metrics, check_mismatch)
        with timed(metrics, "adv"):
            penalty_B = instruments.penalty(
                settings,
                rollouts.lengths_B,
                run.config.rollout.max_response_length,
                flagged=flagged,
            )
            rollouts = stages.with_advantages(rollouts, objective, width, penalty_B)
        with timed(metrics, "length"):
            everything = Sampled(rollouts.prompts, rollouts.responses, rollouts.group_ids_B, width)
            sample = instruments.sample(settings, everything, step=step, version=step)
            state = instruments.before_update(lab, settings, state, sample, step, metrics)
        with timed(metrics, "update_actor"):
            state = optimize(run, state, rollouts, step, metrics, alpha_shift=length.alpha_shift)
            if state.ref_params is not None and _due(run.config.train.ref_every, step + 1):
                state = refresh_reference(state, decay=run.config.train.ref_decay)
        with timed(metrics, "length"):
            length = instruments.after_update(lab, settings, state, length, sample, step, metrics)
        state = parked(state, offload)
    metrics.update(measures.metrics(rollouts, correct=run.metric))
    metrics.update(writers.speed_metrics(metrics, rollouts))
    return state, Carried(surplus, length), rollouts


def collect(
    run: Run, state: TrainState, step: int, surplus: Sequence[Group], metrics: StepMetrics
) -> tuple[Rollouts, list[Group]]:
    """A batch of judged groups, and what is carried over to the next step."""
    weights = run.rollout_params(state.params)
    collected = shaping.collect(
        rounds(run.asker, weights, step, metrics),
        surplus,
        shaping=run.shaping,
        num_groups=run.asker.num_prompts,
        part=run.metric,
    )
    metrics.update(collected.counts)
    metrics.update(run.data.stream.metrics)
    return Rollouts(collected.groups, version=step), collected.surplus


def with_logprobs(
    run: Run, state: TrainState, rollouts: Rollouts, metrics: StepMetrics, check_mismatch: bool
) -> tuple[Rollouts, int]:
    """Adds log-probs of the old and the reference policy, where the objective reads them.

    Returns:
      The rollouts, and the width of arrays that have one row a response.
    """
    programs, planner = run.programs, run.planner
    passes = programs.passes(stale=not rollouts.fresh_B.all(), check=check_mismatch)
    plans = laid(planner, rollouts.prompts, rollouts.responses)
    with timed(metrics, "old_log_prob"):
        if "old" in passes:
            found = policy_logprobs(state, passes["old"], plans, planner)
            gap = stages.largest_gap(rollouts, found)
            metrics.add("rollout_corr/max_abs_diff", gap)
            if check_mismatch:
                stages.check_gap(gap, run.config.rollout.mismatch_limit)
            if passes["old"].kept:
                rollouts = stages.with_old_logprobs(
                    rollouts, found, keep_entropy=programs.keeps_entropy
                )
                if found.agreement is not None:  # else the update's own pass says it
                    metrics.add("router/agreement/sampler_old", found.agreement)
    with timed(metrics, "ref"):
        if "ref" in passes:
            found = policy_logprobs(state, passes["ref"], plans, planner)
            rollouts = rollouts.enriched(ref_logprobs=found.logprobs)
    return rollouts, plans[0].plan.width


def optimize(
    run: Run,
    state: TrainState,
    rollouts: Rollouts,
    step: int,
    metrics: StepMetrics,
    *,
    alpha_shift: float = 0.0,
) -> TrainState:
    """Takes the step's optimizer steps: `num_epochs` passes, `num_minibatches` each."""
    settings, planner = run.config.train, run.planner
    rate = optimizer.learning_rate(
        step, peak=settings.learning_rate, warmup_steps=settings.warmup_steps
    )
    width = planner.width(sequence_lengths(rollouts.prompts, rollouts.responses))
    taken = []
    for epoch in range(settings.num_epochs):
        for chosen in _minibatches(run, rollouts.group_ids_B, step, epoch):
            batch, filled = stages.train_batch(rollouts, planner, chosen, width)
            metrics.update(filled)
            batch = put(batch, planner.layout)
            state, measured = run.programs.update(state, batch, rate, alpha_shift)
            taken.append(measured)
    # Summed over all updates before any division, so that ratios of sums stay right.
    total = jax.tree.map(lambda *xs: np.sum(np.asarray(xs, np.float64)), *jax.device_get(taken))
    skipped = total.pop("actor/skipped_updates")[0]
    metrics.update({name: float(x) for name, x in objectives.metric_means(total).items()})
    metrics.update({"actor/lr": rate, "actor/skipped_updates": skipped})
    return state


def evaluate(run: Run, state: TrainState) -> Evaluation:
    """Accuracy and length on the held-out problems; every call faces the same noise."""
    groups = held_out.ask(
        run.held_out_sampler,
        run.rollout_params(state.params),
        run.data.held_out,
        run.scorer,
        decode=run.model.decode,
        num_samples=run.config.eval.num_samples,
        seed=run.config.eval.seed,
    )
    return held_out.summarize(groups, metric=run.metric)


def _due(every: int, taken: int) -> bool:
    return every > 0 and taken % every == 0


def _minibatches(run, group_ids_B, step, epoch) -> Iterator[np.ndarray]:
    """Rows of each minibatch: whole groups, in sampled order first and shuffled in later passes."""
    groups = np.unique(group_ids_B)
    if epoch:
        groups = np.random.default_rng([run.config.seed, step, epoch]).permutation(groups)
    for part in np.split(groups, run.config.train.num_minibatches):
        yield np.concatenate([np.flatnonzero(group_ids_B == group) for group in part])


def _held_out_metrics(run: Run, measured: Evaluation) -> dict[str, float]:
    data = run.config.data
    kinds = {name: "core" if name.startswith("acc/mean") else "aux" for name in measured.metrics}
    return {
        f"val-{kinds[name]}/{data.eval_name or data.name}/{name}": value
        for name, value in measured.metrics.items()
    }
