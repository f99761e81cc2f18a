"""Evaluation sets, their sampling protocols, and statistics of the verdicts.

Nothing here imports jax: stored generations can be scored and compared without it.
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
