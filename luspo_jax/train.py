"""The training loop: RL with verifiable rewards, as the paper tells it.

A rollout step samples a group of responses to each prompt, rewards them, turns rewards into
advantages inside each group, and takes optimizer steps on the objective. Everything that decides
the next step is in the checkpoint, so that a run that was killed goes on bit for bit.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from luspo_jax import (
    batches,
    evaluate,
    experience,
    instruments,
    objectives,
    optimizer,
    shaping,
)
from luspo_jax.evaluate import Evaluation
from luspo_jax.experience import Group, Rollouts
from luspo_jax.hosts import guard, processes
from luspo_jax.metrics import StepMetrics, timed
from luspo_jax.rollout import Request, RolloutStats
from luspo_jax.run import writers
from luspo_jax.run.beginning import Carried, begin, host_state
from luspo_jax.run.build import Run
from luspo_jax.run.checkpoint import Checkpointer
from luspo_jax.run.export import export_policy
from luspo_jax.run.workdir import Workdir
from luspo_jax.types import TrainBatch, TrainState
from luspo_jax.update import (
    fetched,
    parked,
    put_rows,
    refresh_reference,
    update_step,
)


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
                evaluations = [(start, held_out(run, state))]
            writer.write(start, _held_out_metrics(run, evaluations[0][1]))
        for step in range(start, num_steps):
            guard.at_step(step + 1)
            workdir.check_there()
            metrics = StepMetrics()
            state, carried, rollouts, advantages_B = rollout_step(
                run, state, carried, step, metrics=metrics, check_mismatch=step == start
            )
            taken = step + 1
            measured = None
            if taken == num_steps or _due(run.config.eval.every, taken):
                with timed(metrics, "testing"):
                    measured = held_out(run, state)
                metrics.update(_held_out_metrics(run, measured))
                evaluations.append((taken, measured))
            if _due(output.dump_every, taken):
                writer.write_rollouts(taken, experience.records(rollouts, advantages_B))
            writer.write(taken, {"training/global_step": taken, **metrics.result()})
            if taken == num_steps or _due(output.checkpoint_every, taken):
                host = host_state(run, evaluations, carried)
                score = measured.accuracy if measured else None
                with guard.phase("checkpoint"):
                    checkpointer.save(taken, state, host, metric=score)
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
) -> tuple[TrainState, Carried, Rollouts, np.ndarray]:
    """One rollout step: sample, reward, compare inside groups, update.

    Args:
      run: what does not change.
      state: donated.
      carried: groups and running means of the step before.
      step: rollout steps taken before this one.
      metrics: receives the step's metrics.
      check_mismatch: refuse to go on where sampler and trainer disagree.

    Returns:
      The new state, what is carried over, the responses, and their advantages.
    """
    offload = run.config.train.offload
    with timed(metrics, "step"):
        rollouts, surplus = collect(run, state.params, step, carried.surplus, metrics)
        state = fetched(state, offload)
        length, flagged = instruments.observe(run, carried.length, rollouts, metrics)
        batch = batches.train_batch(run, rollouts)
        with timed(metrics, "old_log_prob"):
            batch = batches.with_old_logprobs(run, state, rollouts, batch, metrics, check_mismatch)
        with timed(metrics, "ref"):
            batch = batches.with_ref_logprobs(run, state, rollouts, batch)
        with timed(metrics, "adv"):
            batch = batches.with_advantages(run, rollouts, batch, shorten=flagged)
        with timed(metrics, "length"):
            sample = instruments.sample(run, rollouts, batch, step)
            state = instruments.before_update(run, state, sample, step, metrics)
        with timed(metrics, "update_actor"):
            state = optimize(
                run, state, rollouts, batch, step, metrics, alpha_shift=length.alpha_shift
            )
            if state.ref_params is not None and _due(run.config.train.ref_every, step + 1):
                state = refresh_reference(state, decay=run.config.train.ref_decay)
        with timed(metrics, "length"):
            length = instruments.after_update(run, state, length, sample, step, metrics)
        state = parked(state, offload)
    metrics.update(experience.metrics(rollouts, batch.advantages_B, correct=run.metric))
    metrics.update(writers.speed_metrics(metrics, rollouts))
    return state, Carried(surplus, length), rollouts, batch.advantages_B


def collect(
    run: Run, params: Any, step: int, surplus: Sequence[Group], metrics: StepMetrics
) -> tuple[Rollouts, list[Group]]:
    """A batch of scored groups, and what is carried over to the next step."""
    config, used = run.config, []
    size = config.rollout.prompts_per_step
    weights = run.rollout_params(params)

    def sample() -> list[Group]:
        # The same prompts on all processes, of which each samples and scores its own share.
        asked = run.data.stream.next_prompts(size)
        used.extend(prompt.prompt_id for prompt in asked)
        own = processes.share(size)
        prompts, noise_ids = asked[own], _noise_ids(used)[-size:][own]
        with timed(metrics, "gen"):
            responses, stats = run.sampler.generate(
                weights,
                [
                    Request(i, prompt.tokens, prompt.images)
                    for i, prompt in zip(noise_ids, prompts, strict=True)
                ],
                group_size=config.rollout.group_size,
                seed=config.seed,
                step=step,
            )
        with timed(metrics, "reward"):
            groups = experience.scored(
                prompts,
                responses,
                scorer=run.scorer,
                decode=run.model.decode,
                max_length=config.rollout.max_response_length,
            )
        with timed(metrics, "gather"):
            # Every process has the prompts, and their images are large.
            sent = [dataclasses.replace(group, prompt=None) for group in groups]
            parts = processes.gather((sent, stats))
        metrics.update(_rollout_metrics([stats for _, stats in parts]))
        groups = [group for groups, _ in parts for group in groups]
        return [
            dataclasses.replace(group, prompt=prompt)
            for group, prompt in zip(groups, asked, strict=True)
        ]

    collected = shaping.collect(
        sample,
        surplus,
        shaping=run.shaping,
        num_groups=config.rollout.prompts_per_step,
        part=run.metric,
    )
    metrics.update(collected.counts)
    metrics.update(run.data.stream.metrics)
    return Rollouts(collected.groups), collected.surplus


def optimize(
    run: Run,
    state: TrainState,
    rollouts: Rollouts,
    batch: TrainBatch,
    step: int,
    metrics: StepMetrics,
    *,
    alpha_shift: float = 0.0,
) -> TrainState:
    """Takes the step's optimizer steps: `num_epochs` passes, `num_minibatches` each."""
    settings = run.config.train
    rate = optimizer.learning_rate(
        step, peak=settings.learning_rate, warmup_steps=settings.warmup_steps
    )
    taken = []
    for epoch in range(settings.num_epochs):
        for rows in _minibatches(run, batch.group_ids_B, step, epoch):
            minibatch = batches.minibatch(run, rollouts, batch, rows, metrics)
            minibatch = put_rows(minibatch, run.rule.logprobs.how.layout)
            state, measured = update_step(
                state, minibatch, np.float32(rate), np.float32(alpha_shift), rule=run.rule
            )
            taken.append(measured)
    # Summed over all updates before any division, so that ratios of sums stay right.
    total = jax.tree.map(lambda *xs: np.sum(np.asarray(xs, np.float64)), *jax.device_get(taken))
    skipped = total.pop("actor/skipped_updates")[0]
    metrics.update({name: float(x) for name, x in objectives.metric_means(total).items()})
    metrics.update({"actor/lr": rate, "actor/skipped_updates": skipped})
    return state


def _rollout_metrics(stats: Sequence[RolloutStats]) -> dict[str, float]:
    """Sums over the processes' samplers; the mean of how well they were used."""
    names = ("decode_steps", "prefill_tokens", "prefill_calls", "generated_tokens")
    return {
        **{f"rollout/{name}": sum(getattr(s, name) for s in stats) for name in names},
        "rollout/slot_utilisation": sum(s.slot_utilisation for s in stats) / len(stats),
    }


def held_out(run: Run, state: TrainState) -> Evaluation:
    """Accuracy and length on the held-out problems; every call faces the same noise."""
    config = run.config
    return evaluate.evaluate(
        run.held_out_sampler,
        run.rollout_params(state.params),
        run.data.held_out,
        run.scorer,
        decode=run.model.decode,
        metric=run.metric,
        num_samples=config.eval.num_samples,
        seed=config.eval.seed,
    )


def _due(every: int, taken: int) -> bool:
    return every > 0 and taken % every == 0


def _noise_ids(prompt_ids: Sequence[int]) -> list[int]:
    """Ids that key the sampling noise: the prompt's own, or another one where a small dataset
    brings a prompt twice in one step, so that its groups differ."""
    seen: dict[int, int] = {}
    stride = max(prompt_ids) + 1
    ids = []
    for prompt_id in prompt_ids:
        occurrence = seen.get(prompt_id, 0)
        seen[prompt_id] = occurrence + 1
        ids.append(prompt_id + occurrence * stride)
    return ids


def _minibatches(run, group_ids_B, step, epoch) -> Iterator[np.ndarray]:
    """Rows of each minibatch: whole groups, in sampled order first and shuffled in later passes."""
    groups = np.unique(group_ids_B)
    if epoch:
        groups = np.random.default_rng([run.config.seed, step, epoch]).permutation(groups)
    for part in np.split(groups, run.config.train.num_minibatches):
        yield np.concatenate([np.flatnonzero(group_ids_B == group) for group in part])


def _held_out_metrics(run: Run, measured: Evaluation) -> dict[str, float]:
    name = run.config.data.eval_name or run.config.data.name
    low, high = measured.accuracy_ci95
    return {
        f"val-core/{name}/acc/mean@{measured.num_samples}": measured.accuracy,
        f"val-aux/{name}/acc/ci95_low": low,
        f"val-aux/{name}/acc/ci95_high": high,
        f"val-aux/{name}/response_length/mean": measured.mean_length,
        f"val-aux/{name}/response_length/clip_ratio": measured.truncated,
        f"val-aux/{name}/unjudged": measured.unjudged,
    }
