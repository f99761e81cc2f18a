"""The beginning of a run: new, from its own last checkpoint, or from another run's checkpoint."""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from luspo_jax import prompts
from luspo_jax.experience.groups import Waiting
from luspo_jax.experience.held_out import Evaluation
from luspo_jax.experience.stored import from_stored, to_stored
from luspo_jax.hosts import processes
from luspo_jax.learner.state import abstract_state, initial_state, with_base
from luspo_jax.length.accounting import AccountState
from luspo_jax.length.steering import LengthState
from luspo_jax.run.build import Run
from luspo_jax.run.checkpoint import Checkpointer, CheckpointError
from luspo_jax.run.workdir import checkpoint_folder
from luspo_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a step hands to the next on the host: groups that wait, and statistics of lengths."""

    waiting: Waiting = dataclasses.field(default_factory=Waiting)
    length: LengthState = dataclasses.field(default_factory=LengthState)


NO_STATE = TrainState(None, None, None)  # of a process that does not train
Start = tuple[TrainState, int, list[tuple[int, Evaluation]], Carried]

# Host state that a fork takes from its parent → prefixes of fields and facts whose change prevents
# it.
_TAKEN_ALONG = {
    "stream": ("data.", "seed", "datasets", "template_hash", "model.tokenizer"),
    "surplus": (
        "data.", "seed", "datasets", "template_hash", "model.", "lora.", "reward.", "scorers",
        "rollout.", "shaping.",
    ),
    "duals": ("reward.group", "scorers"),
    "length": ("length.", "objective.", "rollout."),
    "evaluations": (
        "data.", "datasets", "template_hash", "model.", "lora.", "reward.", "scorers", "eval.",
        "rollout.max_response_length",
    ),
}  # fmt: skip


def begin(
    run: Run, checkpointer: Checkpointer | None, fork: Mapping[str, Any] | None = None
) -> Start:
    """Returns state, steps taken, held-out results and carried values: from the latest checkpoint,
    else from the fork's checkpoint, else new.

    A process that only samples has no checkpointer and gets no state; the others tell it the rest.
    """
    found, stream = [], run.data.stream

    def work():
        found.extend(_begin(run, checkpointer, fork))
        _, start, evaluations, carried = found
        carried = dataclasses.replace(carried, waiting=carried.waiting.without_images())
        return start, evaluations, carried, stream.get_state()

    start, evaluations, carried, state = run.roles.trained(work, "beginning")
    if run.roles.trains:
        return tuple(found)
    stream.set_state(state)
    waiting = carried.waiting.with_images(stream.pictured)
    return NO_STATE, start, evaluations, dataclasses.replace(carried, waiting=waiting)


def _begin(run, checkpointer, fork) -> Start:
    latest = checkpointer.latest_step()
    processes.agree({"the checkpoint to continue from": latest})  # each process looked by itself
    if latest is not None:
        return _restored(run, checkpointer, latest)
    if fork is None:
        return begin_state(run), 0, [], Carried()
    folder = checkpoint_folder(fork["run"])
    members = run.roles.train if run.roles.split else None
    with contextlib.closing(Checkpointer(folder, read_only=True, members=members)) as parent:
        try:
            return _restored(run, parent, fork["step"], fork["changed"])
        except CheckpointError as error:
            raise CheckpointError(f"--fork={fork['run']}: {error}{_told(fork)}") from error


def _restored(run, checkpointer, step, changed=()) -> Start:
    like = abstract_state(run.rule, marked=run.length.every > 0)
    state, host, waiting = checkpointer.restore(step, like)
    if run.rule.logprobs.how.adapter is not None:
        state = with_base(state, run.initial_parts()[1])
    kept = {name for name, roots in _TAKEN_ALONG.items() if not _begins(changed, roots)}
    if "stream" in kept:
        run.data.stream.set_state(host["stream"])
    evaluations = [(step, Evaluation(**values)) for step, values in host["evaluations"]]
    stored = from_stored(waiting, host["waiting"]) if "surplus" in kept else []
    if host["waiting"] and not stored:
        roots = _TAKEN_ALONG["surplus"]
        names = ", ".join(name for name in changed if name.startswith(roots))
        warnings.warn(
            f"{len(host['waiting'])} groups of responses that waited for a later step are not "
            f"taken along, because other settings sampled them: {names}",
            stacklevel=2,
        )
    groups = [
        dataclasses.replace(group, prompt=prompts.pictured(group.prompt, run.data.renderer))
        for group in stored
    ]
    length = LengthState.from_json(host["length"]) if "length" in kept else LengthState()
    # In earlier checkpoints all are surplus.
    first, second = host.get("waiting_parts", (len(groups), len(groups)))
    metrics = host.get("waiting_metrics", {}) if groups[second:] else {}
    account = AccountState()
    if "surplus" in kept and "account" in host:
        account = AccountState.from_json(host["account"])
    # Without them, in earlier checkpoints, dual variables are where they start.
    duals = host.get("duals", {}) if "duals" in kept else {}
    waits = Waiting(groups[:first], groups[first:second], groups[second:], metrics, account, duals)
    carried = Carried(waits, length)
    return state, step, evaluations if "evaluations" in kept else [], carried


def _begins(names, roots):
    return any(name.startswith(roots) for name in names)


def _told(fork):
    """Names the changed fields, one of which must be set back."""
    fields = ", ".join(
        f"{name} ({old!r}, now {new!r})" for name, (old, new) in fork["changed"].items()
    )
    return f". Changed are: {fields}; set back what decides these arrays" if fields else ""


def begin_state(run: Run) -> TrainState:
    """Returns the state of a run that has taken no step."""
    params, base = run.initial_parts()
    return with_base(initial_state(params, run.rule, marked=run.length.every > 0), base)


def host_state(
    run: Run, evaluations: list[tuple[int, Evaluation]], carried: Carried
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns what decides the next step besides the train state: JSON values, response arrays."""
    waits = carried.waiting
    parts = list(itertools.accumulate([len(waits.surplus), len(waits.begun)]))
    waiting, described = to_stored([*waits.surplus, *waits.begun, *waits.batch])
    host = {
        "stream": run.data.stream.get_state(),
        "evaluations": [(step, dataclasses.asdict(e)) for step, e in evaluations],
        "waiting": described,
        "waiting_parts": parts,
        "waiting_metrics": dict(waits.metrics),
        "account": waits.account.to_json(),
        "duals": dict(waits.duals),
        "length": carried.length.to_json(),
    }
    return host, waiting
