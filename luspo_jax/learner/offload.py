"""Parts of the train state in host memory while a rollout needs the devices'."""

import dataclasses

from luspo_jax import sharding
from luspo_jax.types import TrainState

OFFLOADS = {
    "none": (),
    "reference": ("ref_params",),
    "optimizer": ("opt_state",),
    "both": ("ref_params", "opt_state"),
}


def parked(state: TrainState, offload: str) -> TrainState:
    """The state with the parts that OFFLOADS names in host memory, to make room for a rollout.

    What stays is tied to its device, as what comes back will be: jitted functions would compile
    again for that.
    """
    if OFFLOADS[offload]:
        state = _moved(state, [field.name for field in dataclasses.fields(state)], "device")
    return _moved(state, OFFLOADS[offload], "pinned_host")


def fetched(state: TrainState, offload: str) -> TrainState:
    """The state with all parts on the devices again."""
    return _moved(state, OFFLOADS[offload], "device")


def _moved(state, names, memory):
    parts = {name: getattr(state, name) for name in names}
    moved = {name: sharding.moved(x, memory) for name, x in parts.items() if x is not None}
    return dataclasses.replace(state, **moved)
