"""Rollouts → training rows: one sequence a row, and dense rows that hold several."""

import dataclasses
import heapq
from collections.abc import Sequence

import jax
import numpy as np

from luspo_jax.ops.sizes import bucket_count
from luspo_jax.types import PackedRows, TokenBatch, TrainBatch


def padded_rows(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, length: int, pad_id: int
) -> TokenBatch:
    """One sequence a row: prompt, response, padding up to `length`.

    Args:
      prompts: B int arrays of prompt tokens.
      responses: B int arrays of response tokens, stop token included.
      length: T.
      pad_id: any valid token; padding is known by its segment id 0.

    Returns:
      A TokenBatch of NumPy arrays [B, T].

    Raises:
      ValueError: naming the row that does not fit.
    """
    rows = len(prompts)
    tokens_BT = np.full((rows, length), pad_id, np.int32)
    segment_ids_BT = np.zeros((rows, length), np.int32)
    response_mask_BT = np.zeros((rows, length), bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        if end > length or not start:
            raise ValueError(
                f"row {row} ({start} prompt + {len(response)} response tokens) does not fit in "
                f"{length} or has no prompt"
            )
        tokens_BT[row, :start] = prompt
        tokens_BT[row, start:end] = response
        segment_ids_BT[row, :end] = 1
        response_mask_BT[row, start:end] = True
    positions_BT = np.where(segment_ids_BT > 0, np.arange(length, dtype=np.int32)[None], 0)
    return TokenBatch(tokens_BT, positions_BT.astype(np.int32), segment_ids_BT, response_mask_BT)


def response_mask(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, length: int
) -> np.ndarray:
    """Bool [B, T]: true on every response token of `padded_rows`, whatever is trained on."""
    starts_B = np.array([len(prompt) for prompt in prompts])[:, None]
    ends_B = starts_B + np.array([len(response) for response in responses])[:, None]
    places = np.arange(length)[None]
    return (places >= starts_B) & (places < ends_B)


def place_responses(
    values: Sequence[np.ndarray], response_mask_BT: np.ndarray, dtype: type = np.float32
) -> np.ndarray:
    """Per-token values of B responses → [B, T], each at the token it belongs to, 0 elsewhere."""
    placed_BT = np.zeros(response_mask_BT.shape, dtype)
    placed_BT[response_mask_BT] = np.concatenate([np.asarray(v, dtype) for v in values])
    return placed_BT


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where B sequences lie in packed rows, and where each goes among the rows of a batch.

    A batch has `num_microbatches` · `responses_per_microbatch` rows, of which a micro-batch reads
    its own; those that no sequence goes to are empty.

    Attributes:
      lengths_B: tokens of each sequence.
      rows_B: the packed row that each lies in, counted through all micro-batches.
      starts_B: place of its first token in that row.
      places_B: its row in the batch.
      row_length: tokens of a packed row.
      rows_per_microbatch: packed rows of a micro-batch.
      responses_per_microbatch: rows of the batch that a micro-batch reads, rounded up.
      num_microbatches: rounded up; those at the end are empty.
      used_microbatches: those that are not empty.
    """

    lengths_B: np.ndarray
    rows_B: np.ndarray
    starts_B: np.ndarray
    places_B: np.ndarray
    row_length: int
    rows_per_microbatch: int
    responses_per_microbatch: int
    num_microbatches: int
    used_microbatches: int

    @property
    def metrics(self) -> dict[str, float]:
        """What packing makes of the sequences; empty micro-batches are not computed."""
        rows = self.used_microbatches * self.rows_per_microbatch
        return {
            "packing/padding": 1 - int(self.lengths_B.sum()) / (rows * self.row_length),
            "packing/microbatches": self.used_microbatches,
            "packing/rows": rows,
        }


def plan(lengths_B: np.ndarray, *, row_length: int, rows_per_microbatch: int) -> Plan:
    """Lays sequences into the fewest micro-batches that a longest-first rule fills.

    Each sequence, the longest first, goes to the row with the least in it; where one does not fit,
    a micro-batch is added. First-fit would save 2 % of the rows and leave all short sequences to a
    few of them, and a batch has room for the most that any micro-batch holds. Rows of like work,
    Σ length², are computed together: devices that share a micro-batch wait for the slowest.
    The same lengths give the same plan.

    Args:
      lengths_B: tokens of each sequence, prompt and response.
      row_length: tokens of a packed row.
      rows_per_microbatch: packed rows that are computed together.

    Raises:
      ValueError: naming a sequence that fits no row.
    """
    lengths_B = np.asarray(lengths_B, np.int64)
    wrong = np.flatnonzero((lengths_B < 1) | (lengths_B > row_length))
    if wrong.size or not lengths_B.size:
        what = (
            f"sequence {wrong[0]} has {lengths_B[wrong[0]]} tokens" if wrong.size else "none came"
        )
        raise ValueError(f"packing takes sequences of 1 to {row_length} tokens, and {what}")
    rows_B, starts_B = _spread(lengths_B, row_length, rows_per_microbatch)
    work_R = np.bincount(rows_B, weights=lengths_B.astype(np.float64) ** 2)
    rank_R = np.empty(len(work_R), np.int64)
    rank_R[np.argsort(-work_R, kind="stable")] = np.arange(len(work_R))
    rows_B = rank_R[rows_B]
    parts_B = rows_B // rows_per_microbatch
    responses = bucket_count(np.bincount(parts_B).max())
    used = int(parts_B.max()) + 1
    return Plan(
        lengths_B=lengths_B,
        rows_B=rows_B,
        starts_B=starts_B,
        places_B=parts_B * responses + _number_within(parts_B, rows_B, starts_B),
        row_length=row_length,
        rows_per_microbatch=rows_per_microbatch,
        responses_per_microbatch=responses,
        num_microbatches=bucket_count(used),
        used_microbatches=used,
    )


def packed_batch(batch: TrainBatch, plan: Plan) -> TrainBatch:
    """The batch row by row where the plan puts each, with packed rows; other rows are all 0."""
    placed = jax.tree.map(lambda x: to_places(x, plan), dataclasses.replace(batch, rows=None))
    return dataclasses.replace(placed, rows=packed_rows(batch.rows, plan))


def packed_rows(rows: TokenBatch, plan: Plan) -> TokenBatch:
    """The rows where the plan puts each, with the packed rows that the model reads.

    Raises:
      ValueError: rows that the plan was not made for, or that it does not keep apart.
    """
    present_BT = rows.segment_ids_BT > 0
    width = present_BT.shape[1]
    if not np.array_equal(present_BT, np.arange(width) < plan.lengths_B[:, None]):
        raise ValueError("rows to pack hold other sequences than the plan was made for")
    first_B = plan.rows_B * plan.row_length + plan.starts_B
    at = (first_B[:, None] + np.arange(width))[present_BT]
    size = plan.num_microbatches * plan.rows_per_microbatch

    def laid(x_BT):
        x_RT = np.zeros((size, plan.row_length, *x_BT.shape[2:]), x_BT.dtype)
        x_RT.reshape(-1, *x_BT.shape[2:])[at] = x_BT[present_BT]
        return x_RT

    segments_B = 1 + _number_within(plan.rows_B, plan.starts_B)
    segment_ids_RT = laid(np.broadcast_to(segments_B[:, None], present_BT.shape).astype(np.int32))
    if np.count_nonzero(segment_ids_RT) != len(at):
        raise ValueError("the plan lays two sequences over each other")
    packed = PackedRows(
        tokens_RT=laid(rows.tokens_BT),
        positions_RT=laid(rows.positions_BT),
        segment_ids_RT=segment_ids_RT,
        response_mask_RT=laid(rows.response_mask_BT),
        starts_B=to_places(_start_in_microbatch(plan), plan),
        rows_per_microbatch=plan.rows_per_microbatch,
        experts=jax.tree.map(laid, rows.experts),
        units_RT=None if rows.units_BT is None else laid(rows.units_BT),
    )
    own = dataclasses.replace(rows, packed=None, experts=None, units_BT=None, images=None)
    placed = jax.tree.map(lambda x: to_places(x, plan), own)
    return dataclasses.replace(placed, packed=packed, images=rows.images)


def to_places(values: np.ndarray, plan: Plan) -> np.ndarray:
    """[B, …] → the rows of a packed batch; 0 where no sequence goes."""
    size = plan.num_microbatches * plan.responses_per_microbatch
    placed = np.zeros((size, *values.shape[1:]), values.dtype)
    placed[plan.places_B] = values
    return placed


def from_places(values: np.ndarray, plan: Plan) -> np.ndarray:
    """The rows of a packed batch → [B, …], in the order of the sequences."""
    return values[plan.places_B]


def from_rows(values_RT: np.ndarray, plan: Plan, width: int) -> np.ndarray:
    """Packed rows [R, T, …] → [B, width, …], a sequence each; 0 after its end."""
    present_BT = np.arange(width) < plan.lengths_B[:, None]
    first_B = plan.rows_B * plan.row_length + plan.starts_B
    values_BT = np.zeros((*present_BT.shape, *values_RT.shape[2:]), values_RT.dtype)
    at = (first_B[:, None] + np.arange(width))[present_BT]
    values_BT[present_BT] = values_RT.reshape(-1, *values_RT.shape[2:])[at]
    return values_BT


def _spread(lengths_B, row_length, rows_per_microbatch):
    """(rows_B, starts_B): longest first, each to the emptiest row of as few as it takes."""
    order = np.argsort(-lengths_B, kind="stable")
    parts = -(-int(lengths_B.sum()) // (row_length * rows_per_microbatch))
    while True:
        rows_B, starts_B = np.zeros((2, len(lengths_B)), np.int64)
        filled = [(0, row) for row in range(parts * rows_per_microbatch)]
        for index in order:
            fill, row = filled[0]
            if fill + lengths_B[index] > row_length:
                break
            rows_B[index], starts_B[index] = row, fill
            heapq.heapreplace(filled, (fill + int(lengths_B[index]), row))
        else:
            return rows_B, starts_B
        parts += max(1, parts // 200)  # half a percent of rows at a time


def _number_within(parts_B, *keys):
    """0, 1, 2, … along each part, in the order of the keys, the first of which counts most."""
    order = np.lexsort((*reversed(keys), parts_B))
    first = np.searchsorted(parts_B[order], parts_B[order])
    numbers_B = np.empty(len(order), np.int64)
    numbers_B[order] = np.arange(len(order)) - first
    return numbers_B


def _start_in_microbatch(plan):
    rows_B = plan.rows_B % plan.rows_per_microbatch
    return (rows_B * plan.row_length + plan.starts_B).astype(np.int32)
