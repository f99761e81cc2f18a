"""Saves the results of a run's steps: checkpoints, metrics, responses, evaluations, the export."""

import contextlib
import dataclasses
from collections.abc import Iterator

from tqdm import tqdm

from luspo_jax.experience import measures
from luspo_jax.experience.groups import Rollouts
from luspo_jax.experience.held_out import Evaluation
from luspo_jax.hosts import guard, processes
from luspo_jax.learner.state import parked, without_base
from luspo_jax.metrics import StepMetrics, timed
from luspo_jax.run import writers
from luspo_jax.run.beginning import Carried, begin, host_state
from luspo_jax.run.build import Run
from luspo_jax.run.checkpoint import Checkpointer
from luspo_jax.run.export import export_result
from luspo_jax.run.profile import Profile
from luspo_jax.run.workdir import Workdir
from luspo_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Held-out results of a run as (steps taken, Evaluation), oldest first."""

    evaluations: list[tuple[int, Evaluation]]
    export: str | None

    @property
    def base(self) -> Evaluation:
        """The result before training."""
        return self.evaluations[0][1]

    @property
    def final(self) -> Evaluation:
        """The result after training."""
        return self.evaluations[-1][1]


class Keeper:
    """Saves the results of a run's steps in its workdir; a context manager.

    Args:
      run: the run; its scorer and data are closed on exit.
      workdir: of the run.
      profile: of some of its steps.
    """

    def __init__(self, run: Run, workdir: Workdir, profile: Profile):
        self.run, self.workdir, self._profile = run, workdir, profile
        self._evaluations: list[tuple[int, Evaluation]] = []
        self._start, self._noted = 0, None
        self._checkpointer: Checkpointer | None = None  # of a process that trains

    def __enter__(self) -> "Keeper":
        """Opens checkpoints, scorer and data; what was opened is closed if one of them fails."""
        output = self.run.settings.output
        with contextlib.ExitStack() as stack:
            roles = self.run.roles
            if roles.trains:
                self._checkpointer = Checkpointer(
                    self.workdir.checkpoints,
                    keep_latest=output.keep_latest,
                    keep_best=output.keep_best,
                    before_commit=self.workdir.flush,
                    members=roles.train if roles.split else None,
                )
                stack.enter_context(contextlib.closing(self._checkpointer))
            stack.enter_context(self.run.scorer)
            stack.enter_context(contextlib.closing(self.run.data))
            stack.enter_context(self._profile)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        """Closes them, and whatever writes."""
        self._stack.__exit__(*error)

    def begin(self) -> tuple[TrainState, Carried]:
        """Restores the state and carried values; evaluates a new run's policy."""
        run = self.run
        with guard.phase("restore"):
            state, start, evaluations, carried = begin(
                run, self._checkpointer, self.workdir.forked_from
            )
            state = parked(state, run.settings.train.offload)
        silent = None if processes.is_writer() else True  # None: silent if there is no console
        total = run.settings.num_steps
        self._bar = self._stack.enter_context(
            tqdm(total=total, initial=start, unit="step", leave=False, disable=silent)
        )
        writer = writers.writer(run, self.workdir, self._bar)
        self._writer = self._stack.enter_context(contextlib.closing(writer))
        # A run without a checkpoint starts over, whatever an earlier attempt wrote.
        self._writer.truncate_after(start if evaluations else start - 1)
        self.workdir.drop_after(start)
        if not evaluations:
            with guard.phase("evaluate"):
                evaluations = [(start, run.evaluate(run.policy(state)))]
            self._writer.write(start, self._held_out_metrics(evaluations[0][1]))
        self._evaluations, self._start = evaluations, start
        return state, carried

    def steps(self) -> Iterator[tuple[int, bool]]:
        """Yields (rollout steps taken, whether it is the first here) for each remaining step."""
        self._profile.check_ahead(self._start)
        for step in range(self._start, self.run.settings.num_steps):
            guard.at_step(step + 1)
            self.workdir.check_there()
            self._note()
            with self._profile.step(step + 1):
                yield step, step == self._start

    def keep(
        self,
        step: int,
        state: TrainState,
        carried: Carried,
        rollouts: Rollouts,
        metrics: StepMetrics,
    ) -> None:
        """Measures, evaluates, writes and checkpoints after a step, each if due.

        A process that only samples takes part in the evaluation alone.
        """
        run, taken, measured = self.run, step + 1, None
        if run.roles.trains:
            metrics.update(measures.metrics(rollouts, correct=run.metric))
            metrics.update(writers.speed_metrics(metrics, rollouts))
        output, last = run.settings.output, taken == run.settings.num_steps
        if last or due(run.settings.eval.every, taken):
            with timed(metrics, "testing"):
                measured = run.evaluate(run.policy(state))
            metrics.update(self._held_out_metrics(measured))
            self._evaluations.append((taken, measured))
        self._bar.update()
        if not run.roles.trains:
            return
        if due(output.dump_every, taken):
            self._writer.write_rollouts(taken, measures.records(rollouts))
        if due(output.completions_every, taken):
            self._writer.show_completions(taken, measures.records(rollouts))
        self._writer.write(taken, {"training/global_step": taken, **metrics.result()})
        if last or due(output.checkpoint_every, taken):
            self._save(taken, state, carried, measured.accuracy if measured else None)

    def save(self, taken: int, state: TrainState, carried: Carried) -> None:
        """Checkpoints between two steps, unless that was done, and waits until it is written."""
        if self._checkpointer is None:
            return
        if self._checkpointer.latest_step() != taken:
            self._save(taken, state, carried, None)
        self._complete()
        self._bar.write(f"asked to end: step {taken} is saved, and the same command goes on")

    def _save(self, taken, state, carried, score):
        host, waiting = host_state(self.run, self._evaluations, carried)
        with guard.phase("checkpoint"):
            self._checkpointer.save(taken, without_base(state), host, waiting, metric=score)

    def _note(self):
        """Notes the newest complete checkpoint, if it is a new one."""
        written = self._checkpointer and self._checkpointer.written()
        if written is not None and written != self._noted:
            self.workdir.note_checkpoint(written)
            self._noted = written

    def _complete(self):
        """Waits for the checkpoint that is being written."""
        if self._checkpointer is not None:
            with guard.phase("checkpoint"):
                self._checkpointer.wait()
            self._note()

    def outcome(self, state: TrainState) -> Outcome:
        """Returns the held-out results; exports the policy if asked."""
        run, export = self.run, None
        self._complete()
        if run.settings.output.export:

            def write():
                return export_result(run, state, self.workdir.path)

            with guard.phase("export"):
                if run.roles.trained(write, "export"):
                    export = f"{self.workdir.name}/export"
        return Outcome(self._evaluations, export)

    def _held_out_metrics(self, measured):
        data = self.run.settings.data
        name = data.eval_name or data.name
        return {
            f"val-{'core' if key.startswith('acc/mean') else 'aux'}/{name}/{key}": value
            for key, value in measured.metrics.items()
        }


def due(every: int, taken: int) -> bool:
    """Returns whether an action with this interval in steps is due now; 0 is never."""
    return every > 0 and taken % every == 0
