"""Plans: the place of each sequence in the rows that a model reads.

NumPy in, NumPy out. A plan may lay one sequence per row, or several in dense rows, in which those
of one prompt may share it: the prompt is laid once, without its last token, and behind it each
sequence's rest, which begins with that token because it predicts a response's first. The prompt is
then a trunk and the rests are its branches (`ops.segments`).
"""

import dataclasses
import functools
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from luspo_jax.ops import segments
from luspo_jax.ops.sizes import bucket_count, bucket_length
from luspo_jax.types import Sequences


@dataclasses.dataclass(frozen=True)
class Trunks:
    """What sequences may share.

    Attributes:
      ids_B: equal for sequences that begin with the same tokens.
      lengths_B: number of those tokens; less than the sequence's.
    """

    ids_B: np.ndarray
    lengths_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """Places of B sequences in rows [R, T] and in arrays [B', width] with one row per response.

    Rows and responses are cut into `num_microbatches` equal parts each: a micro-batch reads
    `rows_per_microbatch` rows and `responses_per_microbatch` responses. Rows and responses without
    a sequence are empty.

    Attributes:
      lengths_B: tokens of each sequence, prompt and response.
      rows_B: row of each sequence, counted over all micro-batches.
      starts_B: position of its first token in that row; of a branch, of its first own token.
      places_B: its index among the responses of all micro-batches.
      width: length of the arrays with one row per response; no sequence is longer.
      row_length: tokens of a row that the model reads.
      rows_per_microbatch: rows that are computed together.
      responses_per_microbatch: responses of a micro-batch, rounded up.
      num_microbatches: micro-batches, rounded up; those at the end are empty.
      metrics: how full dense rows are; empty for one sequence per row.
      trunks_B: position in the row of the trunk that a branch continues; of others `starts_B`.
      shared_B: tokens of a branch that lie in its trunk; 0 for others.
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
    trunks_B: np.ndarray | None = None
    shared_B: np.ndarray | None = None

    def __post_init__(self):
        if self.shared_B is None:
            object.__setattr__(self, "shared_B", np.zeros_like(self.starts_B))
        trunks_B = self.starts_B if self.trunks_B is None else self.trunks_B
        trunks_B = np.where(self.shared_B > 0, trunks_B, self.starts_B)
        object.__setattr__(self, "trunks_B", trunks_B)
        firsts_B = self.rows_B * self.row_length
        sharing_B = self.shared_B > 0
        trunks = np.unique(
            np.stack([firsts_B + self.trunks_B, self.shared_B], axis=1)[sharing_B], axis=0
        )
        rests = np.stack([firsts_B + self.starts_B, self.lengths_B - self.shared_B], axis=1)
        runs = np.concatenate([trunks, rests])
        runs = runs[np.argsort(runs[:, 0], kind="stable")]
        if np.any(runs[:-1].sum(axis=1) > runs[1:, 0]) or np.any(rests[:, 1] < 1):
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
        """int32 start of each sequence in its micro-batch's concatenated rows.

        Of a branch, where it would start if its trunk lay before it: below 0 for some.
        """
        rows_B = self.rows_B % self.rows_per_microbatch
        return (rows_B * self.row_length + self.starts_B - self.shared_B).astype(np.int32)

    def lay(self, values: Sequence[np.ndarray], fill: int = 0) -> np.ndarray:
        """Lays per-token values of the B sequences into rows [R, T, …]; `fill` elsewhere.

        Of what sequences share, one's values are laid.

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
        return [flat[at] for at in self.positions()]

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

    def segments(self) -> list[np.ndarray]:
        """Returns the int32 segment id of each token of each sequence: 1, 2, … along a row."""
        keys_B = self.rows_B * self.row_length + self.trunks_B
        keys_K, of_B = np.unique(keys_B, return_inverse=True)
        trunks_B = 1 + _number_within(keys_K // self.row_length, keys_K)[of_B]
        rests_B = segments.branch(trunks_B, _number_within(keys_B, self.starts_B))
        rests_B = np.where(self.shared_B > 0, rests_B, trunks_B)
        return [
            np.repeat(np.array(ids, np.int32), (shared, length - shared))
            for *ids, shared, length in zip(
                trunks_B, rests_B, self.shared_B, self.lengths_B, strict=True
            )
        ]

    def positions(self) -> list[np.ndarray]:
        """Returns the position of each token of each sequence in the rows, one after another."""
        return np.split(self._at, np.cumsum(self.lengths_B)[:-1])

    def gathered(self, num_lengths: int, longest: int) -> Sequences:
        """Returns where sequences and trunks lie, for attention that gathers them.

        Args:
          num_lengths: number of possible widths, equally spaced up to `longest`.
          longest: the largest possible sequence length.
        """
        parts, size = self.num_microbatches, self.rows_per_microbatch * self.row_length
        B = self.responses_per_microbatch
        firsts_B = self.rows_B * self.row_length
        sharing_B = self.shared_B > 0
        keys_B = np.where(sharing_B, firsts_B + self.trunks_B, -1)
        starts_C, of_B = np.unique(keys_B, return_inverse=True)
        counts_C = np.zeros(len(starts_C), np.int64)
        counts_C[of_B] = self.shared_B
        first = int(starts_C[0] < 0)  # the one of all that share nothing
        starts_C, counts_C, of_B = starts_C[first:], counts_C[first:], of_B - first
        parts_C = starts_C // size
        C = bucket_count(np.bincount(parts_C).max()) if len(starts_C) else 0
        numbers_C = _number_within(parts_C, starts_C)
        own_B = self.lengths_B - self.shared_B
        width = bucket_length(int(own_B.max()), longest, num_buckets=num_lengths)
        trunk_width = bucket_count(counts_C.max()) if C else 0
        num_places = B * width + C * trunk_width

        def of_sequences(values_B, fill=0):
            laid = np.full(parts * B, fill, np.int32)
            laid[self.places_B] = values_B
            return laid

        def of_trunks(values_C):
            laid = np.zeros(parts * C, np.int32)
            laid[parts_C * C + numbers_C] = values_C
            return laid

        places_N = np.full(parts * size, num_places, np.int32)
        own_starts_B = firsts_B + self.starts_B
        places_N[_runs(own_starts_B, own_B)] = _runs(self.places_B % B * width, own_B)
        places_N[_runs(starts_C, counts_C)] = _runs(B * width + numbers_C * trunk_width, counts_C)
        trunks_B = np.full(len(own_B), C)
        trunks_B[sharing_B] = numbers_C[of_B[sharing_B]]
        return Sequences(
            starts_B=of_sequences(own_starts_B % size),
            counts_B=of_sequences(own_B),
            trunks_B=of_sequences(trunks_B, fill=C),
            trunk_starts_C=of_trunks(starts_C % size),
            trunk_counts_C=of_trunks(counts_C),
            places_RT=places_N.reshape(-1, self.row_length),
            width=width,
            trunk_width=trunk_width,
        )

    @functools.cached_property
    def _at(self):
        """Returns the flat row positions of all tokens, sequence by sequence."""
        firsts_B = self.rows_B * self.row_length
        starts_B2 = np.stack([firsts_B + self.trunks_B, firsts_B + self.starts_B], axis=1)
        sizes_B2 = np.stack([self.shared_B, self.lengths_B - self.shared_B], axis=1)
        return _runs(starts_B2.reshape(-1), sizes_B2.reshape(-1))


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


def packed(
    lengths_B: np.ndarray,
    *,
    width: int,
    row_length: int,
    rows_per_microbatch: int,
    trunks: Trunks | None = None,
) -> Plan:
    """Packs sequences into as few micro-batches as a longest-first rule needs.

    Each sequence, longest first, goes to the emptiest row; if it does not fit, micro-batches are
    added. First-fit would save 2 % of the rows but crowd the short sequences into a few of them,
    and a batch has room for the most responses of any micro-batch. Rows of similar work, Σ length²,
    are computed together: devices that share a micro-batch wait for the slowest. The same lengths
    give the same plan.

    Sequences that share a trunk go to one row, or by parts to several, each with a trunk of its
    own. Large parts share more and fill rows worse: parts of at most a row, half a row, … and
    sequences by themselves are tried, and what makes fewest micro-batches, then fewest tokens, is
    taken.

    Args:
      lengths_B: tokens of each sequence, prompt and response.
      width: length of the arrays with one row per response.
      row_length: tokens of a packed row.
      rows_per_microbatch: packed rows that are computed together.
      trunks: what may be shared; None for nothing.

    Raises:
      ValueError: naming a sequence that fits no row.
    """
    lengths_B = _checked(lengths_B, min(row_length, width))
    tried = []
    for parts_B in _partings(lengths_B, trunks, row_length):
        bundles = _bundled(lengths_B, parts_B, trunks)
        rows_C, starts_C = _spread(bundles.lengths_C, row_length, rows_per_microbatch)
        used = int(rows_C.max()) // rows_per_microbatch + 1
        tried.append(((used, int(bundles.lengths_C.sum())), bundles, rows_C, starts_C))
    (used, tokens), bundles, rows_C, starts_C = min(tried, key=lambda each: each[0])
    rows_B = rows_C[bundles.of_B]
    trunks_B = starts_C[bundles.of_B]
    shared_B = bundles.shared_B
    rests_B = (lengths_B - shared_B).astype(np.float64)
    trunk_work_C = np.zeros(len(rows_C))
    trunk_work_C[bundles.of_B] = shared_B.astype(np.float64) ** 2
    work_R = np.bincount(rows_C, weights=trunk_work_C)
    work_R += np.bincount(rows_B, weights=rests_B * (rests_B + 2 * shared_B))
    rank_R = np.empty(len(work_R), np.int64)
    rank_R[np.argsort(-work_R, kind="stable")] = np.arange(len(work_R))
    rows_B = rank_R[rows_B]
    starts_B = trunks_B + bundles.offsets_B
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
            "packing/padding": 1 - tokens / (rows * row_length),
            "packing/microbatches": used,
            "packing/rows": rows,
            "packing/shared": 1 - tokens / int(lengths_B.sum()),
        },
        trunks_B=trunks_B,
        shared_B=shared_B,
    )


_PARTINGS = (1, 2, 4, 8)  # parts of a row that are tried


@dataclasses.dataclass(frozen=True)
class _Bundles:
    """Sequences that lie behind each other in a row, after what they share.

    Attributes:
      lengths_C: tokens of each bundle.
      of_B: the bundle of each sequence.
      shared_B: tokens that a sequence shares; 0 for one alone in its bundle.
      offsets_B: start of a sequence's own tokens in its bundle.
    """

    lengths_C: np.ndarray
    of_B: np.ndarray
    shared_B: np.ndarray
    offsets_B: np.ndarray


def _partings(lengths_B, trunks, row_length):
    """Yields the bundle of each sequence, for every way that is tried."""
    if trunks is not None:
        for part in _PARTINGS:
            yield _parting(lengths_B, trunks, row_length // part)
    yield np.arange(len(lengths_B))


def _parting(lengths_B, trunks, limit):
    """Cuts the sequences of each trunk, longest first, into bundles of at most `limit` tokens.

    A sequence that is longer is a bundle by itself.
    """
    rests_B = lengths_B - trunks.lengths_B
    order = np.lexsort((-rests_B, trunks.ids_B))
    bundles_B, bundle, filled, last = np.empty(len(order), np.int64), -1, 0, None
    for index in order:
        if trunks.ids_B[index] != last or filled + rests_B[index] > limit:
            bundle, filled, last = bundle + 1, int(trunks.lengths_B[index]), trunks.ids_B[index]
        bundles_B[index] = bundle
        filled += int(rests_B[index])
    return bundles_B


def _bundled(lengths_B, bundles_B, trunks):
    shared_B = np.zeros_like(lengths_B)
    if trunks is not None:
        shared_B = np.where(np.bincount(bundles_B)[bundles_B] > 1, trunks.lengths_B, 0)
    rests_B = lengths_B - shared_B
    order = np.lexsort((-rests_B, bundles_B))
    trunk_C = np.zeros(int(bundles_B.max()) + 1, np.int64)
    trunk_C[bundles_B] = shared_B
    ends = np.cumsum(rests_B[order])
    before = ends - rests_B[order]  # own tokens of all sequences before, bundle after bundle
    firsts_C = before[np.searchsorted(bundles_B[order], np.arange(len(trunk_C)))]
    offsets_B = np.empty_like(lengths_B)
    offsets_B[order] = before - firsts_C[bundles_B[order]]
    lengths_C = trunk_C + np.bincount(bundles_B, weights=rests_B).astype(np.int64)
    return _Bundles(lengths_C, bundles_B, shared_B, offsets_B + shared_B)


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
    return np.arange(int(np.sum(sizes_B))) + np.repeat(starts_B - (ends_B - sizes_B), sizes_B)


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
