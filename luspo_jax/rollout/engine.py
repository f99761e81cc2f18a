"""Continuous batching: every prompt is prefilled once, slots are refilled as responses end."""

import collections
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.images import batch
from luspo_jax.models import decoder
from luspo_jax.ops.sizes import rounded_up
from luspo_jax.rollout import slots as device
from luspo_jax.rollout.compile_clock import CompileClock
from luspo_jax.rollout.records import RolloutStats
from luspo_jax.rollout.sampling import rollout_key
from luspo_jax.rollout.schedule import (
    SlotTable,
    padded_prompts,
    prefill_batches,
    queue_of,
)
from luspo_jax.sharding import MeshError

SMALLEST_PROMPT = 64  # tokens of the shortest prefill program
SMALLEST_ROOM = 256  # tokens of the shortest cache
ID_LIMIT = 2**32  # fold_in takes 32 bits


class Engine:
    """Samples responses of one decoder under one Sampling; tokens in, tokens out.

    Compiled programs depend only on sizes and are shared by all engines of a process, so a second
    call compiles nothing. On a mesh, every process samples on its own devices.
    """

    def __init__(
        self,
        how,
        sampling,
        *,
        num_slots,
        max_prompt_length,
        chunk_length=64,
        refill_fraction=1 / 16,
        max_prefill_tokens=16_384,
        record_experts=False,
    ):
        """Checks the sizes; allocates and compiles nothing yet.

        Args:
          how: the Forward for prompts, their images and decode steps. Its layout has table
            "rollout" over devices of this process, on which `params` are already sharded by
            `decoder.param_axes`; its dtype is also the cache's.
          sampling: the Sampling.
          num_slots: rows decoded together. If a step costs by the row (a CPU), a half to a quarter
            of a call's responses wastes least; if it costs by the weights read, as many as memory
            holds. Rounded up to a multiple of layout.size("batch"); added slots idle only if there
            are fewer responses.
          max_prompt_length: the longest prompt accepted.
          chunk_length: most decode steps between two looks from the host.
          refill_fraction: share of the slots that must be free before they are refilled.
          max_prefill_tokens: most prompt tokens in one prefill, padded to the longest of the
            batch, if it holds more than one prompt per device; rounding rows and lengths up to few
            sizes makes at most four times as many (more for prompts shorter than
            SMALLEST_PROMPT). During a refill on a mesh, each device gathers the cache of them all:
            1.5 · kv_bytes_per_slot(tokens).
          record_experts: responses include the expert ids of their and the prompt's tokens.

        Raises:
          ValueError: naming the invalid argument.
          MeshError: the layout does not fit this engine or the model.
        """
        config, layout = how.model, how.layout
        _check_layout(layout, config)
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
        if record_experts and not config.num_experts:
            raise ValueError("record_experts=True needs a mixture of experts")
        self.how, self.sampling, self.record_experts = how, sampling, record_experts
        self.row_multiple = 1 if layout is None else layout.size("batch")
        self.num_slots = -(-num_slots // self.row_multiple) * self.row_multiple
        self.max_prompt_length = max_prompt_length
        self.chunk_length, self.max_prefill_tokens = chunk_length, max_prefill_tokens
        self.leave_at = max(1, math.ceil(refill_fraction * self.num_slots))

    @property
    def layout(self):
        return self.how.layout

    @property
    def dtype(self):
        return jnp.dtype(self.how.dtype)

    def kv_bytes_per_slot(self, length):
        """Returns the cache bytes of a slot of `length` tokens on each device that holds it.

        2 · L · K · H · length elements, divided by the shards of key heads and positions.
        """
        heads, positions = (
            1 if self.layout is None else self.layout.size(axis)
            for axis in ("kv_heads", "cache_length")
        )
        c = self.how.model
        per_token = 2 * c.num_layers * (c.num_kv_heads // heads) * c.head_dim * self.dtype.itemsize
        return per_token * -(-length // positions)

    def room(self, length):
        """Returns the cache positions to allocate for slots that need `length` of them."""
        positions = 1 if self.layout is None else self.layout.size("cache_length")
        room = rounded_up(length, SMALLEST_ROOM, self.max_length)
        return -(-room // positions) * positions

    def generate(self, params, requests, *, group_size, seed, step=0, progress=None):
        """Samples `group_size` responses to each of `requests`.

        The noise of a token depends only on (seed, step, prompt_id, sample_id, position).

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
          FloatingPointError: a log-probability is not finite.
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
        if tokens.min() < 0 or tokens.max() >= self.how.model.vocab_size:
            raise ValueError(
                f"{name} has tokens outside [0, vocab_size {self.how.model.vocab_size})"
            )
        batch.check(tokens, request.images, self.how.model, name)


def _check_layout(layout, config):
    if layout is None:
        return
    if layout.table != "rollout":
        raise MeshError(f'layout must be of the table "rollout", not {layout.table!r}')
    others = {d.process_index for d in layout.mesh.devices.flat} - {jax.process_index()}
    if others:
        raise MeshError(
            f"layout has devices of the processes {sorted(others)}, and this is process "
            f"{jax.process_index()}: hand over sharding.on_own_devices(layout)"
        )
    for field, (axis, size) in decoder.cut_sizes(config).items():
        parts = layout.size(axis)
        if size % parts:
            raise MeshError(
                f"{field} {size} cannot be cut into {parts} equal parts (mesh "
                f"{', '.join(layout.axis_names(axis))} {parts}): use a divisor of {size}"
            )


def _check_call(group_size, seed, step):
    if group_size < 1:
        raise ValueError(f"group_size must be >= 1, not {group_size}")
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < ID_LIMIT:
            raise ValueError(f"{name} must lie in [0, 2**32), not {value}")


def prompt_images(requests, config, *, shape, multiple=1):
    """Returns the PromptImages of a prefill of `requests`, and offsets_P.

    Without any image, the first is None and offsets_P are 0.

    Args:
      requests: of the prefill, in order.
      config: the DecoderConfig.
      shape: (prompts, tokens) to which the prefill is padded.
      multiple: number of devices that share the images.
    """
    offsets_P = np.zeros(shape[0], np.int32)
    images = [image for request in requests for image in request.images]
    if not images:
        return None, offsets_P
    # Prompts do not share images here: with fewer rows, the last bits of embeddings would differ.
    stacked = batch.in_slots(
        [(image.patches(), image.grid_thw) for image in images],
        config.vision,
        count=rounded_up(len(images), multiple),
    )
    units_PT = np.full(shape, -1, np.int32)
    positions_PT3 = np.zeros((*shape, 3), np.int32)
    positions_PT3[:] = np.arange(shape[1], dtype=np.int32)[:, None]
    first = 0
    for p, request in enumerate(requests):
        size, own = len(request.tokens), range(first, first + len(request.images))
        units_PT[p, :size], positions_PT3[p, :size], after = batch.places(
            request.tokens, request.images, own, stacked.num_units, config
        )
        offsets_P[p] = after - size
        first += len(own)
    return device.PromptImages(stacked.images, units_PT, positions_PT3), offsets_P


class _Rollout:
    """One call of `generate`: the loop between host and devices."""

    def __init__(self, engine, params, requests, group_size):
        self.engine, self.params = engine, params
        self.requests, self.group_size = requests, group_size
        total = len(requests) * group_size
        # No more slots than responses, rounded up to few sizes.
        self.num_slots = min(engine.num_slots, rounded_up(max(1, total), engine.row_multiple))
        self.table = SlotTable(self.num_slots, total)
        self.batches = prefill_batches(
            requests,
            group_size=group_size,
            num_slots=self.num_slots,
            max_tokens=engine.max_prefill_tokens,
            multiple=engine.row_multiple,
        )
        self.queue = ()
        self.pool = self.slots = self.offsets_P = None
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

    def _prefill(self, indices):
        engine, requests = self.engine, [self.requests[index] for index in indices]
        length = rounded_up(
            max(len(request.tokens) for request in requests),
            SMALLEST_PROMPT,
            engine.max_prompt_length,
        )
        self._reserve(length + 1)
        multiple = engine.row_multiple
        prompts = padded_prompts(requests, length=length, multiple=multiple)
        images, offsets_P = prompt_images(
            requests, engine.how.model, shape=prompts[0].shape, multiple=multiple
        )
        self.pool, ids = device.prefill(
            self.params,
            *prompts,
            images,
            how=engine.how,
            record=engine.record_experts,
        )
        self.offsets_P = offsets_P
        self.queue = queue_of(indices, self.requests, self.group_size, jax.device_get(ids))
        self.prefill_calls += 1
        self.prefill_tokens += sum(len(request.tokens) for request in requests)

    def _fill(self, free, taken):
        columns = np.zeros((7, self.num_slots), np.int64)
        columns[0] = self.num_slots  # unused rows point past the last slot
        for i, (slot, (pool_row, occupant)) in enumerate(zip(free, taken, strict=True)):
            limit = occupant.length + self.engine.sampling.max_response_length
            request = occupant.request
            columns[:, i] = (
                slot,
                pool_row,
                occupant.length,
                self.offsets_P[pool_row],
                limit,
                request.prompt_id,
                occupant.sample_id,
            )
            self.table.occupants[slot] = occupant
        refill = device.Refill(*columns[:5].astype(np.int32), *columns[5:].astype(np.uint32))
        self.slots = device.fill(self.slots, self.pool, refill, self.key, layout=self.engine.layout)

    def _reserve(self, length):
        """Makes room for `length` tokens per slot."""
        if length <= self.room:
            return
        engine = self.engine
        self.room = engine.room(length)
        if self.slots is None:
            self.slots = device.empty_slots(
                self.key, num_slots=self.num_slots, length=self.room, how=engine.how
            )
        else:
            self.slots = device.grow(self.slots, length=self.room, layout=engine.layout)

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
            how=engine.how,
            sampling=engine.sampling,
            chunk_length=engine.chunk_length,
            record=engine.record_experts,
        )
        chunk = jax.device_get(chunk)
        self.decode_steps += int(chunk.steps)
        self.table.harvest(chunk, engine.sampling.stop_token_ids)
