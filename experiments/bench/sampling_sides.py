"""The sides of the sampler's benchmark: our engine here, the others each in a process."""

import ast
import dataclasses
import pathlib
import time
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import command
from experiments.bench import peer
from experiments.bench.sampling_work import Work
from luspo_jax.models import decoder_weights
from luspo_jax.rollout import Request
from luspo_jax.run import build, checks, fields
from luspo_jax.run.model import load_model


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What sampling everything took once.

    Attributes:
      seconds: wall time, compilation left out.
      cores: CPU seconds of the process a second.
      lengths: of the responses, prompt by prompt.
      stats: the engine's own record of ours.
    """

    seconds: float
    cores: float
    lengths: list[int]
    stats: Any = None

    @property
    def tokens(self) -> int:
        """Returns the tokens sampled."""
        return sum(self.lengths)

    @property
    def rate(self) -> float:
        """Returns tokens a second."""
        return self.tokens / self.seconds


class Engine:
    """The engine of a run with the default configuration, and the model of a Work."""

    def __init__(
        self,
        work: Work,
        *,
        dtype: str = "float32",
        fields_set: Mapping[str, Any] = types.MappingProxyType({}),
        params: Any = None,
    ):
        """Loads the weights.

        Args:
          work: what to sample.
          dtype: of weights and cache.
          fields_set: other fields of the configuration, by name.
          params: weights of another Engine of the same model; None to load them.
        """
        config = fields.default_config()
        config.reward.parts = {"exact": 1.0}
        chosen = {
            "model.path": str(work.folder),
            "model.stop_token_ids": "" if work.stops else "none",
            "model.rollout_dtype": dtype,
            "data.name": "label_sums",  # a dataset and a reward must be named; none is read
            "data.max_prompt_length": work.longest_prompt,
            "rollout.max_response_length": work.longest_response,
            "rollout.temperature": 1.0,
            "rollout.mismatch_limit": 1e3,  # nothing is trained here
            "rollout.num_slots": work.responses,
        }
        fields.assign(config, chosen | dict(fields_set))
        settings = checks.check(config)
        model = load_model(settings)
        self._work, self.model = work, model.config
        self.engine = build.sampler(settings, model, settings.rollout, (None, None))
        self.params = params or jax.device_put(
            decoder_weights.load_params(model.folder, model.config, dtype=self.engine.dtype)
        )
        self._requests = [
            Request(i, np.asarray(tokens, np.int32), limit=limit)
            for i, (tokens, limit) in enumerate(zip(work.prompts, work.limits, strict=True))
        ]

    def generate(self, seed: int):
        """Returns the Responses and RolloutStats."""
        return self.engine.generate(
            self.params, self._requests, group_size=self._work.group, seed=seed
        )

    def sample(self, seed: int) -> Sampled:
        """Samples everything once."""
        used, started = time.process_time(), time.perf_counter()
        responses, stats = self.generate(seed)
        seconds = time.perf_counter() - started
        cores = (time.process_time() - used) / seconds
        lengths = [len(response.tokens) for response in responses]
        return Sampled(seconds - stats.compile_seconds, cores, lengths, stats)


class Peer(peer.Peer):
    """Another library, sampling in a process of its own whenever it is asked."""

    def __init__(self, kind: str, python: str, spec: Mapping[str, Any], folder: pathlib.Path):
        """Starts the process and waits until it has loaded its model.

        Args:
          kind: of `sampling_peer.KINDS`.
          python: that runs it.
          spec: what it reads.
          folder: for its files; what it says is in KIND.log.

        Raises:
          RuntimeError: it ended; the message has the last lines that it wrote.
        """
        command = [python, "-m", "experiments.bench.sampling_peer", kind]
        super().__init__(kind, command, spec, folder)

    def sample(self, seed: int) -> Sampled:
        """Samples everything once."""
        return Sampled(**self.ask(seed))


def set_field(text: str) -> tuple[str, Any]:
    """Reads --set=field=value.

    Raises:
      UsageError: there is no value.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise command.UsageError(f"--set={text} must be field=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def check_lengths(work: Work, sampled: Sampled, side: str) -> None:
    """Refuses a side that did other work than asked.

    Raises:
      RuntimeError: it did.
    """
    if len(sampled.lengths) != work.responses:
        raise RuntimeError(f"{side} made {len(sampled.lengths)} of {work.responses} responses")
    if work.forced is not None and sampled.lengths != work.forced:
        raise RuntimeError(f"{side} made responses of other lengths: {sampled.lengths}")
    if not work.forced and max(sampled.lengths) > work.longest_response:
        raise RuntimeError(f"{side} made a response of {max(sampled.lengths)} tokens")
