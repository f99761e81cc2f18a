"""Flags for runs of several processes, and the watchdog of each process."""

import pathlib
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from experiments import command
from luspo_jax.hosts import guard

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT where process 0 of a run of several processes listens."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "off",
    ["off", "auto"],
    "auto: one of the processes of a TPU pod, SLURM, Open MPI or Kubernetes job.",
)
_NAMES = ("coordinator", "num_processes", "process_id", "distributed")


def call(
    main: Callable[[], None], *, required: Sequence[str] = (), config: str = "default_config"
) -> int:
    """As `command.call`; a process of several runs in a worker, which is watched from here."""
    if guard.guarded():
        guard.work(lambda: command.call(main, required=required, config=config))
    if any(argument.lstrip("-").split("=")[0] in _NAMES for argument in sys.argv[1:]):
        return guard.watch([sys.executable, *sys.orig_argv[1:]])
    return command.call(main, required=required, config=config)


def arguments() -> dict[str, Any] | None:
    """What the flags say, as `processes.initialize` takes it; None for a run of one process.

    Nothing is guessed unless requested: a laptop never waits for a cluster.

    Raises:
      UsageError: incompatible flags.
    """
    given = {
        "coordinator": _COORDINATOR.value or None,
        "num_processes": _NUM_PROCESSES.value,
        "process_id": _PROCESS_ID.value,
    }
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if _DISTRIBUTED.value == "auto":
        if named:
            raise command.UsageError(
                f"--distributed=auto finds out by itself: leave out {', '.join(named)}"
            )
        return {}
    if not named:
        return None
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise command.UsageError(
            f"{' and '.join(missing)} missing: --coordinator=HOST:PORT, --num_processes and "
            "--process_id go together"
        )
    _check(**given)
    return {
        "coordinator_address": given["coordinator"],
        "num_processes": given["num_processes"],
        "process_id": given["process_id"],
    }


def join(config: Any, arguments: dict[str, Any], workdir: str | None) -> None:
    """Brings this process together with the others, and makes sure that they run the same.

    Args:
      config: of the run.
      arguments: from `arguments`.
      workdir: where the processes tell what they do; None for a dry run.
    """
    from luspo_jax.hosts import processes
    from luspo_jax.run import fields
    from luspo_jax.run import workdir as workdirs
    from luspo_jax.run.place import Place

    place = Place(workdir) if workdir is not None else None
    processes.start(
        arguments,
        place and place.board,
        shared=place is None or place.shared,
        checkpoints=place and place.checkpoints,
        dead_after_s=config.hosts.dead_after_s,
        phase_timeout_s=config.hosts.phase_timeout_s,
    )
    print(processes.describe(arguments), flush=True)
    library, launchers = pathlib.Path(processes.__file__).parents[1], pathlib.Path(__file__).parent
    processes.agree(
        {
            **{f"--config.{name}": value for name, value in fields.flat(config).items()},
            "python": platform.python_version(),
            **workdirs.package_versions(),
            **processes.source_hashes(library, launchers),
        }
    )


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise command.UsageError(
            f"--coordinator={coordinator} must be HOST:PORT, of process 0 and a free port there"
        )
    if num_processes < 1:
        raise command.UsageError(f"--num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise command.UsageError(
            f"--process_id={process_id} must be at least 0 and less than --num_processes="
            f"{num_processes}"
        )
