"""Measures and reports one RL step of every side in turn."""

import dataclasses
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from experiments.bench import report, turns, work, workload
from experiments.bench.ours import Ours
from experiments.bench.turns import OURS, Timed
from experiments.bench.workload import Workload


def trl_installed() -> bool:
    """Whether torch and TRL can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "trl"))


def measure(
    sizes: Workload,
    *,
    peers: Sequence[str] = (),
    steps: int,
    warmup: int,
    seed: int = 0,
    trl_microbatches: int = 1,
    pause: float = turns.PAUSE,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Times `steps` steps of ours and of each peer, after `warmup` uncounted steps.

    Args:
      sizes: sizes of the step.
      peers: () or ("trl",).
      steps: counted rounds.
      warmup: rounds before them, at least one.
      seed: for weights, prompts and sampling.
      trl_microbatches: parts of TRL's update.
      pause: seconds of rest before each step.
      say: called with each line to print.

    Returns:
      All measurements, as JSON values.

    Raises:
      RuntimeError: a side did not do all its work.
    """
    say(f"RL step: {sizes}")
    environment = report.environment()
    say(report.environment_lines(environment))
    taken: list[Timed] = []

    def note(timed: Timed) -> None:
        taken.append(timed)
        parts = ", ".join(f"{name} {value:.3f}" for name, value in timed.phases.items())
        kind = "warm-up" if timed.round < 0 else f"round {timed.round + 1}"
        say(f"{kind:9} {timed.side:10} {timed.seconds:8.3f} s ({parts}; {timed.cores:.2f} cores)")

    sides = (OURS, *peers)
    order = turns.order(sides, warmup=warmup, steps=steps)
    with tempfile.TemporaryDirectory(prefix="luspo_bench_") as folder:
        folder = pathlib.Path(folder)
        workload.write(sizes, folder, seed=seed)
        ours = Ours(sizes, folder, seed=seed)
        match = turns.take(order, ours.step, note, pause=pause)
        if peers:
            from experiments.bench import trl_side  # Imports torch.

            trl_side.run(
                sizes, folder, match,
                steps=warmup + steps, microbatches=trl_microbatches, seed=seed,
            )  # fmt: skip
        for _ in match:
            raise RuntimeError("the peer's training ended before its turns were over")
    if not ours.parameters_moved():
        raise RuntimeError("our parameters have not moved")
    return {"environment": environment, **_told(sizes, taken, sides, say)}


def _told(sizes, taken, sides, say):
    """Prints the tables and returns the record."""
    rates = work.matmul_rates(sizes.dtype)
    least, padded = (work.step_work(sizes, prompts_once=once) for once in (True, False))
    say("")
    say(report.work_lines(least, padded, rates))
    say("")
    say(report.table(sizes, taken, sides, least, max(rates.values())))
    ratios = {}
    for peer in sides[1:]:
        lines, ratios[peer] = report.ratio_lines(taken, peer)
        say(lines)
    return {
        "workload": dataclasses.asdict(sizes),
        "matmul_flops_per_s": rates,
        "work_flops": {"least": dataclasses.asdict(least), "padded": dataclasses.asdict(padded)},
        "steps": [dataclasses.asdict(timed) for timed in taken],
        "medians": {side: report.phases(report.measured(taken, side)) for side in sides},
        "ratios": ratios,
    }
