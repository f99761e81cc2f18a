"""Runs the members of a sweep: `python -m experiments.sweep --sweep=FILE --workdir=DIR`.

Each member is an ordinary run in its own folder. Running the same command again resumes;
`--dry_run` prints the members and their launch lines for a cluster, and writes nothing. At the end
it writes table.csv, table.md, results.csv and figures into the workdir.
"""

import pathlib
import sys

from absl import flags

from experiments import command

_SWEEP = flags.DEFINE_string("sweep", None, "File with get_sweep().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time, on a share of the cores each.", 1)
# Repeated, not joined with commas, because names may contain commas.
_ONLY = flags.DEFINE_multi_string(
    "only",
    [],
    "A member to run (variant/seed_N), or a variant with all its seeds; may be repeated.",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print members and launch lines, and stop.")


def main() -> None:
    """Runs the sweep that the flags select."""
    from experiments.sweeps import report, runner, spec

    sweep = spec.load(_SWEEP.value)
    members = spec.check(sweep)
    workdir = pathlib.Path(_WORKDIR.value or "DIR")
    if _DRY_RUN.value:
        print(f"{len(members)} members: {len(spec.variants(sweep))} × seeds {list(sweep.seeds)}")
        for variant in spec.variants(sweep):
            print(f"  {variant.name}: " + ", ".join(f"{k}={v}" for k, v in variant.fields))
        for member in members:
            print(spec.launch_line(sweep, member, workdir, _SWEEP.value))
        return
    failures = runner.run(sweep, workdir, parallel=_PARALLEL.value, only=_ONLY.value)
    print(report.write(sweep, workdir, failures))
    if failures:
        lines = "\n".join(f"  - {name}: {reason}" for name, reason in failures.items())
        raise command.UsageError(f"{len(failures)} of {len(members)} members failed:\n{lines}")


if __name__ == "__main__":
    sys.exit(command.call(main, required=("sweep", "workdir")))
