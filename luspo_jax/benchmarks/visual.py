"""Visual benchmarks by name."""

from luspo_jax.benchmarks.dynamath import DYNAMATH
from luspo_jax.benchmarks.logicvista import LOGICVISTA
from luspo_jax.benchmarks.mathverse import MATHVERSE
from luspo_jax.benchmarks.mathvision import MATHVISION
from luspo_jax.benchmarks.mathvista import MATHVISTA
from luspo_jax.benchmarks.verdicts import VisualBenchmark
from luspo_jax.benchmarks.wemath import WEMATH

VISUAL: dict[str, VisualBenchmark] = {
    benchmark.id: benchmark
    for benchmark in (DYNAMATH, LOGICVISTA, MATHVERSE, MATHVISION, MATHVISTA, WEMATH)
}
