"""Plays rollouts at assumed lengths: the engine's own loop, over devices that only count.

Which responses have pages, which are read, decoded or preempted is what the loop and its schedule
say. Shapes of programs are those that it calls.
"""

import collections
import copy
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from luspo_jax.ops.paged_prefill import Runs
from luspo_jax.ops.sizes import rounded_up
from luspo_jax.rollout import Engine, Request
from luspo_jax.rollout.loop import Loop
from luspo_jax.rollout.programs import Chunk, Rows
from luspo_jax.rollout.schedule import Job

_STOP, _OTHER = 1, 0  # the only tokens that are drawn
_LOADED = {"tpu": 512}  # entries that a kernel loads in one piece; others load a page or less


@dataclasses.dataclass(frozen=True)
class Read:
    """Prefills of one shape.

    Attributes:
      rows, length: of the program, all devices together.
      before: entries of pages that a row reads before its run, the longest on any device.
      calls: of the program.
    """

    rows: int
    length: int
    before: int
    calls: int


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Decode steps between two looks from the host.

    Attributes:
      steps: of all rows.
      rows: of the program, all devices together.
      live: those that draw or read a token, on average over the steps.
      entries: keys that are loaded for these, summed over the steps, on the device that loads the
        most; where positions are dealt out, on all devices that share them.
    """

    steps: int
    rows: int
    live: float
    entries: float


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What a host does until it waits for the others."""

    prefills: tuple[Read, ...]
    chunks: tuple[Decoded, ...]


@dataclasses.dataclass(frozen=True)
class Played:
    """Rollouts of one host or several. Counts are of a host in one step, or means of these.

    Attributes:
      stretches: in order, of each host; all hosts wait for the slowest at the end of each.
      rollouts: steps that all stretches together are worth.
      copies: pages that copying programs are called with on a device, summed over calls.
      steps: decode steps until the last response ends, or until enough groups are complete.
      utilisation: share of row-steps that produce a token.
      pages: of the pool on a device.
      peak: the most pages in use at a time, of all devices of a host.
      preemptions: responses that gave their pages back.
      recomputed: tokens that were read again for it.
      continued: tokens of earlier steps' responses that were read again before these went on.
      age: steps between the one that begins a group and the one that takes it, on average.
      inputs: name → abstract inputs of the largest "prefill" (runs, tokens), "copy pages"
        (sources, targets) and "decode chunk" (rows).
    """

    stretches: tuple[tuple[Stretch, ...], ...]
    rollouts: float
    copies: float
    steps: float
    utilisation: float
    pages: int
    peak: int
    preemptions: float
    recomputed: float
    continued: float
    age: float
    inputs: dict[str, Any]

    @property
    def prefills(self) -> list[Read]:
        """Prefills by shape, of all hosts and steps."""
        return [one for hosts in self.stretches for part in hosts for one in part.prefills]

    @property
    def chunks(self) -> list[Decoded]:
        """Decode steps, of all hosts and steps."""
        return [one for hosts in self.stretches for part in hosts for one in part.chunks]

    @property
    def shares(self) -> float:
        """Number of hosts times steps."""
        return self.rollouts * len(self.stretches[0])


def played(engine: Engine, prompt: int, lengths: Sequence[int], group_size: int) -> Played:
    """Plays the responses of one host until all have ended.

    Args:
      engine: of the host; its pool has a size.
      prompt: tokens of every prompt; no two begin with the same. Pixels change nothing here.
      lengths: of the responses, a prompt's side by side.
      group_size: of each prompt.
    """
    requests = [asked(number, prompt) for number in range(len(lengths) // group_size)]
    host = Host(engine, requests, prompt, np.reshape(lengths, (-1, group_size)))
    host.loop.run(None)
    return host.played([host.stretch()])


def joined(steps: Sequence[Sequence[Played]], rollouts: float, age: float) -> Played:
    """Returns what several steps of several hosts are together.

    Args:
      steps: the hosts' calls of each step; all hosts wait at the same places.
      rollouts: steps that they are worth.
      age: of the groups taken.
    """
    calls = [call for hosts in steps for call in hosts]
    shares = rollouts * len(steps[0])
    return Played(
        stretches=tuple(
            tuple(part for (part,) in parts)
            for hosts in steps
            for parts in zip(*(call.stretches for call in hosts), strict=True)
        ),
        rollouts=rollouts,
        utilisation=statistics.mean(call.utilisation for call in calls),
        pages=calls[0].pages,
        peak=max(call.peak for call in calls),
        age=age,
        inputs=max(calls, key=_rows).inputs,
        **{name: sum(getattr(call, name) for call in calls) / shares for name in _COUNTS},
    )


_COUNTS = ("copies", "steps", "preemptions", "recomputed", "continued")


def _rows(call):
    rows = call.inputs["decode chunk"]
    return 0 if rows is None else len(rows.tokens_B)


def asked(number: int, prompt: int, step: int | None = None) -> Request:
    """Returns the request of a prompt of so many tokens, which `step` begins."""
    tokens = np.full(prompt, _OTHER, np.int32)
    tokens[0] = number
    return Request(number, tokens, step=step)


class Host:
    """A call of a host's engine, whose responses end at given lengths."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], prompt: int, lengths_PG: np.ndarray
    ):
        """
        Args:
          engine: of the host.
          requests: as `asked` makes them.
          prompt: tokens of each.
          lengths_PG: of the responses to each prompt, by its id.
        """
        self.engine = engine = copy.copy(engine)
        engine.sampling = dataclasses.replace(engine.sampling, stop_token_ids=(_STOP,))
        self.device = _Counting(engine, prompt, lengths_PG)
        group_size = lengths_PG.shape[1]
        self.loop = Loop(engine, None, requests, group_size, (0, 0), self.device)

    def whole(self, ended: Sequence[bool]) -> list[bool]:
        """Returns whether all responses of each group have ended."""
        size = self.loop.group_size
        return [all(ended[i : i + size]) for i in range(0, len(ended), size)]

    def stretch(self) -> Stretch:
        """Returns what was done since this was asked last."""
        device = self.device
        found, device.prefills = collections.Counter(device.prefills), []
        chunks, device.chunks = tuple(device.chunks), []
        return Stretch(tuple(Read(*shape, calls) for shape, calls in found.items()), chunks)

    def played(self, stretches: Sequence[Stretch]) -> Played:
        """Returns the call, which consists of the stretches."""
        loop, device = self.loop, self.device
        return Played(
            stretches=tuple((one,) for one in stretches),
            rollouts=1,
            copies=device.copied,
            steps=loop.decode_steps,
            utilisation=loop.generated / max(1, loop.row_steps),
            pages=loop.num_pages,
            peak=max(loop.in_use, default=0),
            preemptions=sum(shard.preemptions for shard in loop.shards),
            recomputed=loop.read["again"],
            continued=loop.read["continued"],
            age=0.0,
            inputs=_inputs(self.engine, loop, device),
        )


def _inputs(engine, loop, device):
    """Abstract inputs of the largest programs that any lengths can lead to."""
    parts, prompt = engine.row_multiple, np.zeros(engine.max_prompt_length, np.int32)
    pictured = engine.how.model.vision is not None
    request = Request(0, prompt, images=(None,) if pictured else ())
    T = loop.run_length([Job(request, np.zeros(engine.max_length - 1, np.int32), [], 0)])
    R = parts * rounded_up(max(1, engine.max_prefill_tokens // (T * parts)), 1)
    numbers = jax.ShapeDtypeStruct((R,), np.int32)
    tables = jax.ShapeDtypeStruct((R, engine.table_width), np.int32)
    runs = Runs(tables, numbers, numbers), (jax.ShapeDtypeStruct((R, T), np.int32), numbers)
    copied = jax.ShapeDtypeStruct((parts * loop.counts[0],), np.int32)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), device.rows)
    return {"prefill": runs, "copy pages": (copied, copied), "decode chunk": rows}


class _Counting:
    """Has the functions of `rollout.programs`; responses end at given lengths."""

    def __init__(self, engine, prompt, lengths_PG):
        self.parts = engine.row_multiple
        sharing = engine.page_tokens // engine.page_size
        kernel = engine.how.paged_attention
        self.piece = _LOADED.get(kernel, engine.page_size) * sharing
        self.whole = engine.table_width * engine.page_tokens if kernel == "reference" else 0
        self.prompt, self.lengths_PG = prompt, lengths_PG
        self.prefills, self.chunks, self.copied = [], [], 0
        self.rows = None  # of the largest chunk

    def empty_pages(self, **_):
        return ()

    def prefill(self, params, pages, runs, tokens, images, *, how, record):
        R, T = tokens[0].shape
        self.prefills.append((R, T, int(np.max(runs.starts_R))))
        return pages, np.zeros((R, T, 0, 0), np.uint8) if record else None

    def copy_pages(self, pages, sources_N, targets_N, *, layout):
        self.copied += len(sources_N) // self.parts
        return pages

    def decode_chunk(self, params, pages, rows: Rows, *, how, sampling, chunk_length, record):
        if self.rows is None or len(rows.tokens_B) > len(self.rows.tokens_B):
            self.rows = rows
        places, B = rows.places, len(rows.tokens_B)
        real_B, drawn_B = places.real_B, rows.drawn_B
        lengths_B = self.lengths_PG[rows.prompt_ids_B, rows.sample_ids_B]
        draws_B = np.where(drawn_B, 0, lengths_B + self.prompt - 1 - places.positions_B)
        reads_B = np.where(real_B, draws_B + (record | drawn_B), 0)
        # The step after which so many rows have no work.
        ends_at = np.sort(reads_B)[min(B, int(rows.leave_at)) - 1]
        steps = min(int(rows.max_steps), int(ends_at))
        read_B = np.minimum(reads_B, steps)
        count_B = np.where(real_B, np.minimum(draws_B, steps), 0)
        # A row rarely ends where a piece does.
        seen_B = read_B * (places.positions_B + 1 + self.piece / 2) + read_B * (read_B - 1) / 2
        if self.whole:
            seen_B = np.full(B, steps * self.whole)
        most = float(seen_B.reshape(self.parts, -1).sum(axis=1).max())
        self.chunks.append(Decoded(steps, B, float(read_B.sum()) / steps, most))
        tokens_CB = np.full((steps, B), _OTHER, np.int32)
        last_B = real_B & (count_B > 0) & (count_B == draws_B)
        tokens_CB[count_B[last_B] - 1, np.flatnonzero(last_B)] = _STOP
        chunk = Chunk(
            tokens_CB=tokens_CB,
            logprobs_CB=np.zeros((steps, B), np.float32),
            counts_B=count_B,
            read_B=read_B,
            live_B=reads_B > steps,
            steps=steps,
            expert_ids_CBLK=np.zeros((steps, B, 0, 0), np.uint8) if record else None,
        )
        return pages, chunk
