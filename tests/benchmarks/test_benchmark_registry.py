"""Every benchmark names things that exist; mistakes get the nearest name."""

import subprocess
import sys

import pytest

from luspo_jax.benchmarks import BENCHMARKS, BenchmarkError
from luspo_jax.benchmarks.registry import benchmarks
from luspo_jax.datasets import DATASETS
from luspo_jax.datasets.table import Table
from luspo_jax.prompts import TEMPLATES
from luspo_jax.rewards.registry import verifiers


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_refers_to_what_exists(name):
    entry = BENCHMARKS[name]
    assert entry.name == name
    assert entry.template in TEMPLATES
    assert entry.metric in verifiers(entry.parts, entry.options)
    dataset = DATASETS[entry.dataset]
    assert entry.generated != isinstance(dataset, Table)
    fields = {*entry.split_by, entry.id_field} - {""}
    assert fields <= set(getattr(dataset, "meta", ()))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["math50"], "did you mean 'math500'"),
        (["aime24", "aime24"], "given twice: aime24"),
        ([], "no benchmark is named"),
    ],
)
def test_mistakes_are_named(names, message):
    with pytest.raises(BenchmarkError, match=message):
        benchmarks(names)


def test_it_works_where_jax_is_not():
    code = "import luspo_jax.benchmarks, sys; assert not {'jax', 'flax'} & set(sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
