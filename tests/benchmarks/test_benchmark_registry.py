"""Every benchmark names things that exist; mistakes get the nearest name."""

import subprocess
import sys

import pytest

from luspo_jax.benchmarks import BENCHMARKS, BenchmarkError
from luspo_jax.benchmarks.registry import benchmarks
from luspo_jax.benchmarks.visual import VISUAL
from luspo_jax.datasets import DATASETS, shapes
from luspo_jax.datasets.table import Table
from luspo_jax.prompts.templates import SYSTEM_PROMPTS, TEMPLATES
from luspo_jax.rewards import Sample
from luspo_jax.rewards.registry import verifiers


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_refers_to_what_exists(name):
    entry, options = BENCHMARKS[name], {}
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="needs the extra [tasks]")
        options = {"task": "chain_sum"}  # --options of experiments.evaluate
    assert entry.name == name
    assert entry.template in TEMPLATES
    assert entry.system_prompt in SYSTEM_PROMPTS
    dataset = DATASETS[entry.dataset]
    assert entry.generated != isinstance(dataset, Table)
    if entry.generated:
        known = set(dataset("test", **entry.dataset_options, **options)[0].meta)
    else:
        known = {*dataset.meta, *dataset.fields, *(["id"] if dataset.identity else [])}
        assert entry.images == bool(dataset.images)
    unit = entry.rule.unit if entry.rule else ""
    assert {*entry.split_by, entry.id_field, unit} - {""} <= known
    with entry.judge(workers=1, time_limit=1.0) as judge:
        assert judge.labels
    assert entry.metric in ("strict" if entry.rule else verifiers(entry.parts, entry.options))


def test_every_rule_is_a_benchmark():
    assert {name for name, entry in BENCHMARKS.items() if entry.rule} == set(VISUAL)


def test_shapes_are_answered_as_the_task_says():
    assert BENCHMARKS["shapes"].options["exact"]["pattern"] == shapes.ANSWER_PATTERN
    problem = shapes.Shapes("test")[0]
    sample = Sample(shapes.trace(problem, []), problem.answer)
    with BENCHMARKS["shapes"].judge(workers=1, time_limit=1.0) as judge:
        assert judge.score_batch([sample])[0].value == 1.0


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
