"""What a workdir in a bucket costs a run: steps beside those of a local one, and a checkpoint.

`python -m experiments.bench.buckets --bucket=gs://BUCKET/FOLDER` takes the quickstart's steps in
two runs of one seed, one with a local workdir and one in the bucket, a few steps in turn, and
prints the ratio of their times pair by pair. Then it saves checkpoints there and on the disk: how
long the loop stands still, how long a copy of the state takes, and when the checkpoint is complete.
"""

import contextlib
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator

from absl import flags

from experiments import command

_BUCKET = flags.DEFINE_string("bucket", None, "Address of an empty folder, as gs://BUCKET/FOLDER.")
_PAIRS = flags.DEFINE_integer("pairs", 12, "Pairs of blocks that count.", lower_bound=2)
_BLOCK = flags.DEFINE_integer("block", 5, "Steps in turn.", lower_bound=1)
_CHECKPOINTS = flags.DEFINE_integer("checkpoints", 12, "Checkpoints on each side.", lower_bound=2)
_SMALL = flags.DEFINE_bool("small", False, "Few short responses, for a try.")


class Side:
    """A run that takes steps when it is asked to.

    Args:
      workdir: of the run.
      config: its configuration.
    """

    def __init__(self, workdir: str, config):
        from luspo_jax.run import workdir as workdirs
        from luspo_jax.run.build import build, facts

        self._run = build(config)
        self.workdir = workdirs.Workdir(workdir, config, facts(self._run))
        self._steps = self._loop()

    def take(self, count: int) -> float:
        """Takes steps, with all that a run writes after each; returns their seconds."""
        began = time.perf_counter()
        for _ in range(count):
            next(self._steps)
        return time.perf_counter() - began

    def close(self) -> None:
        """Ends the run where it stands."""
        self._steps.close()
        self.workdir.close()

    def checkpoint(self) -> tuple[float, float, float]:
        """Saves; returns seconds until the loop may go on, until it is complete, and of a copy of
        the state alone."""
        from luspo_jax.run import bucket_checkpoints

        keeper, state, carried, step = self._standing
        began = time.perf_counter()
        bucket_checkpoints.kept_apart(state)
        copied = time.perf_counter() - began
        self._saved = getattr(self, "_saved", step) + 1
        began = time.perf_counter()
        keeper._save(self._saved, state, carried, None)
        free = time.perf_counter() - began
        keeper._checkpointer.wait()
        return free, time.perf_counter() - began, copied

    def _loop(self) -> Iterator[None]:
        from luspo_jax import train
        from luspo_jax.metrics import StepMetrics
        from luspo_jax.run.keeping import Keeper
        from luspo_jax.run.profile import Profile

        with Keeper(self._run, self.workdir, Profile()) as keeper:
            state, carried = keeper.begin()
            for step, first in keeper.steps():
                metrics = StepMetrics()
                state, carried, rollouts = train.rollout_step(
                    self._run, state, carried, step, metrics=metrics, check_mismatch=first
                )
                keeper.keep(step, state, carried, rollouts, metrics)
                self._standing = keeper, state, carried, step
                yield


def measure(bucket: str, *, pairs: int, block: int, small: bool) -> dict[str, list]:
    """Returns seconds of each side's blocks and checkpoints."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides = {
            name: stack.enter_context(contextlib.closing(Side(place, _config(small, pairs, block))))
            for name, place in (("local", f"{folder}/run"), ("bucket", bucket))
        }
        for side in sides.values():
            side.take(3)  # compile
        seconds: dict[str, list] = {name: [] for name in sides}
        for pair in range(-1, pairs):
            for name in sorted(sides, reverse=pair % 2 == 1):
                sides["bucket"].workdir.flush()  # its last copies are no load on the other's turn
                taken = sides[name].take(block)
                if pair >= 0:
                    seconds[name].append(taken)
        sides["bucket"].workdir.flush()
        for pair in range(-1, _CHECKPOINTS.value):
            for name in sorted(sides, reverse=pair % 2 == 1):
                taken = sides[name].checkpoint()
                if pair >= 0:
                    seconds.setdefault(f"checkpoint {name}", []).append(taken)
    return seconds


def _config(small, pairs, block):
    import importlib.util

    path = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.num_steps = 3 + block * (pairs + 1) + 1
    config.eval.every = config.output.checkpoint_every = 0
    config.eval.num_problems = 8
    config.output.export = False
    if small:
        config.rollout.prompts_per_step, config.train.num_minibatches = 4, 1
    return config


def main() -> None:
    """Measures and prints."""
    import numpy as np

    from experiments.bench.report import paired

    seconds = measure(_BUCKET.value, pairs=_PAIRS.value, block=_BLOCK.value, small=_SMALL.value)
    ratio = paired(seconds["bucket"], seconds["local"])
    print(
        f"steps, bucket / local over {_PAIRS.value} pairs of {_BLOCK.value} steps: "
        f"{ratio['geometric_mean']:.4f}, 95 % interval {ratio['ci95_low']:.4f} … "
        f"{ratio['ci95_high']:.4f}; a local step {np.median(seconds['local']) / _BLOCK.value:.3f} s"
    )
    for name in ("local", "bucket"):
        free, complete, copied = np.median(seconds[f"checkpoint {name}"], axis=0)
        print(
            f"a checkpoint, {name:6}: the loop stands {1e3 * free:.1f} ms, complete after "
            f"{1e3 * complete:.1f} ms; a copy of the state takes {1e3 * copied:.1f} ms"
        )


if __name__ == "__main__":
    sys.exit(command.call(main, required=("bucket",)))
