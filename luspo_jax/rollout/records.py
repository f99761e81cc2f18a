"""What goes into a rollout, and what comes out of it and is carried through a step."""

import dataclasses
from typing import Any

import numpy as np

from luspo_jax.rewards import Reward


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
    """One response and all that is known of it: the sampler makes it, stages add to it.

    Every array has one entry a token of the response, unless it says otherwise. None means that no
    stage has said so yet.

    Attributes:
      prompt_id, sample_id: what keys its noise.
      tokens: int32, the stop token included.
      logprobs: float32 log-probability of each token at the rollout temperature, by the sampler.
      stopped: whether a stop token ended it; False where it was cut at the longest length.
      expert_ids: unsigned ids [n, L, K] of the experts that the sampler's routers chose for each
        token, in the L layers that have experts; None where they were not recorded.
      prompt_expert_ids: the same of the prompt's tokens; one array for all samples of a prompt.
      versions: uint32 steps that the policy had taken which sampled each token.
      text: what the tokens say, special tokens left out.
      reward: the verdict.
      counted: whether it counts in its group's statistics.
      trained: bool, the tokens that carry gradient; none of a response that does not count.
      old_logprobs: float32 under the policy that starts the step, as the trainer computes them; of
        a token that an earlier policy sampled, the sampler's. Unset on tokens not trained on.
      old_entropy: float32 entropies of the same policy.
      old_expert_ids: ids [prompt + n, L, K] that the same policy's routers chose in the trainer.
      ref_logprobs: float32 under the reference policy, as `old_logprobs`.
      advantage: of the response in its group.
    """

    prompt_id: int
    sample_id: int
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool
    expert_ids: np.ndarray | None = None
    prompt_expert_ids: np.ndarray | None = None
    versions: np.ndarray | None = None
    text: str | None = None
    reward: Reward | None = None
    counted: bool = False
    trained: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None
    old_entropy: np.ndarray | None = None
    old_expert_ids: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    advantage: float | None = None


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
