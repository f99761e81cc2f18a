"""Plans: the place of each sequence in the rows that a model reads.

NumPy in, NumPy out. A plan may lay one sequence per row, or several in dense rows.
"""

import dataclasses
import functools
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from luspo_jax.ops.sizes import bucket_count


@dataclasses.dataclass(frozen=True)
class Plan:
    """Places of B sequences in rows [R, T] and in arrays [B', width] with one row per response.

    Rows and responses are cut into `num_microbatches` equal parts each: a micro-batch reads
    `rows_per_microbatch` rows and `responses_per_microbatch` responses. Rows and responses without
    a sequence are empty.

    Attributes:
      lengths_B: tokens of each sequence, prompt and response.
      rows_B: row of each sequence, counted over all micro-batches.
      starts_B: position of its first token in that row.
      places_B: its index among the responses of all micro-batches.
      width: length of the arrays with one row per response; no sequence is longer.
      row_length: tokens of a row that the model reads.
      rows_per_microbatch: rows that are computed together.
      responses_per_microbatch: responses of a micro-batch, rounded up.
      num_microbatches: micro-batches, rounded up; those at the end are empty.
      metrics: how full dense rows are; empty for one sequence per row.
    """

    lengths_B: np.ndarray
    rows_B: np.ndarray
    starts_B: np.ndarray
    places_B: np.ndarray
    width: int
    row_length: int
    rows_per_microbatch: int
    responses_per_microbatch: int
    num_microbatches: int
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        order = np.lexsort((self.starts_B, self.rows_B))
        starts = (self.rows_B * self.row_length + self.starts_B)[order]
        if np.any(starts[:-1] + self.lengths_B[order][:-1] > starts[1:]):
            raise ValueError("the plan lays two sequences over each other")

    @property
    def num_rows(self) -> int:
        """R: rows of all micro-batches."""
        return self.num_microbatches * self.rows_per_microbatch

    @property
    def num_responses(self) -> int:
        """B': responses of all micro-batches, empty ones included."""
        return self.num_microbatches * self.responses_per_microbatch

    @property
    def parts_B(self) -> np.ndarray:
        """The micro-batch of each sequence."""
        return self.rows_B // self.rows_per_microbatch

    @property
    def used_microbatches(self) -> int:
        """The number of micro-batches up to the last one with a sequence."""
        return int(self.parts_B.max()) + 1

    @property
    def firsts_B(self) -> np.ndarray:
        """int32 start of each sequence in its micro-batch's concatenated rows."""
        rows_B = self.rows_B % self.rows_per_microbatch
        return (rows_B * self.row_length + self.starts_B).astype(np.int32)

    def lay(self, values: Sequence[np.ndarray], fill: int = 0) -> np.ndarray:
        """Lays per-token values of the B sequences into rows [R, T, …]; `fill` elsewhere.

        Raises:
          ValueError: the number of values differs from the sequence's length.
        """
        sizes = np.array([len(x) for x in values])
        if not np.array_equal(sizes, self.lengths_B):
            raise ValueError("values to lay belong to other sequences than the plan was made for")
        flat = np.concatenate(values)
        rows = np.full((self.num_rows * self.row_length, *flat.shape[1:]), fill, flat.dtype)
        rows[self._at] = flat
        return rows.reshape(self.num_rows, self.row_length, *flat.shape[1:])

    def take(self, rows_RT: np.ndarray) -> list[np.ndarray]:
        """Extracts values [R, T, …] as one array per sequence; each is a separate copy."""
        flat = rows_RT.reshape(-1, *rows_RT.shape[2:])
        starts_B = self.rows_B * self.row_length + self.starts_B
        return [flat[a : a + n].copy() for a, n in zip(starts_B, self.lengths_B, strict=True)]

    def place(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Places values of the last tokens of each sequence in [B', width]; 0 elsewhere.

        Each response has one value per token, which is placed at that token.
        """
        sizes_B = np.array([len(x) for x in values])
        placed = np.zeros((self.num_responses, self.width), values[0].dtype)
        starts_B = self.places_B * self.width + self.lengths_B - sizes_B
        placed.reshape(-1)[_runs(starts_B, sizes_B)] = np.concatenate(values)
        return placed

    def place_one(self, values_B: np.ndarray) -> np.ndarray:
        """Places one value per sequence in [B']; 0 at empty responses."""
        placed = np.zeros((self.num_responses, *values_B.shape[1:]), values_B.dtype)
        placed[self.places_B] = values_B
        return placed

    def take_last(self, placed_BT: np.ndarray, sizes_B: Sequence[int]) -> list[np.ndarray]:
        """Extracts the values of the last `sizes_B` tokens of each sequence from [B', width]."""
        return [
            placed_BT[place, length - size : length].copy()
            for place, length, size in zip(self.places_B, self.lengths_B, sizes_B, strict=True)
        ]

    @functools.cached_property
    def _at(self):
        """Returns the flat row positions of all tokens, sequence by sequence."""
        return _runs(self.rows_B * self.row_length + self.starts_B, self.lengths_B)


def one_a_row(
    lengths_B: np.ndarray, *, width: int, rows_per_microbatch: int, num_rows: int | None = None
) -> Plan:
    """Lays one sequence per row, in order; rows beyond the sequences are empty.

    Args:
      lengths_B: tokens of each sequence.
      width: tokens of a row.
      rows_per_microbatch: rows that are computed together.
      num_rows: number of rows; by default one per sequence.

    Raises:
      ValueError: a sequence fits no row, or the rows do not divide into whole micro-batches.
    """
    lengths_B = _checked(lengths_B, width)
    count, rows_B = num_rows or len(lengths_B), np.arange(len(lengths_B))
    if count % rows_per_microbatch or count < len(lengths_B):
        raise ValueError(
            f"{len(lengths_B)} responses in {count} rows make no whole micro-batches of "
            f"{rows_per_microbatch} rows"
        )
    return Plan(
        lengths_B=lengths_B,
        rows_B=rows_B,
        starts_B=np.zeros_like(rows_B),
        places_B=rows_B,
        width=width,
        row_length=width,
        rows_per_microbatch=rows_per_microbatch,
        responses_per_microbatch=rows_per_microbatch,
        num_microbatches=count // rows_per_microbatch,
    )


def packed(lengths_B: np.ndarray, *, width: int, row_length: int, rows_per_microbatch: int) -> Plan:
    """Packs sequences into as few micro-batches as a longest-first rule needs.

    Each sequence, longest first, goes to the emptiest row; if it does not fit, micro-batches are
    added. First-fit would save 2 % of the rows but crowd the short sequences into a few of them,
    and a batch has room for the most responses of any micro-batch. Rows of similar work, Σ length²,
    are computed together: devices that share a micro-batch wait for the slowest. The same lengths
    give the same plan.

    Args:
      lengths_B: tokens of each sequence, prompt and response.
      width: length of the arrays with one row per response.
      row_length: tokens of a packed row.
      rows_per_microbatch: packed rows that are computed together.

    Raises:
      ValueError: naming a sequence that fits no row.
    """
    lengths_B = _checked(lengths_B, min(row_length, width))
    rows_B, starts_B = _spread(lengths_B, row_length, rows_per_microbatch)
    work_R = np.bincount(rows_B, weights=lengths_B.astype(np.float64) ** 2)
    rank_R = np.empty(len(work_R), np.int64)
    rank_R[np.argsort(-work_R, kind="stable")] = np.arange(len(work_R))
    rows_B = rank_R[rows_B]
    parts_B = rows_B // rows_per_microbatch
    responses = bucket_count(np.bincount(parts_B).max())
    used = int(parts_B.max()) + 1
    rows = used * rows_per_microbatch
    return Plan(
        lengths_B=lengths_B,
        rows_B=rows_B,
        starts_B=starts_B,
        places_B=parts_B * responses + _number_within(parts_B, rows_B, starts_B),
        width=width,
        row_length=row_length,
        rows_per_microbatch=rows_per_microbatch,
        responses_per_microbatch=responses,
        num_microbatches=bucket_count(used),
        metrics={
            "packing/padding": 1 - int(lengths_B.sum()) / (rows * row_length),
            "packing/microbatches": used,
            "packing/rows": rows,
        },
    )


def segment_numbers(plan: Plan) -> np.ndarray:
    """Returns the segment id of each sequence: 1, 2, … along its row."""
    return 1 + _number_within(plan.rows_B, plan.starts_B)


def _checked(lengths_B, most):
    lengths_B = np.asarray(lengths_B, np.int64)
    wrong = np.flatnonzero((lengths_B < 1) | (lengths_B > most))
    if wrong.size or not lengths_B.size:
        what = (
            f"sequence {wrong[0]} has {lengths_B[wrong[0]]} tokens" if wrong.size else "none came"
        )
        raise ValueError(f"rows take sequences of 1 to {most} tokens, and {what}")
    return lengths_B


def _runs(starts_B, sizes_B):
    """Returns start, start + 1, … for each run, concatenated."""
    ends_B = np.cumsum(sizes_B)
    return np.arange(ends_B[-1]) + np.repeat(starts_B - (ends_B - sizes_B), sizes_B)


def _spread(lengths_B, row_length, rows_per_microbatch):
    """Returns (rows_B, starts_B): longest first, each to the emptiest row, in few rows."""
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
        parts += max(1, parts // 200)  # half a percent more rows at a time


def _number_within(parts_B, *keys):
    """Numbers the entries of each part 0, 1, 2, … in the order of the keys, first key first."""
    order = np.lexsort((*reversed(keys), parts_B))
    first = np.searchsorted(parts_B[order], parts_B[order])
    numbers_B = np.empty(len(order), np.int64)
    numbers_B[order] = np.arange(len(order)) - first
    return numbers_B
