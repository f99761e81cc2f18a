"""Measures and reports one RL step of every side in turn."""

import contextlib
import dataclasses
import importlib.util
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from experiments.bench import peer, report, settings, turns, work
from experiments.bench.ours import Ours
from experiments.bench.settings import TRL, TUNIX
from experiments.bench.step_task import Task
from experiments.bench.turns import OURS, Step, Timed

NEEDS = {TRL: ("torch", "trl"), TUNIX: ("tunix",)}
DEFAULTS = {
    OURS: {"train.num_microbatches": 1},
    TRL: {"microbatches": 1, "compile": False},
    TUNIX: {"microbatches": 1},
}
_AGAIN = 2  # rounds of twice the tokens, at most
_SAME = {"float32": 1e-3, "bfloat16": 0.1}  # nats by which sides may differ on a prompt


class StepPeer(peer.Peer):
    """Another library, taking a step in a process of its own whenever it is asked."""

    def step(self) -> Step:
        """Takes one."""
        return Step(**self.ask("step"))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a task is measured.

    Attributes:
      steps: counted rounds.
      warmup: rounds before them, at least one.
      pythons: of each peer.
      search: whether each side looks for its fastest settings first.
      settings: of each side, where nothing is searched; DEFAULTS for those that are absent.
      fields: of our configuration, whatever is searched.
      seed: of sampling.
      pause: seconds of rest before each step.
    """

    steps: int
    warmup: int = 1
    pythons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    search: bool = False
    settings: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    pause: float = turns.PAUSE

    @property
    def sides(self) -> tuple[str, ...]:
        """Returns the names of all sides, ours first."""
        return (OURS, *self.pythons)


def this_python(side: str) -> str:
    """Returns this python if it has what a peer needs, else ""."""
    found = all(importlib.util.find_spec(name) is not None for name in NEEDS[side])
    return sys.executable if found else ""


def measure(task: Task, plan: Plan, say: Callable[[str], Any] = print) -> dict[str, Any]:
    """Times `plan.steps` steps of ours and of each peer in turn.

    Returns:
      All measurements, as JSON values.

    Raises:
      RuntimeError: a side did not do all its work, or read other weights.
    """
    environment = report.environment()
    say(report.environment_lines(environment))
    return {"environment": environment, **measure_task(task, plan, say)}


def measure_task(task: Task, plan: Plan, say: Callable[[str], Any] = print) -> dict[str, Any]:
    """Does what `measure` does, without a look at the machine."""
    say(f"RL step: {task}")
    rates = work.matmul_rates(task.dtype)  # before the sides have threads
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="luspo_bench_"))
        sides, tried = _begin(task, plan, pathlib.Path(folder), stack, say)
        versions = {name: sides[name].versions for name in plan.pythons}
        for name in plan.pythons:
            rates |= sides[name].ready.get("matmul", {})
        taken = _take(task, plan, sides, say)
    return {
        "task": {**task.spec(), "folder": task.folder.name},
        "plan": {"steps": plan.steps, "warmup": plan.warmup, "search": plan.search},
        "versions": versions,
        "settings": {name: dataclasses.asdict(settings.fastest(t)) for name, t in tried.items()}
        if plan.search
        else {name: {"settings": _given(plan, name)} for name in sides},
        "tried": {name: [dataclasses.asdict(t) for t in found] for name, found in tried.items()},
        "steps": [dataclasses.asdict(timed) for timed in taken],
        **report.told(task, taken, plan.sides, rates, say),
    }


def doubled(task: Task, plan: Plan, first: Mapping[str, Any], say: Callable = print) -> dict:
    """Measures responses twice as long with the settings of `first`; returns what it costs.

    `update` is the time of an update over that of `first`, by side; `work` the ratio of the least
    operations.
    """
    found = {name: values["settings"] for name, values in first["settings"].items()}
    again = dataclasses.replace(plan, search=False, settings=found, steps=min(plan.steps, _AGAIN))
    second = measure_task(task.doubled(), again, say)
    update = {
        side: second["medians"][side]["update"] / first["medians"][side]["update"]
        for side in plan.sides
    }
    ratio = second["work_flops"]["least"]["update"] / first["work_flops"]["least"]["update"]
    shown = ", ".join(f"{side} {value:.2f}" for side, value in update.items())
    say(f"an update on responses of twice the tokens: {ratio:.2f} × the least work; time × {shown}")
    return {"measured": second, "work": ratio, "update": update}


def _begin(task, plan, folder, stack, say):
    """Starts every side, with its fastest settings if those are searched."""
    sides, tried, number = {}, {}, 0
    expected = task.logprob()
    for name in plan.sides:

        def start(chosen, name=name):
            nonlocal number
            number += 1
            own = folder / f"{name}{number}"
            own.mkdir()
            if name == OURS:
                return Ours(task, own, settings={**plan.fields, **chosen}, seed=plan.seed)
            command = [plan.pythons[name], "-m", f"experiments.bench.{name}_side"]
            spec = task.spec() | {"seed": plan.seed, "settings": chosen}
            side = StepPeer(name, command, spec, own)
            _check_weights(name, side.ready["logprob"], expected, task.dtype)
            return side

        if plan.search:
            sides[name], tried[name] = settings.search(task, name, start, say)
        else:
            sides[name] = start(_given(plan, name))
        stack.callback(sides[name].close)
    return sides, tried


def _given(plan, name):
    return plan.settings.get(name, DEFAULTS[name])


def _check_weights(name, found, expected, dtype):
    if not abs(found - expected) <= _SAME[dtype]:
        raise RuntimeError(
            f"{name} gives the first prompt {found:.4f} nats a token, ours {expected:.4f}: it does "
            "not read the same weights, or computes something else"
        )


def _take(task, plan, sides, say):
    """Takes all turns; returns them."""
    taken: list[Timed] = []
    for turn in turns.order(plan.sides, warmup=plan.warmup, steps=plan.steps):
        turns.rest(plan.pause)
        step = sides[turn.side].step()
        if step.lengths != task.flat_lengths:
            raise RuntimeError(
                f"{turn.side} made responses of lengths {step.lengths}, not {task.flat_lengths}"
            )
        if turn.round == plan.steps - 1 and not step.moved:
            raise RuntimeError(f"{turn.side} has not changed its weights: no update was taken")
        timed = Timed(turn.round, turn.side, step.seconds, step.cores, step.phases)
        taken.append(timed)
        parts = ", ".join(f"{name} {value:.3f}" for name, value in timed.phases.items())
        kind = "warm-up" if timed.round < 0 else f"round {timed.round + 1}"
        say(f"{kind:9} {timed.side:10} {timed.seconds:8.3f} s ({parts}; {timed.cores:.2f} cores)")
    return taken
