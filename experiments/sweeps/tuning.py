"""Selects the best learning rate of each objective, from a sweep over rates."""

import math
import pathlib

import numpy as np

from experiments.sweeps import report
from experiments.sweeps.spec import Sweep


def best_rates(sweep: Sweep, folder: pathlib.Path) -> dict[str, float]:
    """Returns objective → the learning rate with the largest mean area under the reward curve.

    The sweep has the axes `objective` and `rate` and the outcome "reward area".
    """
    rates: dict[str, dict[float, list[float]]] = {}
    for result in report.collect(sweep, folder):
        levels = dict(result.member.variant.levels)
        value = result.outcomes.get("reward area", math.nan)
        if math.isfinite(value):
            rates.setdefault(levels["objective"], {}).setdefault(float(levels["rate"]), []).append(
                value
            )
    return {
        name: max(found, key=lambda rate, found=found: np.mean(found[rate]))
        for name, found in rates.items()
    }
