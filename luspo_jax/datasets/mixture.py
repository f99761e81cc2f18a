"""Several sources as one weighted set of problems."""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

from luspo_jax.datasets.example import DataError, Example


class Mixture(Sequence):
    """Concatenates sources; ids are positions in the whole, `meta["source"]` names the source.

    Args:
      sources: name → examples.
      weights: name → share of the prompts, up to a common factor.

    Attributes:
      sizes: examples of each source.
      weights: shares of the prompts, which add up to 1.

    Raises:
      DataError: no source, an empty one, or a weight that is not positive.
    """

    def __init__(self, sources: Mapping[str, Sequence[Example]], weights: Mapping[str, float]):
        if not sources or set(sources) != set(weights):
            raise DataError(f"a mixture needs a weight for each source: {list(sources)}")
        for name, examples in sources.items():
            if not len(examples):
                raise DataError(f"data.mixture.{name}: the source is empty")
            weight = weights[name]
            if not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise DataError(f"data.mixture.{name}: weight={weight!r} must be a positive number")
        self._names, self._sources = list(sources), list(sources.values())
        self.sizes = tuple(len(examples) for examples in self._sources)
        self._ends = [sum(self.sizes[: k + 1]) for k in range(len(self.sizes))]
        total = math.fsum(weights.values())
        self.weights = tuple(weights[name] / total for name in self._names)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        k = bisect.bisect_right(self._ends, index)
        example = self._sources[k][index - self._ends[k] + self.sizes[k]]
        return dataclasses.replace(
            example, id=index, meta={**example.meta, "source": self._names[k]}
        )
