"""Supervised fine-tuning: raises the likelihood of demonstrated answers, token by token.

The step is RL's with A = 1 (`learner.demonstrations`), and the checkpoint contains everything that
decides the next one, so a killed run resumes bit for bit.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

from tqdm import tqdm

from luspo_jax.hosts import guard, processes
from luspo_jax.hosts.guard import Preempted
from luspo_jax.hosts.preemption import Notice
from luspo_jax.learner import demonstrations
from luspo_jax.learner.state import abstract_state, initial_state, with_base, without_base
from luspo_jax.metrics import StepMetrics, timed
from luspo_jax.run import writers
from luspo_jax.run.checkpoint import Checkpointer
from luspo_jax.run.export import export_result
from luspo_jax.run.keeping import due
from luspo_jax.run.sft.build import SftRun
from luspo_jax.run.sft.measure import HeldOut, measure
from luspo_jax.run.workdir import Workdir
from luspo_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class SftOutcome:
    """Held-out figures of a run as (steps taken, figures), oldest first, and the export."""

    evaluations: list[tuple[int, HeldOut]]
    export: str | None

    @property
    def base(self) -> HeldOut:
        """The figures before training."""
        return self.evaluations[0][1]

    @property
    def final(self) -> HeldOut:
        """The figures after training."""
        return self.evaluations[-1][1]


def fine_tune(run: SftRun, workdir: Workdir) -> SftOutcome:
    """Trains from the workdir's last checkpoint to `config.num_steps` optimizer steps.

    Raises:
      WorkdirError: the workdir was deleted or moved meanwhile.
      Preempted: SIGTERM came, and what there is was saved.
    """
    try:
        with _Keeper(run, workdir) as keeper, Notice() as notice:
            state = keeper.begin()
            for step in keeper.steps():
                if notice.agreed():
                    keeper.save(step, state)
                    raise Preempted
                metrics = StepMetrics()
                state = take_step(run, state, step, metrics)
                keeper.keep(step, state, metrics)
            return keeper.outcome(state)
    except Exception:
        workdir.check_there()  # a missing workdir explains the failure better
        raise


def take_step(run: SftRun, state: TrainState, step: int, metrics: StepMetrics) -> TrainState:
    """Takes one optimizer step on the next demonstrations.

    Args:
      run: the part that steps do not change; its stream moves on.
      state: donated.
      step: steps taken before this one.
      metrics: receives the step's metrics.
    """
    with timed(metrics, "step"), timed(metrics, "update_actor"):
        state, measured = demonstrations.update(
            run.programs,
            run.planner,
            state,
            run.data.stream.take(run.settings.train.batch_size),
            rate=run.learning_rate(step),
        )
    metrics.update(measured)
    metrics.add("training/epoch", run.data.stream.epoch)
    metrics.update(writers.token_speed(metrics, measured["sft/tokens"]))
    return state


class _Keeper:
    """Saves the results of a run's steps in its workdir; a context manager."""

    def __init__(self, run: SftRun, workdir: Workdir):
        self.run, self.workdir = run, workdir
        self._evaluations: list[tuple[int, HeldOut]] = []
        self._start, self._noted = 0, None

    def __enter__(self) -> "_Keeper":
        output = self.run.settings.output
        with contextlib.ExitStack() as stack:
            self._checkpointer = Checkpointer(
                self.workdir.checkpoints,
                keep_latest=output.keep_latest,
                keep_best=output.keep_best,
                before_commit=self.workdir.flush,
            )
            stack.enter_context(contextlib.closing(self._checkpointer))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def begin(self) -> TrainState:
        """Restores the state, or starts a new run and measures its policy."""
        run = self.run
        with guard.phase("restore"):
            state, start = self._begin()
        silent = None if processes.is_writer() else True  # None: silent if there is no console
        self._bar = self._stack.enter_context(
            tqdm(
                total=run.settings.num_steps,
                initial=start,
                unit="step",
                leave=False,
                disable=silent,
            )
        )
        writer = writers.writer(run, self.workdir, self._bar)
        self._writer = self._stack.enter_context(contextlib.closing(writer))
        # A run without a checkpoint starts over, whatever an earlier attempt wrote.
        self._writer.truncate_after(start if self._evaluations else start - 1)
        self.workdir.drop_after(start)
        if not self._evaluations:
            self._writer.write(start, self._measured(start, state).metrics)
        self._start = start
        return state

    def _begin(self):
        latest = self._checkpointer.latest_step()
        processes.agree({"the checkpoint to continue from": latest})
        if latest is None:
            params, base = self.run.initial_parts()
            return with_base(initial_state(params, self.run.rule), base), 0
        state, host, _ = self._checkpointer.restore(latest, abstract_state(self.run.rule))
        if self.run.rule.logprobs.how.adapter is not None:
            state = with_base(state, self.run.initial_parts()[1])
        self.run.data.stream.set_state(host["stream"])
        self._evaluations = [(step, HeldOut(**values)) for step, values in host["evaluations"]]
        return state, latest

    def steps(self) -> Iterator[int]:
        """Yields the steps taken before each remaining one."""
        for step in range(self._start, self.run.settings.num_steps):
            guard.at_step(step + 1)
            self.workdir.check_there()
            self._note()
            yield step

    def keep(self, step: int, state: TrainState, metrics: StepMetrics) -> None:
        """Measures, writes and checkpoints after a step, each if due."""
        settings, taken, measured = self.run.settings, step + 1, None
        last = taken == settings.num_steps
        if last or due(settings.eval.every, taken):
            with timed(metrics, "testing"):
                measured = self._measured(taken, state)
            metrics.update(measured.metrics)
        self._writer.write(taken, {"training/global_step": taken, **metrics.result()})
        if last or due(settings.output.checkpoint_every, taken):
            # The best is the largest.
            score = -measured.loss if measured and measured.loss is not None else None
            self._save(taken, state, score)
        self._bar.update()

    def save(self, taken: int, state: TrainState) -> None:
        """Checkpoints between two steps, unless that was done, and waits until it is written."""
        if self._checkpointer.latest_step() != taken:
            self._save(taken, state, None)
        self._complete()
        self._bar.write(f"asked to end: step {taken} is saved, and the same command goes on")

    def _save(self, taken, state, score):
        host = {
            "stream": self.run.data.stream.get_state(),
            "evaluations": [(n, dataclasses.asdict(found)) for n, found in self._evaluations],
        }
        with guard.phase("checkpoint"):
            self._checkpointer.save(taken, without_base(state), host, metric=score)

    def _complete(self):
        """Waits for the checkpoint that is being written."""
        with guard.phase("checkpoint"):
            self._checkpointer.wait()
        self._note()

    def _note(self):
        """Notes the newest complete checkpoint, if it is a new one."""
        written = self._checkpointer.written()
        if written is not None and written != self._noted:
            self.workdir.note_checkpoint(written)
            self._noted = written

    def _measured(self, taken: int, state: TrainState) -> HeldOut:
        with guard.phase("evaluate"):
            found, records = measure(self.run, state)
        self._evaluations.append((taken, found))
        if records:
            self._writer.write_rollouts(taken, records, writers.ANSWERS)
            self._writer.show_completions(taken, records)
        return found

    def outcome(self, state: TrainState) -> SftOutcome:
        """Returns the held-out figures; exports the policy if asked."""
        run, export = self.run, None
        self._complete()
        if run.settings.output.export:
            with guard.phase("export"):
                if export_result(run, state, self.workdir.path):
                    export = f"{self.workdir.name}/export"
        return SftOutcome(self._evaluations, export)
