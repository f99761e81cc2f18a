"""Our side of a benchmark: the training loop's own rollout step, on the benchmark's workload."""

import pathlib

import jax
import numpy as np

from experiments.bench import workload as workloads
from experiments.bench.workload import Workload
from luspo_jax import train
from luspo_jax.metrics import StepMetrics
from luspo_jax.run import beginning
from luspo_jax.run.build import build
from luspo_jax.run.fields import default_config


class Ours:
    """Rollout steps of `luspo_jax.train`, one per call."""

    def __init__(self, workload: Workload, folder: pathlib.Path, *, seed: int):
        self._workload = workload
        self._run = build(configuration(workload, folder, seed=seed))
        self._state = beginning.begin_state(self._run)
        self._before = jax.device_get(self._state.params["embedding"])
        self._carried, self._steps = beginning.Carried(), 0

    def step(self) -> dict[str, float]:
        """Samples, rewards, updates; returns seconds of the generation and of the update.

        The update includes computing old log-probs, if the step needs them.

        Raises:
          RuntimeError: the step did not do all the work.
        """
        metrics = StepMetrics()
        self._state, self._carried, rollouts = train.rollout_step(
            self._run,
            self._state,
            self._carried,
            self._steps,
            metrics=metrics,
            check_mismatch=self._steps == 0,
        )
        self._steps += 1
        if not np.all(rollouts.lengths_B == self._workload.response_length):
            raise RuntimeError(f"responses were cut short: {rollouts.lengths_B}")
        if not np.any(rollouts.advantages_B):
            raise RuntimeError("every advantage is zero: the update had nothing to do")
        values = metrics.result()
        if values["actor/skipped_updates"]:
            raise RuntimeError("the update was skipped: its gradient was not finite")
        update = sum(values[f"timing_s/{phase}"] for phase in ("old_log_prob", "ref"))
        return {
            "generation": values["timing_s/gen"],
            "update": update + values["timing_s/update_actor"],
        }

    def parameters_moved(self) -> bool:
        """Whether the steps have changed the weights."""
        return bool(np.any(jax.device_get(self._state.params["embedding"]) != self._before))


def configuration(workload: Workload, folder: pathlib.Path, *, seed: int):
    """Builds the run's configuration for a workload written to `folder`; the rest is default."""
    config = default_config()
    config.seed = seed
    config.model.path = str(folder / workloads.MODEL)
    config.model.stop_token_ids = "none"  # every response has the same length
    config.model.dtype = config.model.rollout_dtype = workload.dtype
    config.data.name = "file"
    config.data.path = config.data.eval_path = str(folder / workloads.PROMPTS)
    config.data.cache_dir = str(folder / "datasets")
    config.data.max_prompt_length = workload.prompt_length
    # The parity of the last token is the last letter of its text.
    config.reward.parts = {"exact": 1.0}
    config.reward.options = {"exact": {"pattern": r"([eo])\s*$"}}
    config.rollout.prompts_per_step = workload.prompts
    config.rollout.group_size = workload.group
    config.rollout.max_response_length = workload.response_length
    config.rollout.num_slots = workload.responses
    if workload.dtype != "float32":
        config.rollout.mismatch_limit = 0.5
    config.objective.preset = "luspo"
    config.train.num_microbatches = workload.microbatches
    config.train.num_length_buckets = 1
    config.train.learning_rate = workloads.LEARNING_RATE
    config.train.warmup_steps = 0
    config.eval.num_problems = 1
    return config
