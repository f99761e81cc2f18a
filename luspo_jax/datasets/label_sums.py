"""Sums of labelled values modulo 5: a procedural task in which longer reasoning helps.

A problem lists labelled values, `a3b1c4d0e2f1?`, and asks for their sum modulo 5. A response may
answer at once, `#### 1`, or first write the running sum after some of the terms,
`b1=4 e2=0 f1=1 #### 1`: the fewer terms it skips, the longer it is and the easier each step.
Answers follow GSM8K's `#### N`, so its verifier scores them.

A hash of each problem fixes its split, one in eight for the test, so train and test are disjoint
under every seed; the seed only orders each split.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from luspo_jax.datasets.example import DataError, Example

LABELS = "abcdefghi"
MODULUS = 5
MAX_TERMS = len(LABELS)  # MODULUS ** 9 = 2 million problems, enumerated in a fraction of a second
TEST_FRACTION = 8  # one problem in this many is a test problem
SPLITS = ("train", "test")

_SPLIT_SALT = 0x5DEECE66D


@dataclasses.dataclass(frozen=True)
class LabelSums:
    """One split of the task: a random-access sequence of `Example`, the same on every machine.

    Attributes:
      split: "train" or "test".
      num_terms: labelled values per problem, 2 to 9.
      seed: determines the order of the problems, not their split.
    """

    split: str
    num_terms: int = 6
    seed: int = 0

    def __post_init__(self):
        check_size(self.split, self.num_terms)

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, index: int) -> Example:
        code = int(self._codes[index])
        values = digits(code, self.num_terms)
        return Example(
            id=code,
            problem=problem(values),
            answer=str(total(values)),
            meta={"task": "label_sums", "split": self.split, "values": values},
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def _codes(self) -> np.ndarray:
        return split_codes(MODULUS**self.num_terms, self.split, self.seed)


def problem(values: Sequence[int]) -> str:
    """Formats a problem: each value after its label, then a question mark."""
    return "".join(terms(values)) + "?"


def total(values: Sequence[int]) -> int:
    """Returns the answer: the sum of the values modulo 5."""
    return int(sum(values)) % MODULUS


def trace(values: Sequence[int], chunks: Sequence[int]) -> str:
    """Formats a right response that writes the running sum after each chunk of terms.

    For the values 3, 1, 4 and chunks (2, 1): `b1=4 c4=3 #### 3`.

    Args:
      values: the problem's values.
      chunks: sizes of consecutive chunks, which sum to len(values); empty for a direct answer.

    Raises:
      ValueError: the chunks do not cover the values exactly.
    """
    if chunks and (min(chunks) < 1 or sum(chunks) != len(values)):
        raise ValueError(f"chunks {tuple(chunks)} do not cover {len(values)} values")
    ends = itertools.accumulate(chunks)
    steps = (f"{LABELS[end - 1]}{values[end - 1]}={total(values[:end])} " for end in ends)
    return "".join(steps) + final_answer(total(values))


def random_chunks(
    rng: np.random.Generator, num_terms: int, *, direct: float, low: float, largest: int
) -> tuple[int, ...]:
    """Draws the chunk sizes of a response in a random style.

    With probability `direct` there are none. Otherwise it draws a style p ~ U(low, 1), and each
    chunk is min(Geometric(p), largest, remaining terms): p = 1 writes down every sum.
    """
    if rng.random() < direct:
        return ()
    style, chunks, left = rng.uniform(low, 1.0), [], num_terms
    while left:
        chunks.append(int(min(rng.geometric(style), largest, left)))
        left -= chunks[-1]
    return tuple(chunks)


def terms(values: Sequence[int]) -> list[str]:
    """Returns the labelled values: ["a3", "b1", ...]."""
    return [f"{label}{value}" for label, value in zip(LABELS, values, strict=False)]


def final_answer(answer: int) -> str:
    """Formats the line that states an answer, as in GSM8K."""
    return f"#### {answer}"


def digits(code: int, num_terms: int) -> tuple[int, ...]:
    """Returns the problem with this number: its base-5 digits, least significant first."""
    return tuple(code // MODULUS**place % MODULUS for place in range(num_terms))


def check_split(split: str) -> None:
    """Refuses a split that generated datasets do not have.

    Raises:
      DataError: naming those that they have.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} does not exist: choose one of {SPLITS}")


def check_size(split: str, num_terms: int) -> None:
    """Refuses an unknown split or size.

    Raises:
      DataError: names the field and its valid values.
    """
    check_split(split)
    if not 2 <= num_terms <= MAX_TERMS:
        raise DataError(f"num_terms must be from 2 to {MAX_TERMS}, not {num_terms}")


@functools.lru_cache(maxsize=8)
def split_codes(num_problems: int, split: str, seed: int) -> np.ndarray:
    """Returns the numbers of the problems in a split, in the order given by a seed.

    Membership depends on a problem's number alone; order on the number and the seed. Both come from
    an integer hash, so they do not change with NumPy's generators.
    """
    codes = np.arange(num_problems, dtype=np.uint64)
    in_test = _hash(codes, _SPLIT_SALT) % np.uint64(TEST_FRACTION) == 0
    members = codes[in_test == (split == "test")]
    order = np.argsort(_hash(members, seed), kind="stable")
    members = members[order].astype(np.int64)
    members.setflags(write=False)  # cached, hence shared
    return members


def _hash(codes: np.ndarray, salt: int) -> np.ndarray:
    """Computes SplitMix64's finalizer over codes offset by a salt, modulo 2^64."""
    golden = 0x9E3779B97F4A7C15
    mixed = codes + np.uint64((salt * golden + golden) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
