"""Trains a model: `python -m experiments.train --config=configs/quickstart.py --workdir=DIR`.

Any field of the configuration can be set by flag: `--config.rollout.group_size=16`. Running the
same command again resumes the run. `--dry_run` prints what would run, and stops. `--fork=RUN`
begins a new workdir from a checkpoint of another run (`--fork_step`; by default its latest), with
any fields changed; run.json lists them. `--profile_steps=4-6` writes a trace of these steps into
the workdir's folder `profile`. `--measure_sizes` times updates in micro-batches of several sizes,
packed rows among them, and takes the fastest; later runs of such shapes on this machine do so
without measuring.

On several hosts: the same command on each, with `--coordinator=HOST:PORT --num_processes=N
--process_id=I`, or with `--distributed=auto` on a TPU pod or under SLURM, Open MPI or Kubernetes.
The workdir must be on shared storage; its folder `processes` shows what each process is doing.
"""

import sys

from absl import flags
from ml_collections import config_flags

from experiments import cluster, command

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: metrics, checkpoints, export.")
_FORK = flags.DEFINE_string("fork", None, "Workdir of a run to begin from; it is not changed.")
_FORK_STEP = flags.DEFINE_integer("fork_step", None, "Checkpoint to begin from; the latest.", 0)
_MEASURE = flags.DEFINE_bool(
    "measure_sizes", False, "Take the sizes of micro-batches whose updates are fastest here."
)
_MEASURED_LENGTH = flags.DEFINE_float(
    "measured_length", None, "Assumed mean tokens of a response there; a quarter of the longest.", 1
)
_PROFILE = flags.DEFINE_string("profile_steps", "", "Rollout steps to trace: FIRST-LAST.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved run and stop.")


def main() -> None:
    """Runs what the flags say."""
    from experiments import figures  # Imports after flags are parsed: a typo answers at once.
    from luspo_jax import train
    from luspo_jax.hosts import buckets, guard, processes
    from luspo_jax.run import profile as profiles
    from luspo_jax.run import workdir as workdirs
    from luspo_jax.run.build import build, facts

    config, several = command.config_value(_CONFIG), cluster.arguments()
    workdirs.check_place(_WORKDIR.value or "")
    traced = profiles.steps_of(_PROFILE.value, config.num_steps)
    if _FORK_STEP.value is not None and not _FORK.value:
        raise command.UsageError("--fork_step is of --fork: name the workdir to begin from")
    if several is not None:
        cluster.join(config, several, None if _DRY_RUN.value else _WORKDIR.value)
    if _MEASURE.value:
        config = _measured(config)
    remote = buckets.is_bucket(_WORKDIR.value or "")
    profile = profiles.Profile(
        None if remote else _WORKDIR.value, traced, several=several is not None
    )
    with guard.phase("build"):
        run = build(config)
        workdirs.check_processes(config, run.roles)
        known, fork = facts(run), None
        if _FORK.value:
            fork = workdirs.fork(_WORKDIR.value, _FORK.value, _FORK_STEP.value, config, known)
        if processes.is_writer():
            print(command.description(run))
            if fork:
                print(_begins(fork))
            if profile.there:
                print(f"profile   : {profile.folder} has these steps already")
    if _DRY_RUN.value:
        processes.stop()
        return
    try:
        with workdirs.Workdir(_WORKDIR.value, config, known, fork=fork) as workdir:
            if remote:  # only now its folder on this host has what the bucket holds
                profile = profiles.Profile(workdir.path, traced, several=several is not None)
            outcome = train.train(run, workdir, profile)
            if processes.is_writer():
                figure = figures.run_figure(workdir.path)
    except guard.Preempted:
        processes.stop()  # together: jax aborts the others when process 0 is gone
        raise
    if processes.is_writer():
        print(f"base : {outcome.base}\nfinal: {outcome.final}")
        print(f"figure: {workdir.name}/{figure.name}")
        if outcome.export:
            print(f"export: {outcome.export}")
    processes.stop()


def _measured(config):
    """Returns the configuration with measured sizes; a run that continues keeps its own."""
    from experiments.machine import sizes
    from luspo_jax.hosts import processes
    from luspo_jax.run import workdir as workdirs

    begun = workdirs.is_begun(_WORKDIR.value)
    known = workdirs.stored_config(_WORKDIR.value) if begun else None
    say = print if processes.is_writer() else (lambda _: None)
    return sizes.resolved(config, known, mean_length=_MEASURED_LENGTH.value, say=say)


def _begins(fork) -> str:
    """Describes the start of a fork, and what it changes."""
    changed = ", ".join(f"{name} {old!r} → {new!r}" for name, (old, new) in fork["changed"].items())
    return f"fork      : of {fork['run']} at step {fork['step']}; changed: {changed or 'nothing'}"


if __name__ == "__main__":
    sys.exit(cluster.call(main, required=("config", "workdir")))
