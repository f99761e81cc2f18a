"""Continuous batching over pages: prompts are read once, responses come and go as pages last."""

import collections
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.images import batch
from luspo_jax.models import decoder
from luspo_jax.models.forward import Forward
from luspo_jax.ops import paged_attention
from luspo_jax.ops.sizes import rounded_up
from luspo_jax.rollout.cache import PAGE_SIZES, Cache, bytes_left, page_bytes
from luspo_jax.rollout.compile_clock import CompileClock
from luspo_jax.rollout.loop import Loop
from luspo_jax.rollout.sampling import Sampling
from luspo_jax.sharding import MeshError, available_devices

PREFILL_TOKENS = 8_192  # of one prefill, by default
ID_LIMIT = 2**32  # fold_in takes 32 bits
_WORTH_A_PROGRAM = 16  # tokens of a response, from which programs of fewer rows pay


class Engine:
    """Samples responses of one decoder under one Sampling; tokens in, tokens out.

    Compiled programs depend only on sizes and are shared by all engines of a process, so a second
    call compiles nothing; nothing grows while responses do. On a mesh, every process samples on its
    own devices.
    """

    def __init__(
        self,
        how: Forward,
        sampling: Sampling,
        *,
        num_slots: int,
        max_prompt_length: int,
        chunk_length: int = 64,
        max_prefill_tokens: int = PREFILL_TOKENS,
        record_experts: bool = False,
        cache: Cache = Cache(),  # noqa: B008  (frozen)
    ):
        """Checks the sizes; allocates and compiles nothing yet.

        Args:
          how: the Forward for prompts, their images and decode steps. Its layout has table
            "rollout" over devices of this process, on which `params` are already sharded by
            `decoder.param_axes`; its dtype is also that of keys and values. Its paged attention is
            "auto" or an implementation.
          sampling: the Sampling.
          num_slots: most responses decoded together. Pages limit them too, so it may be large:
            what a step costs by the row, on a CPU, is little against what it costs at all. Rounded
            up to a multiple of layout.size("batch").
          max_prompt_length: the longest prompt accepted.
          chunk_length: most decode steps between two looks from the host.
          max_prefill_tokens: most tokens in one prefill, all devices together, if it holds more
            than one run a device. Long prompts are read in runs of at most as many, beside
            decoding.
          record_experts: responses include the expert ids of their and the prompt's tokens.
          cache: the pool of pages.

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
        self.device = layout.mesh.devices.flat[0] if layout else _own_device()
        platform = self.device.platform
        self.page_size = cache.page_size or PAGE_SIZES.get(platform, 64)
        self.how = dataclasses.replace(how, paged_attention=_kernel(how, cache, platform))
        self.sampling, self.record_experts, self.cache = sampling, record_experts, cache
        self.row_multiple = 1 if layout is None else layout.size("batch")
        self.num_slots = -(-num_slots // self.row_multiple) * self.row_multiple
        self.max_prompt_length = max_prompt_length
        self.chunk_length, self.max_prefill_tokens = chunk_length, max_prefill_tokens
        # Where a step costs by the weights it reads, fewer rows save nothing.
        self.by_row = platform == "cpu"
        if cache.gb is not None:
            self.pages_of(cache.gb * 1e9, self.num_slots)  # refuses what is too small

    @property
    def layout(self):
        """Where arrays lie on the mesh; None on one device."""
        return self.how.layout

    @property
    def dtype(self):
        """Type of activations, products and the cache."""
        return jnp.dtype(self.how.dtype)

    @property
    def pools(self) -> int:
        """Parts of the pool: one for each device along "batch" and along positions."""
        return self.layout.size("pages") if self.layout else 1

    @property
    def page_tokens(self) -> int:
        """Tokens that a page number stands for, on all devices that share positions."""
        return self.page_size * (self.layout.size("cache_length") if self.layout else 1)

    @property
    def table_width(self) -> int:
        """Pages of the longest response."""
        return -(-self.max_length // self.page_tokens)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page on each device that holds it."""
        heads = self.layout.size("kv_heads") if self.layout else 1
        return page_bytes(self.how.model, self.cache_dtype, self.page_size, heads)

    @property
    def cache_dtype(self):
        """Type of keys and values in pages."""
        return jnp.dtype(self.cache.dtype or self.how.dtype)

    @property
    def least_bytes(self) -> int:
        """Bytes on a device of the smallest pool: the longest response, page 0, and the rest of a
        prompt beside its last response."""
        return (self.table_width + 2) * self.page_bytes

    def take_room(self, room: float) -> None:
        """Sets the pool to `room` bytes on a device, or to the smallest if that is more."""
        gb = max(room, self.least_bytes) / 1e9
        self.cache = dataclasses.replace(self.cache, gb=gb)

    def most_rows(self, responses: int) -> int:
        """Rows of each device along "batch" for so many responses."""
        return min(self.num_slots, rounded_up(max(1, responses), self.row_multiple)) // (
            self.row_multiple
        )

    def row_counts(self, responses: int) -> list[int]:
        """Rows of a device for which decode programs are compiled, the most first."""
        most = self.most_rows(responses)
        if not self.by_row or self.sampling.max_response_length < _WORTH_A_PROGRAM:
            return [most]
        # 1, 4, 8, 16, 32, 48, 64, 96, 128, …: of many rows, at most a third stand idle, and one
        # long response is decoded alone.
        powers = [8 << i for i in range(most.bit_length())]
        counts = {1, 4, most, *powers, *(n * 3 // 4 for n in powers if n > 32)}
        return sorted((n for n in counts if n <= most), reverse=True)

    def pages_of(self, room: float, responses: int) -> int:
        """Returns the pages on a device of a pool of `room` bytes, never more than can be used.

        Raises:
          ValueError: it cannot hold the longest response; says what is needed.
        """
        most = 1 + self.most_rows(responses) * (self.table_width + 1)
        if round(room) < self.least_bytes:
            raise ValueError(
                f"cache_gb={room / 1e9:.6g} is too small: one response of max_prompt_length "
                f"{self.max_prompt_length} + max_response_length "
                f"{self.sampling.max_response_length} tokens needs "
                f"{self.table_width + 2} pages of {self.page_size} tokens on a device, "
                f"cache_gb={_ceil(self.least_bytes / 1e9):g}"
            )
        return int(min(most, round(room) // self.page_bytes))

    def pool_bytes(self, responses: int) -> int:
        """Bytes of the pool of pages on a device, for so many responses."""
        return self.pages_of(self.cache.gb * 1e9, responses) * self.page_bytes

    def generate(self, params, requests, *, group_size, seed, step=0, progress=None, until=None):
        """Samples `group_size` responses to each of `requests`.

        The noise of a token depends only on (seed, step, prompt_id, sample_id, position), the step
        being the one that began the response. A response that goes on from an earlier call is read
        again, as its keys and values are those of these weights: so its log-probs are those of one
        policy each, and a run that was stopped goes on alike.

        Args:
          params: the decoder's parameters.
          requests: Requests that differ in step or prompt_id.
          group_size: samples of each prompt.
          seed: of the run.
          step: steps that the policy has taken, and the step of requests that name none; each step
            draws other noise.
          progress: called with (finished, total) responses whenever some finish.
          until: asked every chunk_length decode steps with a list that says of each response
            whether it has ended; the call ends when it answers True. None: when all have ended.

        Returns:
          The Responses, request-major and then by sample_id, and RolloutStats. One that has not
          ended may go on by `Request.begun`.

        Raises:
          ValueError: naming the request or the argument that cannot be served.
          FloatingPointError: a log-probability is not finite.
        """
        requests = list(requests)
        _check_call(group_size, seed, step)
        for request in requests:
            self._check_request(request)
            self._check_group(request, group_size)
        counts = collections.Counter(request.key for request in requests)
        twice = sorted(prompt_id for (_, prompt_id), count in counts.items() if count > 1)
        if twice:
            raise ValueError(f"prompt_id must be distinct; these repeat: {twice[:10]}")
        if self.cache.gb is None:
            # Asked once: a pool of another size would be another program.
            self.take_room(bytes_left(self.device))
        started = time.perf_counter()
        with CompileClock() as clock:
            loop = Loop(self, params, requests, group_size, (seed, step))
            loop.run(progress, until)
        return loop.responses, loop.stats(clock, time.perf_counter() - started)

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
        if self.how.model.vision is not None and tokens[-1] == self.how.model.image_token_id:
            raise ValueError(f"{name} ends with an image; a response follows text")

    def _check_group(self, request, group_size):
        name = f"prompt_id {request.prompt_id}"
        if isinstance(request.limit, tuple) and len(request.limit) != group_size:
            raise ValueError(f"{name} has {len(request.limit)} limits, not {group_size}")
        if min(request.limits(group_size, self.sampling.max_response_length)) < 1:
            raise ValueError(f"{name} has limit {request.limit}; it must be >= 1, or None")
        if request.begun and len(request.begun) != group_size:
            raise ValueError(f"{name} has {len(request.begun)} responses begun, not {group_size}")
        if request.step is not None and not 0 <= request.step < ID_LIMIT:
            raise ValueError(f"{name} has step {request.step}; it must lie in [0, 2**32)")
        for begun in request.begun:
            read = 0 if begun.expert_ids is None else len(begun.expert_ids) + 1
            if self.record_experts and not begun.ended and read != len(begun.tokens):
                raise ValueError(
                    f"{name}, sample_id {begun.sample_id} goes on with {len(begun.tokens)} tokens "
                    f"and the expert ids of {read}: sample with record_experts=True"
                )


def _own_device():
    """Returns the device without a layout: of several processes, one of this process."""
    devices = available_devices()
    own = [device for device in devices if device.process_index == jax.process_index()]
    return (own or devices)[0]


def _kernel(how, cache, platform):
    """Returns the paged attention of an engine.

    Raises:
      ValueError: a page size or a type that the platform's kernel refuses, or a named kernel that
        does not fit.
    """
    usual = PAGE_SIZES.get(platform, 64)
    needs = {"platform": platform, "head_dim": how.model.head_dim}
    found = paged_attention.resolve(
        how.paged_attention,
        page_size=cache.page_size or usual,
        dtype=cache.dtype or how.dtype,
        **needs,
    )
    if how.paged_attention != "auto" or found != "reference":
        return found
    # The reference reads every page of a table: not what was meant by another size or type.
    better = paged_attention.resolve("auto", page_size=usual, dtype=how.dtype, **needs)
    if better == "reference":
        return found
    size = paged_attention.resolve("auto", page_size=usual, dtype=cache.dtype or how.dtype, **needs)
    if size == "reference":
        raise ValueError(f"cache_dtype={cache.dtype!r}: no kernel of {platform} reads such pages")
    raise ValueError(
        f"page_size={cache.page_size}: the paged attention of {platform}, {better!r}, takes no "
        f"such pages; it takes those of {usual} tokens"
    )


def _check_layout(layout, config):
    if layout is None:
        return
    if layout.table != "rollout":
        raise MeshError(f'layout must be of the table "rollout", not {layout.table!r}')
    samples = {d.process_index for d in layout.mesh.devices.flat}
    if len(samples) > 1:
        raise MeshError(
            f"layout has devices of the processes {sorted(samples)}, and one samples on its own: "
            "hand over sharding.on_own_devices(layout)"
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


def _ceil(value, digits=3):
    """Rounds up to a few digits."""
    step = 10 ** (np.floor(np.log10(value)) - digits + 1)
    return np.ceil(value / step) * step
