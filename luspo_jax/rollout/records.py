"""What goes into a rollout and what comes out of it: token ids on the host, no text."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be answered group_size times.

    Attributes:
      prompt_id: names the prompt in the noise law, so the same in every run and on every host.
      tokens: its token ids, one or more; an image has as many placeholders as tokens.
      images: its images, each with `patches()` and `grid_thw`, as `PreparedImage` has them.
    """

    prompt_id: int
    tokens: tuple[int, ...] | np.ndarray
    images: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Response:
    """One sample.

    Attributes:
      tokens: int32, the stop token included.
      logprobs: float32 log-probability of each token at the rollout temperature.
      stopped: whether a stop token ended it; False where it was cut at the longest length.
      expert_ids: unsigned [tokens, L, K], the experts that routers chose for each token, in the L
        layers that have experts; None where they were not recorded.
      prompt_expert_ids: the same of the prompt's tokens; one array for all samples of a prompt.
    """

    prompt_id: int
    sample_id: int
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool
    expert_ids: np.ndarray | None = None
    prompt_expert_ids: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class RolloutStats:
    """What a rollout cost.

    Attributes:
      decode_steps: model steps; each adds at most one token to every slot.
      prefill_tokens: prompt tokens that went through the model, padding aside.
      prefill_calls: prefill programs run.
      generated_tokens: response tokens, stop tokens included.
      slot_utilisation: generated tokens over slots × decode steps.
      compilations: programs compiled or read from the compile cache.
      compile_seconds: time spent on tracing and compiling them.
      seconds: wall time without compile_seconds.
    """

    decode_steps: int
    prefill_tokens: int
    prefill_calls: int
    generated_tokens: int
    slot_utilisation: float
    compilations: int
    compile_seconds: float
    seconds: float
