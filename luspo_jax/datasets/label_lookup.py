"""Look up one labelled value: the length-neutral sibling of `label_sums`.

A problem lists labelled values and names one label, `a3b1c4d0e2f1c?`; the answer is that label's
value. A response may answer at once, `#### 4`, or first write dots, `.....#### 4`, which carry no
information. A longer response is no more often right, so any change in length comes from the
objective itself. Splits, order and answers work as in `label_sums`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from luspo_jax.datasets import label_sums
from luspo_jax.datasets.example import Example

FILLER = "."


@dataclasses.dataclass(frozen=True)
class LabelLookup:
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
        label_sums.check_size(self.split, self.num_terms)

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, index: int) -> Example:
        code = int(self._codes[index])
        place = code % self.num_terms
        values = label_sums.digits(code // self.num_terms, self.num_terms)
        return Example(
            id=code,
            problem=problem(values, place),
            answer=str(values[place]),
            meta={"task": "label_lookup", "split": self.split, "values": values, "place": place},
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def _codes(self) -> np.ndarray:
        num_problems = self.num_terms * label_sums.MODULUS**self.num_terms
        return label_sums.split_codes(num_problems, self.split, self.seed)


def problem(values: Sequence[int], place: int) -> str:
    """Formats a problem: each value after its label, the requested label, a question mark."""
    return "".join(label_sums.terms(values)) + f"{label_sums.LABELS[place]}?"


def response(answer: int, num_filler: int) -> str:
    """Formats a response with `num_filler` dots before its answer."""
    return FILLER * num_filler + label_sums.final_answer(answer)


def random_filler(rng: np.random.Generator, *, low: float, high: float, largest: int) -> int:
    """Draws the number of dots of a response in a random style.

    It draws a style p ~ U(low, high), then min(Geometric(p) − 1, largest): a heavy tail, since
    styles differ.
    """
    style = rng.uniform(low, high)
    return int(min(rng.geometric(style) - 1, largest))
