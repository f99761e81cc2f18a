"""Results of a benchmark: medians by phase, paired ratios, and distance from the machine's rate."""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import scipy.stats

from experiments.bench.step_task import Task
from experiments.bench.turns import OURS, Timed
from experiments.bench.work import Work, step_work

_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "numpy", "torch", "trl", "transformers", "accelerate",
)  # fmt: skip


def measured(taken: Sequence[Timed], side: str) -> list[Timed]:
    """Returns the counted steps of a side, by round."""
    steps = [t for t in taken if t.side == side and t.round >= 0]
    return sorted(steps, key=lambda t: t.round)


def phases(steps: Sequence[Timed]) -> dict[str, float]:
    """Returns median seconds of each phase; `rest` is outside all phases, `step` the whole."""
    values = {name: [s.phases[name] for s in steps] for name in steps[0].phases}
    values["rest"] = [s.seconds - sum(s.phases.values()) for s in steps]
    values["step"] = [s.seconds for s in steps]
    return {name: statistics.median(v) for name, v in values.items()}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Returns ratios ours / theirs of steps of one round each: all, and their spread.

    The interval is Student's for the mean of log ratios, that is, for the geometric mean; one round
    has none.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    low = high = None
    if len(logs) > 1:
        reach = scipy.stats.t.ppf(0.975, len(logs) - 1)
        reach *= statistics.stdev(logs) / math.sqrt(len(logs))
        low, high = math.exp(mean - reach), math.exp(mean + reach)
    return {
        "ratios": ratios,
        "min": min(ratios),
        "median": statistics.median(ratios),
        "max": max(ratios),
        "geometric_mean": math.exp(mean),
        "ci95_low": low,
        "ci95_high": high,
    }


def environment() -> dict[str, object]:
    """Returns versions, processor, cores, and the machine's current load."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    can_ask = hasattr(os, "sched_getaffinity")
    return {
        "versions": versions,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if can_ask else os.cpu_count(),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def environment_lines(found: dict[str, Any]) -> str:
    """Formats the environment in two lines, with a warning if others use the machine.

    Other load does more than add noise: threads that spin while they wait for one another (torch's
    under OpenMP do, XLA's do not) lose far more than their share, so ratios are wrong too.
    """
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"{found['processor']}, {found['cores']} cores; {found['device']}", versions]
    if (found["load"] or 0) > 0.5:
        lines.append(
            f"WARNING: load average {found['load']:.1f} before the first step: other processes use "
            "this machine, and neither times nor ratios will hold (OMP_WAIT_POLICY=passive in the "
            "environment keeps torch from losing most of its share)"
        )
    return "\n".join(lines)


def told(
    task: Task,
    taken: Sequence[Timed],
    sides: Sequence[str],
    rates: dict[str, float],
    say: Callable[[str], Any],
) -> dict[str, Any]:
    """Prints tables and ratios of a task; returns them as JSON values."""
    prompts = [len(tokens) for tokens in task.prompt_tokens]
    least, padded = (
        step_work(task.model, prompts, task.lengths, prompts_once=once) for once in (True, False)
    )
    say("")
    say(work_lines(least, padded, rates))
    say("")
    lines, medians = table(task.generated, taken, sides, least, max(rates.values()))
    say(lines)
    ratios = {}
    for peer in sides[1:]:
        lines, ratios[peer] = ratio_lines(taken, peer)
        say(lines)
    if ratios:
        say("All sides sample and score the same tokens, so these are the ratios per token too.")
    return {
        "generated_tokens": task.generated,
        "matmul_flops_per_s": rates,
        "work_flops": {"least": dataclasses.asdict(least), "padded": dataclasses.asdict(padded)},
        "medians": medians,
        "ratios": ratios,
    }


def table(
    tokens: int, taken: Sequence[Timed], sides: Sequence[str], work: Work, rate: float
) -> tuple[str, dict[str, dict[str, float]]]:
    """Returns the medians of every side, one line each, and as numbers.

    Args:
      tokens: that a step samples; it scores as many.
      taken: all turns.
      sides: in order.
      work: the least that a step needs.
      rate: operations a second of a large matrix product.
    """
    lines = [
        f"{'median seconds':16}{'generation':>12}{'update':>9}{'rest':>8}{'step':>9}"
        f"{'sampled/s':>11}{'scored/s':>10}{'cores':>7}{'of matmul rate: update, step':>30}"
    ]
    medians = {}
    for side in sides:
        steps = measured(taken, side)
        m = phases(steps)
        m["cores"] = statistics.median(s.cores for s in steps)
        m["sampled_tokens_per_s"] = tokens / m["generation"]
        m["scored_tokens_per_s"] = tokens / m["update"]
        m["update_of_matmul_rate"] = work.update / m["update"] / rate
        m["step_of_matmul_rate"] = work.total / m["step"] / rate
        medians[side] = m
        lines.append(
            f"{side:16}{m['generation']:12.3f}{m['update']:9.3f}{m['rest']:8.3f}{m['step']:9.3f}"
            f"{m['sampled_tokens_per_s']:11.0f}{m['scored_tokens_per_s']:10.0f}{m['cores']:7.2f}"
            f"{m['update_of_matmul_rate']:22.1%}{m['step_of_matmul_rate']:8.1%}"
        )
    return "\n".join(lines), medians


def ratio_lines(taken: Sequence[Timed], peer: str) -> tuple[str, dict]:
    """Returns our step over the peer's, round by round, in words and as numbers."""
    ours, theirs = measured(taken, OURS), measured(taken, peer)
    numbers = {"step": paired([s.seconds for s in ours], [s.seconds for s in theirs])}
    for name in ours[0].phases:
        numbers[name] = paired([s.phases[name] for s in ours], [s.phases[name] for s in theirs])
    lines = [f"{OURS} / {peer}, paired by round ({len(ours)}); below 1 means {OURS} is faster"]
    for name, n in numbers.items():
        line = f"  {name:11} median {n['median']:.3f} (min {n['min']:.3f}, max {n['max']:.3f})"
        if n["ci95_low"] is not None:
            line += (
                f", geometric mean {n['geometric_mean']:.3f}, 95 % interval "
                f"[{n['ci95_low']:.3f}, {n['ci95_high']:.3f}]"
            )
        lines.append(line)
    return "\n".join(lines), numbers


def work_lines(least: Work, padded: Work, rates: dict[str, float]) -> str:
    """Formats the step's operations, and the seconds they take at the best measured rate."""
    rate = max(rates.values())
    shown = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in rates.items())
    lines = [f"large matmul: {shown} GFLOP/s, best of several"]
    for name, work in (("least", least), ("padded", padded)):
        lines.append(
            f"work, {name:7}: prefill {work.prefill / 1e9:.1f} + decode {work.decode / 1e9:.1f} + "
            f"update {work.update / 1e9:.1f} = {work.total / 1e9:.1f} GFLOP, "
            f"{work.total / rate:.2f} s at that rate"
        )
    lines.append(
        "  (least: a prompt once a group, head on responses; padded: equal rows, head on all)"
    )
    return "\n".join(lines)


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
