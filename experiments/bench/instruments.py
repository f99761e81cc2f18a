"""Cost of the length instruments: two runs of one configuration, one of them measured, in turn.

`python -m experiments.bench.instruments` runs blocks of rollout steps of both and prints the paired
ratio of their times, block by block. Evaluation and checkpoints are left out, so the share in a
real run is smaller. Instruments do not change training; that is checked at the end.
"""

import contextlib
import json
import sys
import time

from absl import flags

from experiments import command
from luspo_jax.hosts import files

_CONFIG = flags.DEFINE_string("config", "configs/quickstart.py", "File with get_config().")
_EVERY = flags.DEFINE_integer("every", 10, "Steps between measurements, and of a block.", 2)
_SHARE = flags.DEFINE_float("share", 0.25, "Share of the groups that are measured.")
_BLOCKS = flags.DEFINE_integer("blocks", 10, "Blocks of each that count.", 2)
_JSON = flags.DEFINE_string("json", None, "File for everything measured.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace that file if it exists.")


def measure(base: str, *, every: int, share: float, blocks: int) -> dict:
    """Returns the seconds of each block with and without instruments, and their paired ratio."""
    import jax
    import numpy as np

    from experiments.bench.report import environment, paired

    steps = {"with": every, "without": 0}
    seconds, shares = {name: [] for name in steps}, []
    with contextlib.ExitStack() as stack:
        sides = {name: _start(base, steps[name], share, stack) for name in steps}
        for block in range(-1, blocks):  # the first compiles
            # The side that goes first in one block goes second in the next.
            for name in sorted(sides, reverse=block % 2 == 1):
                started = time.perf_counter()
                inside = _block(sides[name], every)
                if block >= 0:
                    seconds[name].append(time.perf_counter() - started)
                if block >= 0 and name == "with":
                    shares.append(inside / seconds[name][-1])
    trained = [jax.tree.leaves(jax.device_get(side["state"].params)) for side in sides.values()]
    if not all(np.array_equal(a, b) for a, b in zip(*trained, strict=True)):
        raise RuntimeError("instruments have changed what was trained")
    return {
        "every": every,
        "share": share,
        "seconds": seconds,
        "ratio": paired(seconds["with"], seconds["without"]),
        "share_of_time": shares,
        "environment": environment(),
    }


def _start(base, every, share, stack):
    from experiments.sweeps import spec
    from luspo_jax.run import beginning, fields
    from luspo_jax.run.build import build

    config = spec.base_config(base)
    fields.assign(config, {"length.every": every, "length.share": share})
    run = build(config)
    stack.enter_context(run.scorer)
    state, carried = beginning.begin_state(run), beginning.Carried()
    return {"run": run, "state": state, "carried": carried, "step": 0}


def _block(side, steps):
    """Runs the steps; returns their seconds as measured by the instruments."""
    import jax

    from luspo_jax import train
    from luspo_jax.metrics import StepMetrics

    inside = 0.0
    for _ in range(steps):
        metrics = StepMetrics()
        side["state"], side["carried"], _ = train.rollout_step(
            side["run"], side["state"], side["carried"], side["step"], metrics=metrics
        )
        inside += metrics.result()["timing_s/length"]
        side["step"] += 1
    jax.block_until_ready(side["state"].params)
    return inside


def main() -> None:
    """Measures and prints."""
    if _JSON.value:
        files.check_file(_JSON.value, flag="--json", overwrite=_OVERWRITE.value)
    found = measure(_CONFIG.value, every=_EVERY.value, share=_SHARE.value, blocks=_BLOCKS.value)
    ratio, seconds = found["ratio"], found["seconds"]
    for name, taken in seconds.items():
        print(f"{name:8} {sum(taken) / len(taken):.3f} s a block of {_EVERY.value} steps")
    print(
        f"ratio over {_BLOCKS.value} pairs: geometric mean {ratio['geometric_mean']:.4f}, 95 % "
        f"interval {ratio['ci95_low']:.4f} … {ratio['ci95_high']:.4f}; by their own clock "
        f"{100 * sum(found['share_of_time']) / _BLOCKS.value:.2f} % of the measured run's time"
    )
    if _JSON.value:
        text = json.dumps(found, indent=2) + "\n"
        files.write_new(_JSON.value, text, flag="--json", overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    sys.exit(command.call(main))
