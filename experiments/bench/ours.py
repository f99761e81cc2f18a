"""Our side of a benchmark: the training loop's own rollout step, on the benchmark's task."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.bench import workload as workloads
from experiments.bench.step_task import PATTERN, Task, write_problems
from experiments.bench.turns import Step
from luspo_jax import train
from luspo_jax.metrics import StepMetrics
from luspo_jax.run import beginning, fields
from luspo_jax.run.build import build


class Ours:
    """Rollout steps of `luspo_jax.train`, one per call."""

    def __init__(
        self, task: Task, folder: pathlib.Path, *, settings: Mapping[str, Any], seed: int = 0
    ):
        """Builds the run.

        Args:
          task: what a step does.
          folder: for its files.
          settings: fields of the configuration.
          seed: of sampling.
        """
        self._task = task
        run = build(configuration(task, folder, settings=settings, seed=seed))
        # Every response has the length that it is told, whatever the model's files say of its end.
        run.sampler.sampling = dataclasses.replace(run.sampler.sampling, stop_token_ids=())
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(run.scorer)
        limits = dict(zip(task.prompt_tokens, task.lengths, strict=True))
        self._run = dataclasses.replace(run, sampler=Limited(run.sampler, limits))
        self._state = beginning.begin_state(self._run)
        self._before = jax.device_get(self._state.params["embedding"])
        self._carried, self._steps = beginning.Carried(), 0

    def step(self) -> Step:
        """Samples, rewards, updates.

        The update includes computing old log-probs, if the step needs them.

        Raises:
          RuntimeError: the step did not do all the work.
        """
        metrics = StepMetrics()
        used, started = time.process_time(), time.perf_counter()
        self._state, self._carried, rollouts = train.rollout_step(
            self._run,
            self._state,
            self._carried,
            self._steps,
            metrics=metrics,
            check_mismatch=self._steps == 0,
        )
        seconds = time.perf_counter() - started
        cores = (time.process_time() - used) / seconds
        self._steps += 1
        values = metrics.result()
        if values["actor/skipped_updates"]:
            raise RuntimeError("the update was skipped: its gradient was not finite")
        update = sum(values[f"timing_s/{phase}"] for phase in ("old_log_prob", "ref"))
        phases = {
            "generation": values["timing_s/gen"],
            "update": update + values["timing_s/update_actor"],
        }
        moved = np.any(jax.device_get(self._state.params["embedding"]) != self._before)
        return Step(seconds, cores, phases, self._in_order(rollouts), bool(moved))

    def close(self) -> None:
        """Ends the side."""
        self._stack.close()

    def _in_order(self, rollouts):
        """Returns the lengths in the order of the task's prompts."""
        found = {}
        for prompt, length in zip(rollouts.prompts, rollouts.lengths_B.tolist(), strict=True):
            found.setdefault(tuple(map(int, prompt.tokens)), []).append(length)
        return [n for tokens in self._task.prompt_tokens for n in found.get(tokens, [])]


class Limited:
    """An engine whose responses have the lengths of a task, otherwise that of a run."""

    def __init__(self, engine, limits: Mapping[tuple[int, ...], tuple[int, ...]]):
        self._engine, self._limits = engine, limits

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def generate(self, params, requests, **options):
        """Samples as the engine does.

        Raises:
          KeyError: a prompt that is not the task's, as the other sides read it.
        """
        limited = [
            dataclasses.replace(r, limit=self._limits[tuple(map(int, r.tokens))]) for r in requests
        ]
        return self._engine.generate(params, limited, **options)


def configuration(task: Task, folder: pathlib.Path, *, settings: Mapping[str, Any], seed: int = 0):
    """Returns the run's configuration for a task; what is not named is default."""
    folder.mkdir(exist_ok=True)
    problems = folder / workloads.PROMPTS
    write_problems(task, problems)
    config = fields.default_config()
    config.reward.parts = {"exact": 1.0}
    config.reward.options = {"exact": {"pattern": PATTERN}}
    chosen = {
        "seed": seed,
        "model.path": str(task.folder),
        "model.stop_token_ids": "none",  # the synthetic model has no end, and says so
        "model.dtype": task.dtype,
        "model.rollout_dtype": task.dtype,
        "data.name": "file",
        "data.path": str(problems),
        "data.eval_path": str(problems),
        "data.cache_dir": str(folder / "datasets"),
        "data.template": "{problem}",
        "data.max_prompt_length": task.longest_prompt,
        "rollout.prompts_per_step": len(task.prompts),
        "rollout.group_size": task.group,
        "rollout.max_response_length": task.longest,
        "rollout.num_slots": len(task.flat_lengths),
        "objective.preset": "luspo",
        "train.num_length_buckets": 1,
        "train.learning_rate": workloads.LEARNING_RATE,
        "train.warmup_steps": 0,
        "eval.num_problems": 1,
    }
    if task.dtype != "float32":
        chosen["rollout.mismatch_limit"] = 0.5
    fields.assign(config, chosen | dict(settings))
    return config
