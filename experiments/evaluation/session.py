"""Runs an evaluation from beginning to end."""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from experiments.command import UsageError
from experiments.evaluation import budgets, plan, report, storage
from experiments.evaluation.plan import Options, Task
from experiments.evaluation.policy import Policy, load
from luspo_jax import prompts, sharding
from luspo_jax.benchmarks import Benchmark, Protocol
from luspo_jax.benchmarks.budgets import Curve
from luspo_jax.benchmarks.budgets import budgets as read_budgets
from luspo_jax.benchmarks.registry import Judge
from luspo_jax.datasets import Example, Report
from luspo_jax.experience import held_out
from luspo_jax.models import kernels
from luspo_jax.models.forward import Forward
from luspo_jax.rollout import Cache, Engine, Sampling

_PACKAGES = ("luspo_jax", "jax", "transformers", "math-verify")
_FILLS = 4  # a part's responses over slots, so that few slots idle at its end


def run(model: str, chosen: Sequence[Benchmark], workdir: pathlib.Path, options: Options) -> str:
    """Evaluates a model, or resumes where an earlier call stopped.

    Returns:
      The table.

    Raises:
      UsageError, DataError, CheckpointError, …: unusable input, named in the message.
    """
    sizes = _budgets(options)
    with storage.locked(workdir):
        policy = load(model, step=options.step, dtype=options.dtype, tensor=options.tensor)
        options = dataclasses.replace(
            options,
            min_pixels=options.min_pixels or policy.pixels[0],
            max_pixels=options.max_pixels or policy.pixels[1],
        )
        tasks = plan.tasks(chosen, options, policy.model)
        engines = [_engine(policy, task, options) for task in tasks]
        manifest = storage.begin(workdir, _manifest(policy, tasks, options))
        for task, engine in zip(tasks, engines, strict=True):
            _generate(policy, task, engine, workdir, options)
        if sizes:
            budgets.keep(workdir, dict(_curves(policy, tasks, workdir, manifest, sizes, options)))
        return report.write(workdir, manifest)


def _budgets(options: Options) -> tuple[int, ...]:
    try:
        return read_budgets(options.budgets, options.protocol.max_response_length)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def _curves(
    policy: Policy,
    tasks: Sequence[Task],
    workdir: pathlib.Path,
    manifest: Mapping[str, Any],
    sizes: Sequence[int],
    options: Options,
) -> Iterator[tuple[str, Curve]]:
    for task in tasks:
        name = task.benchmark.name
        with scorer(task.benchmark, options) as judge:
            entry = manifest["benchmarks"][name]
            yield (
                name,
                budgets.measure(workdir, name, entry, sizes, judge, policy.model.decode),
            )


def scorer(entry: Benchmark, options: Options) -> Judge:
    """Returns a benchmark's scorer: it counts failed verifications, and stops above one in 20."""
    return entry.judge(workers=options.workers, time_limit=options.timeout_s)


def _engine(policy: Policy, task: Task, options: Options) -> Engine:
    chosen = options.protocol
    how = Forward(
        policy.model.config,
        options.dtype,
        attention="auto",
        vision_attention="auto",
        expert_kernel="auto",
        layout=sharding.on_own_devices(policy.layout),
    )
    return Engine(
        kernels.resolved(how),
        Sampling(stop_token_ids=policy.model.stop_token_ids, **chosen.sampling),
        num_slots=options.num_slots,
        max_prompt_length=task.longest_prompt,
        cache=Cache(options.cache_gb or None),
    )


def _generate(
    policy: Policy, task: Task, engine: Engine, workdir: pathlib.Path, options: Options
) -> None:
    """Samples, scores and stores the missing parts of a benchmark."""
    size, samples = _part_size(options), options.protocol.num_samples
    name, total = task.benchmark.name, len(task.prompts) * samples
    bar = tqdm(total=total, desc=name, unit="response", disable=None, file=sys.stderr)
    with bar, scorer(task.benchmark, options) as judge:
        for number, start in enumerate(range(0, len(task.prompts), size)):
            asked = task.prompts[start : start + size]
            path = storage.part_path(workdir, name, number)
            if not path.exists():
                before = bar.n

                def progress(finished: int, _: int, before=before) -> None:
                    bar.update(before + finished - bar.n)

                groups = held_out.ask(
                    engine,
                    policy.params,
                    prompts.with_images(asked, task.renderer),
                    judge,
                    decode=policy.model.decode,
                    num_samples=samples,
                    seed=options.seed,
                    progress=progress,
                )
                storage.write_part(path, held_out.kept(groups, name, judge.labels))
                bar.n = before
            bar.update(len(asked) * samples)


def _part_size(options: Options) -> int:
    filling = _FILLS * options.num_slots // options.protocol.num_samples
    return options.save_every or max(1, filling)


def _manifest(policy: Policy, tasks: Sequence[Task], options: Options) -> dict[str, Any]:
    """Returns everything that determines the responses and the verdicts."""
    benchmarks = {}
    for task in tasks:
        problems = [prompt.example for prompt in task.prompts]
        benchmarks[task.benchmark.name] = entry_facts(
            task.benchmark, problems, task.report, options, refused=task.refused
        ) | {
            "template": task.template,
            "template_hash": task.renderer.hash,
            **({"images": task.images} if task.images else {}),
        }
    return {
        "model": policy.name,
        "weights": policy.digest,
        "dtype": options.dtype,
        "seed": options.seed,
        "num_slots": options.num_slots,
        "problems_a_part": _part_size(options),
        **protocol_facts(options.protocol),
        "benchmarks": benchmarks,
        "packages": packages(),
    }


def protocol_facts(protocol: Protocol) -> dict[str, Any]:
    """Returns the protocol in words and in numbers."""
    return {"protocol": protocol.label, "sampling": protocol.sampling}


def entry_facts(
    entry: Benchmark,
    problems: Sequence[Example],
    source: Report,
    options: Options,
    *,
    refused: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Returns the facts, besides model and protocol, that determine a benchmark's numbers."""
    what = [[e.id, entry.question(e), e.answer] for e in problems]
    with scorer(entry, options) as judge:
        labels = judge.labels
    return {
        "dataset": dataclasses.asdict(source),
        "problems": len(problems),
        "problems_in_dataset": source.examples,
        "problems_hash": hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16],
        "num_samples": options.protocol.num_samples,
        "scorers": labels,
        "metric": entry.metric,
        **({"refused": {k: list(v) for k, v in sorted(refused.items())}} if refused else {}),
    }


def packages() -> dict[str, str]:
    """Returns package versions, for the record."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
