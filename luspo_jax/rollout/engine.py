"""Continuous batching: every prompt prefilled once, slots refilled as responses end."""

import collections
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.rollout import slots as device
from luspo_jax.rollout.compile_clock import CompileClock
from luspo_jax.rollout.records import RolloutStats
from luspo_jax.rollout.sampling import rollout_key
from luspo_jax.rollout.schedule import (
    SlotTable,
    bucket,
    padded_prompts,
    prefill_batches,
    queue_of,
)

SMALLEST_PROMPT = 64  # tokens of the shortest prefill program
SMALLEST_ROOM = 256  # tokens of the shortest cache
ID_LIMIT = 2**32  # fold_in takes 32 bits


class Engine:
    """Samples responses of one decoder under one Sampling; token in, token out.

    Compiled programs depend on sizes only and are shared by all engines of a process, so a second
    call compiles nothing.
    """

    def __init__(
        self,
        config,
        sampling,
        *,
        num_slots,
        max_prompt_length,
        chunk_length=64,
        dtype=jnp.float32,
        refill_fraction=1 / 16,
        max_prefill_tokens=16_384,
        layout=None,
    ):
        """Check the sizes; nothing is allocated or compiled yet.

        Args:
          config: the DecoderConfig.
          sampling: the Sampling.
          num_slots: rows decoded together. Where a step costs by the row (a CPU), a half to a
            quarter of the responses of a call wastes least; where it costs by the weights read,
            as many as memory holds.
          max_prompt_length: the longest prompt accepted.
          chunk_length: most decode steps between two looks from the host.
          dtype: type of activations and of the cache.
          refill_fraction: share of the slots that must be free before they are refilled.
          max_prefill_tokens: most padded prompt tokens in one prefill.

        Raises:
          ValueError: naming the argument that makes no sense.
        """
        counts = {
            "num_slots": num_slots,
            "max_prompt_length": max_prompt_length,
            "chunk_length": chunk_length,
            "max_prefill_tokens": max_prefill_tokens,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, not {value}")
        if not 0 < refill_fraction <= 1:
            raise ValueError(f"refill_fraction must lie in (0, 1], not {refill_fraction}")
        if any(token >= config.vocab_size for token in sampling.stop_token_ids):
            raise ValueError(
                f"stop_token_ids {sampling.stop_token_ids} must be < vocab_size {config.vocab_size}"
            )
        self.max_length = max_prompt_length + sampling.max_response_length
        if self.max_length > config.max_position:
            raise ValueError(
                f"max_prompt_length {max_prompt_length} + max_response_length "
                f"{sampling.max_response_length} must be <= max_position {config.max_position}"
            )
        self.config, self.sampling, self.dtype = config, sampling, jnp.dtype(dtype)
        self.num_slots, self.max_prompt_length = num_slots, max_prompt_length
        self.chunk_length, self.max_prefill_tokens = chunk_length, max_prefill_tokens
        self.leave_at = max(1, math.ceil(refill_fraction * num_slots))

    def generate(self, params, requests, *, group_size, seed, step=0, progress=None):
        """`group_size` responses to each of `requests`.

        The noise of a token is fixed by (seed, step, prompt_id, sample_id, position) alone.

        Args:
          params: the decoder's parameters.
          requests: Requests with distinct prompt_ids.
          group_size: samples of each prompt.
          seed: of the run.
          step: of the run; each step draws other noise.
          progress: called with (finished, total) responses whenever some finish.

        Returns:
          The Responses, request-major and then by sample_id, and RolloutStats.

        Raises:
          ValueError: naming the request or the argument that cannot be served.
          FloatingPointError: where a log-probability is not finite.
        """
        requests = list(requests)
        _check_call(group_size, seed, step)
        for request in requests:
            self._check_request(request)
        counts = collections.Counter(request.prompt_id for request in requests)
        twice = sorted(prompt_id for prompt_id, count in counts.items() if count > 1)
        if twice:
            raise ValueError(f"prompt_id must be distinct; these repeat: {twice[:10]}")
        started = time.perf_counter()
        with CompileClock() as clock:
            rollout = _Rollout(self, params, requests, group_size)
            rollout.key = rollout_key(seed, step)
            rollout.run(progress)
        return rollout.table.responses, rollout.stats(clock, time.perf_counter() - started)

    def _check_request(self, request):
        name = f"prompt_id {request.prompt_id}"
        if not 0 <= request.prompt_id < ID_LIMIT:
            raise ValueError(f"{name} must lie in [0, 2**32)")
        tokens = np.asarray(request.tokens)
        if not 1 <= len(tokens) <= self.max_prompt_length:
            raise ValueError(
                f"{name} has {len(tokens)} tokens; prompts have 1 to max_prompt_length "
                f"{self.max_prompt_length} (drop longer ones beforehand)"
            )
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"{name} must hold a list of token ids, not {tokens.dtype}{list(tokens.shape)}"
            )
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"{name} has tokens outside [0, vocab_size {self.config.vocab_size})")


def _check_call(group_size, seed, step):
    if group_size < 1:
        raise ValueError(f"group_size must be >= 1, not {group_size}")
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < ID_LIMIT:
            raise ValueError(f"{name} must lie in [0, 2**32), not {value}")


class _Rollout:
    """One call of `generate`: the loop between host and device."""

    def __init__(self, engine, params, requests, group_size):
        self.engine, self.params = engine, params
        self.requests, self.group_size = requests, group_size
        total = len(requests) * group_size
        # No more slots than responses, in few sizes.
        self.num_slots = min(engine.num_slots, 1 << max(0, total - 1).bit_length())
        self.table = SlotTable(self.num_slots, total)
        self.batches = prefill_batches(
            requests,
            group_size=group_size,
            num_slots=self.num_slots,
            max_tokens=engine.max_prefill_tokens,
        )
        self.queue = ()
        self.pool = self.slots = None
        self.room = self.decode_steps = self.prefill_calls = self.prefill_tokens = 0

    def run(self, progress):
        total = len(self.table.responses)
        while self.table.finished < total:
            self._refill()
            before = self.table.finished
            self._decode()
            if progress is not None and self.table.finished > before:
                progress(self.table.finished, total)

    def stats(self, clock, seconds):
        slot_steps = self.decode_steps * self.num_slots
        tokens = self.table.generated_tokens
        return RolloutStats(
            decode_steps=self.decode_steps,
            prefill_tokens=self.prefill_tokens,
            prefill_calls=self.prefill_calls,
            generated_tokens=tokens,
            slot_utilisation=tokens / slot_steps if slot_steps else 0.0,
            compilations=clock.count,
            compile_seconds=clock.seconds,
            seconds=seconds - clock.seconds,
        )

    def _refill(self):
        free = self.table.free
        while free and (self.queue or self.batches):
            if not self.queue:
                self._prefill(self.batches.pop(0))
            taken = [self.queue.popleft() for _ in range(min(len(free), len(self.queue)))]
            self._fill(free[: len(taken)], taken)
            free = free[len(taken) :]

    def _prefill(self, batch):
        requests = [self.requests[index] for index in batch]
        length = bucket(
            max(len(request.tokens) for request in requests),
            limit=self.engine.max_prompt_length,
            smallest=SMALLEST_PROMPT,
        )
        self._reserve(length + 1)
        tokens_PT, lengths_P = padded_prompts(requests, length=length)
        self.pool = device.prefill(
            self.params,
            tokens_PT,
            lengths_P,
            config=self.engine.config,
            dtype=self.engine.dtype,
        )
        self.queue = queue_of(batch, self.requests, self.group_size)
        self.prefill_calls += 1
        self.prefill_tokens += sum(len(request.tokens) for request in requests)

    def _fill(self, free, taken):
        columns = np.zeros((6, self.num_slots), np.uint32)
        columns[0] = self.num_slots  # a slot that does not exist: unused rows
        for i, (slot, (pool_row, occupant)) in enumerate(zip(free, taken, strict=True)):
            limit = occupant.length + self.engine.sampling.max_response_length
            request = occupant.request
            columns[:, i] = (
                slot,
                pool_row,
                occupant.length,
                limit,
                request.prompt_id,
                occupant.sample_id,
            )
            self.table.occupants[slot] = occupant
        refill = device.Refill(*columns[:4].astype(np.int32), *columns[4:])
        self.slots = device.fill(self.slots, self.pool, refill, self.key)

    def _reserve(self, length):
        """Make room for `length` tokens a slot."""
        if length <= self.room:
            return
        engine = self.engine
        self.room = bucket(length, limit=engine.max_length, smallest=SMALLEST_ROOM)
        if self.slots is None:
            self.slots = device.empty_slots(
                self.key,
                num_slots=self.num_slots,
                length=self.room,
                config=engine.config,
                dtype=engine.dtype,
            )
        else:
            self.slots = device.grow(self.slots, length=self.room)

    def _decode(self):
        engine, longest = self.engine, self.table.longest
        self._reserve(longest + 1)
        waiting = len(self.queue) + self.group_size * sum(map(len, self.batches))
        leave_at = min(engine.leave_at, waiting) if waiting else self.num_slots
        max_steps = min(engine.chunk_length, self.room - longest)
        self.slots, chunk = device.decode_chunk(
            self.params,
            self.slots,
            np.int32(max_steps),
            np.int32(leave_at),
            config=engine.config,
            sampling=engine.sampling,
            chunk_length=engine.chunk_length,
            dtype=engine.dtype,
        )
        chunk = jax.device_get(chunk)
        self.decode_steps += int(chunk.steps)
        self.table.harvest(chunk, engine.sampling.stop_token_ids)
