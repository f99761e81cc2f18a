"""The host side of a rollout: when each prompt is prefilled, and which response has which slot."""

import collections
import dataclasses

import numpy as np

from luspo_jax.ops.sizes import rounded_up
from luspo_jax.rollout.records import Request, Response


def prefill_batches(requests, *, group_size, num_slots, max_tokens, multiple=1):
    """Returns batches of indices of `requests` for prefill.

    Longest prompts come first, so that the prompts of a batch need little padding. A batch holds
    about as many prompts as fill the slots, fewer if its padded tokens would exceed `max_tokens`,
    and no fewer than `multiple`, since it has that many rows in any case.
    """
    most = max(1, num_slots // group_size // multiple)
    most = multiple * (1 << (most.bit_length() - 1))
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
    batches = []
    while order:
        longest = len(requests[order[0]].tokens)
        count = min(most, max(multiple, max_tokens // longest))
        batches.append(order[:count])
        order = order[count:]
    return batches


def padded_prompts(requests, *, length, multiple=1):
    """Returns left-aligned tokens_PT and lengths_P of `requests`, P rounded up by `rounded_up`.

    Padding rows hold one token.
    """
    count = rounded_up(len(requests), multiple)
    tokens_PT = np.zeros((count, length), np.int32)
    lengths_P = np.ones(count, np.int32)
    for row, request in enumerate(requests):
        tokens_PT[row, : len(request.tokens)] = request.tokens
        lengths_P[row] = len(request.tokens)
    return tokens_PT, lengths_P


@dataclasses.dataclass
class Occupant:
    """The response in a slot, and its tokens so far, in pieces."""

    request: Request
    index: int  # of the response in the result
    sample_id: int
    length: int  # of the row, prompt included
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    expert_ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    prompt_expert_ids: np.ndarray | None = None

    def extend(self, tokens, logprobs, expert_ids=None):
        """Appends the tokens, log-probs and expert ids of one chunk.

        Raises:
          FloatingPointError: a log-probability is not finite.
        """
        if not np.isfinite(logprobs).all():
            raise FloatingPointError(
                f"prompt_id {self.request.prompt_id}, sample_id {self.sample_id}: the sampler's "
                "log-probabilities are not finite; look for NaN or Inf in params"
            )
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        if expert_ids is not None:
            self.expert_ids.append(expert_ids)
        self.length += len(tokens)

    def response(self, stop_token_ids):
        tokens = np.concatenate(self.tokens)
        return Response(
            prompt_id=self.request.prompt_id,
            sample_id=self.sample_id,
            tokens=tokens,
            logprobs=np.concatenate(self.logprobs),
            stopped=int(tokens[-1]) in stop_token_ids,
            expert_ids=np.concatenate(self.expert_ids) if self.expert_ids else None,
            prompt_expert_ids=self.prompt_expert_ids,
        )


class SlotTable:
    """The occupant of each slot, and the finished responses."""

    def __init__(self, num_slots, num_responses):
        self.occupants: list[Occupant | None] = [None] * num_slots
        self.responses: list[Response | None] = [None] * num_responses
        self.finished = 0
        self.generated_tokens = 0

    @property
    def free(self):
        return [slot for slot, occupant in enumerate(self.occupants) if occupant is None]

    @property
    def longest(self):
        return max(occupant.length for occupant in self.occupants if occupant is not None)

    def harvest(self, chunk, stop_token_ids):
        """Takes in a Chunk of NumPy arrays; finished responses leave their slots."""
        tokens_BC = np.ascontiguousarray(chunk.tokens_CB[: chunk.steps].T)
        logprobs_BC = np.ascontiguousarray(chunk.logprobs_CB[: chunk.steps].T)
        for slot, occupant in enumerate(self.occupants):
            if occupant is None:
                continue
            count = chunk.counts_B[slot]
            ids_CBLK = chunk.expert_ids_CBLK
            occupant.extend(
                tokens_BC[slot, :count].copy(),
                logprobs_BC[slot, :count].copy(),
                None if ids_CBLK is None else ids_CBLK[:count, slot].copy(),
            )
            if not chunk.active_B[slot]:
                self.responses[occupant.index] = occupant.response(stop_token_ids)
                self.occupants[slot] = None
                self.finished += 1
        self.generated_tokens += int(chunk.counts_B.sum())


def queue_of(batch, requests, group_size, ids_PTLK=None):
    """Returns (pool row, Occupant) of every sample of the prefilled `batch`, in order."""
    queue = collections.deque()
    for row, index in enumerate(batch):
        length = len(requests[index].tokens)
        ids_TLK = None if ids_PTLK is None else ids_PTLK[row, :length].copy()
        for sample_id in range(group_size):
            occupant = Occupant(requests[index], index * group_size + sample_id, sample_id, length)
            occupant.prompt_expert_ids = ids_TLK
            queue.append((row, occupant))
    return queue
