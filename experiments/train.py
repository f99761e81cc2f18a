"""Trains a model: `python -m experiments.train --config=configs/quickstart.py --workdir=DIR`.

Any field of the configuration can be set by flag: `--config.rollout.group_size=16`. Running the
same command again continues the run. `--dry_run` prints what would run, and stops.
"""

import sys

from absl import flags
from ml_collections import config_flags

from experiments import command

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: metrics, checkpoints, export.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved run and stop.")


def main() -> None:
    """Runs what the flags say."""
    from experiments import figures  # Imports after flags are parsed: a typo answers at once.
    from luspo_jax import run as runs
    from luspo_jax import train

    config = command.config_value(_CONFIG)
    run = runs.build(config)
    print(command.description(run))
    if _DRY_RUN.value:
        return
    workdir = runs.Workdir(_WORKDIR.value, config, runs.facts(run))
    outcome = train.train(run, workdir)
    figure = figures.run_figure(workdir.path)
    print(f"base : {outcome.base}\nfinal: {outcome.final}")
    print(f"figure: {figure}" + (f"\nexport: {outcome.export}" if outcome.export else ""))


if __name__ == "__main__":
    sys.exit(command.call(main, required=("config", "workdir")))
