"""Runs members of the study, each with the devices that it needs."""

import pathlib
from collections.abc import Sequence

from experiments.studies.age import design
from experiments.sweeps import runner, spec
from experiments.sweeps.spec import Sweep


def run(
    sweep: Sweep, workdir: pathlib.Path, *, parallel: int, only: Sequence[str] = ()
) -> dict[str, str]:
    """Runs the unfinished members; returns member → reason for those that failed.

    Args:
      sweep: of the design.
      workdir: of the study.
      parallel: runs at a time.
      only: members or variants to run; empty for all.
    """
    names = only or [variant.name for variant in spec.variants(sweep)]
    failures = {}
    for count in sorted({design.devices(name) for name in names}):
        failures |= runner.run(
            sweep,
            workdir,
            parallel=parallel,
            only=[name for name in names if design.devices(name) == count],
            environment={"JAX_NUM_CPU_DEVICES": str(count)},
        )
    return failures
