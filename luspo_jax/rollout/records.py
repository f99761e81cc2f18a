"""Records of a rollout: requests, responses with the fields of later stages, and statistics."""

import dataclasses
from typing import Any

import numpy as np

from luspo_jax.rewards import Reward


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be answered group_size times.

    Attributes:
      prompt_id: keys the prompt's noise; the same in every run and on every host.
      tokens: token ids, one or more; an image has one placeholder per image token.
      images: the images, each with `patches()` and `grid_thw`, like `PreparedImage`.
      limit: tokens after which its responses are cut, if fewer than the sampling's; None for those.
        Of a tuple, the entries are those of the responses.
      step: the step that began it, which keys its noise too; None for the step of the call.
      begun: its responses so far, one for each sample; empty if none has begun.
    """

    prompt_id: int
    tokens: tuple[int, ...] | np.ndarray
    images: tuple[Any, ...] = ()
    limit: int | tuple[int, ...] | None = None
    step: int | None = None
    begun: tuple["Response", ...] = ()

    def limits(self, group_size: int, longest: int) -> list[int]:
        """Returns the most tokens of each response, where the sampling allows `longest`."""
        own = self.limit if isinstance(self.limit, tuple) else (self.limit,) * group_size
        return [longest if limit is None else min(longest, limit) for limit in own]

    @property
    def key(self) -> tuple[int | None, int]:
        """What tells it from the others of a call."""
        return self.step, self.prompt_id


@dataclasses.dataclass(frozen=True)
class Response:
    """One response with all its fields: the sampler creates it, stages add to it.

    Unless stated otherwise, arrays have one entry per response token. None means that no stage has
    set the field yet.

    Attributes:
      prompt_id, sample_id, step: keys of its noise; the step is the one that began it.
      tokens: int32, the stop token included.
      logprobs: float32 log-probability of each token at the rollout temperature, by the sampler.
      stopped: whether a stop token ended it; False if it was cut at the length limit.
      ended: whether it has ended; False if it goes on in a later step.
      expert_ids: unsigned ids [n, L, K] of the experts that the sampler's routers chose for each
        token, in the L layers that have experts; of one that goes on, for all but the last token.
        None if not recorded.
      prompt_expert_ids: the same for the prompt's tokens; one array for all samples of it that
        one policy began.
      versions: uint32 number of steps that the policy had taken when it sampled each token.
      text: the decoded tokens, special tokens left out.
      reward: the verdict.
      counted: whether it counts in its group's statistics.
      trained: bool, the tokens that carry gradient; none in a response that does not count.
      old_logprobs: float32 under the old policy, as `Objective.old_policy` says: the policy that
        starts the step, computed by the trainer; or, for tokens that an earlier one sampled, that
        one, so the sampler's. Unset on tokens not trained on.
      old_entropy: float32 entropies of the same policy.
      old_expert_ids: ids [prompt + n, L, K] that the same policy's routers chose in the trainer.
      ref_logprobs: float32 under the reference policy, as `old_logprobs`.
      advantage: of the response in its group; the mean over its tokens if they have their own.
      old_collision: float32 Σ_v π_v² of the policy that starts the step; only if it is read.
      token_advantages: float32 advantage of each token, if they have their own.
      segment_starts: bool, tokens that begin a segment, if the objective's ratio has segments.
    """

    prompt_id: int
    sample_id: int
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool
    step: int = 0
    ended: bool = True
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
    old_collision: np.ndarray | None = None
    token_advantages: np.ndarray | None = None
    segment_starts: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class RolloutStats:
    """Costs of a rollout.

    Attributes:
      decode_steps: model steps; each adds at most one token to every row.
      prefill_tokens: prompt tokens computed, without padding; what all prompts begin with once a
        device, and no last tokens, which decoding reads.
      recomputed_tokens: tokens of preempted responses that were computed again.
      continued_tokens: tokens of responses of earlier steps that were read again, under the newer
        weights, before these went on.
      prefill_calls: prefill programs run.
      generated_tokens: response tokens, stop tokens included.
      slot_utilisation: generated tokens over rows of decode steps.
      preemptions: responses that gave their pages back before they ended.
      page_size: tokens of a page on one device.
      pages_total: pages of the pools of all devices along "batch".
      pages_peak: the most in use at a time.
      pages_in_use: pages in use after each chunk, before those of ended responses are freed.
      cache_bytes: bytes of the pool on one device.
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
    recomputed_tokens: int = 0
    continued_tokens: int = 0
    preemptions: int = 0
    page_size: int = 0
    pages_total: int = 0
    pages_peak: int = 0
    pages_in_use: tuple[int, ...] = ()
    cache_bytes: int = 0
