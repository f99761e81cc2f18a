"""Problems with reference answers: file readers and generated tasks, one module each.

Nothing here imports jax.
"""

from luspo_jax.datasets.example import DataError, Example, Report
from luspo_jax.datasets.mixture import Mixture
from luspo_jax.datasets.overlap import Overlap, overlap
from luspo_jax.datasets.registry import DATASETS, image_source, load
from luspo_jax.datasets.selection import Selection
from luspo_jax.datasets.table import Columns

__all__ = [
    "DATASETS",
    "Columns",
    "DataError",
    "Example",
    "Mixture",
    "Overlap",
    "Report",
    "Selection",
    "image_source",
    "load",
    "overlap",
]
