"""How large the pool of pages is: what is asked for, what a run can use, what the device has."""

import dataclasses
import os

import numpy as np

from luspo_jax.models.decoder_config import DecoderConfig

# Tokens of a page on a device. CPUs read a page in one piece, and a piece costs the same to begin
# however short it is; TPUs move a page in one transfer.
PAGE_SIZES = {"cpu": 64, "gpu": 64, "cuda": 64, "rocm": 64, "tpu": 128}
_SHARE = 0.9  # of a device's memory that is planned with; the rest is the compiler's and jax's


@dataclasses.dataclass(frozen=True)
class Cache:
    """The pool of pages that is asked for.

    Attributes:
      gb: gigabytes (10⁹ bytes) on a device; None for half of what it has left at the first call.
        Never more is taken than all rows at their longest can use.
      page_size: tokens of a page on a device; 0 for the platform's.
      dtype: of keys and values; empty for that of the forward pass, or "int8": a scale for each
        vector of a head.
    """

    gb: float | None = None
    page_size: int = 0
    dtype: str = ""

    def __post_init__(self):
        if self.gb is not None and not self.gb > 0:
            raise ValueError(f"cache_gb must be > 0, not {self.gb}")
        if self.page_size < 0:
            raise ValueError(
                f"page_size must be >= 0 (0 takes the platform's), not {self.page_size}"
            )


def page_bytes(model: DecoderConfig, dtype, page_size: int, heads: int = 1) -> int:
    """Returns the bytes of a page on a device: 2 · L · K / heads · S vectors of H elements, those
    of int8 with a float32 scale each."""
    vectors = 2 * model.num_layers * (model.num_kv_heads // heads) * page_size
    dtype = np.dtype(dtype)
    return vectors * (model.head_dim * dtype.itemsize + (4 if dtype == np.int8 else 0))


def bytes_left(device) -> float:
    """Returns half of the memory that is free on a device now; on a CPU, a quarter of it all."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return max(0.0, _SHARE * stats["bytes_limit"] - stats.get("bytes_in_use", 0)) / 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
