"""All checks of a machine, in the order in which later ones rest on earlier ones."""

from collections.abc import Sequence
from typing import Any

import jax

from experiments.machine import (
    advice,
    agreement,
    attention_checks,
    decoding,
    product_checks,
    rates,
    training,
)
from experiments.machine.records import Check
from experiments.machine.running import Known
from luspo_jax.sharding import available_devices

# What is right comes before what is fast; where time is short, decode steps are left out first.
_MODULES = (rates, agreement, attention_checks, product_checks, training, advice, decoding)
_ALWAYS = ("machine", "rates")  # what others rest on


def checks(device: jax.Device, parts: Sequence[str] = ()) -> list[Check]:
    """Returns the checks of a device; of some parts, those and what they rest on."""
    every = [check for module in _MODULES for check in module.checks(device)]
    wanted = {*_ALWAYS, *parts, *(["training"] if "rehearsal" in parts else [])}
    return [check for check in every if not parts or check.part in wanted]


def known(config: Any, config_name: str, *, deadline: float, tiny: bool = False) -> Known:
    """Returns what is known before the first check.

    Args:
      config: to advise on.
      config_name: its file.
      deadline: on the clock of `time.monotonic`.
      tiny: whether the smallest sizes are used.
    """
    return Known(config, config_name, available_devices()[0], deadline, tiny)
