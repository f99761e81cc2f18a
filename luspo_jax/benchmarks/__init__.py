"""Evaluation sets, the protocols they are sampled under, and the numbers made of the verdicts.

Nothing here imports jax: stored generations are scored and compared where there is none.
"""

from luspo_jax.benchmarks.protocols import PROTOCOLS, Protocol, protocol
from luspo_jax.benchmarks.record import BenchmarkError, Record
from luspo_jax.benchmarks.registry import BENCHMARKS, Benchmark, benchmark
from luspo_jax.benchmarks.statistics import Summary, summary

__all__ = [
    "BENCHMARKS",
    "PROTOCOLS",
    "Benchmark",
    "BenchmarkError",
    "Protocol",
    "Record",
    "Summary",
    "benchmark",
    "protocol",
    "summary",
]
