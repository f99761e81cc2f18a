"""Checks a machine, measures it, and says what to set there:

`python -m experiments.checkup [--config=configs/FILE.py] [--html=FILE] [--json=FILE]`

The first thing to run on a new card, slice or laptop; it reads no weights and no data but the
quickstart's own. It compares every kernel of the platform with a plain computation in float64,
measures matrix rate and memory bandwidth, sets a decode step and a training step beside them,
compares sampler and trainer, sets the rehearsal's predictions beside what was measured, and ends
with what to set for a configuration, the quickstart's if none is named.

It takes at most about --minutes: what does not fit is left out, and the report says so. Exits with
1 if a kernel or the sampler is wrong. docs/checkup.md says how to read it.
"""

import os
import pathlib
import re
import sys
import time

from absl import flags
from ml_collections import config_flags

from experiments import command
from experiments.machine.records import PARTS
from luspo_jax.hosts import files

_USUAL = pathlib.Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), to advise on; unset = the quickstart's."
)
_MINUTES = flags.DEFINE_float("minutes", 8.0, "Time that it may take.", 0.0)
_PARTS = flags.DEFINE_list("parts", [], "Only these parts, as kernels,rates; unset = all.")
_JSON = flags.DEFINE_string("json", "", "File for everything found, as JSON.")
_HTML = flags.DEFINE_string("html", "", "File for the report as a page.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace these files if they exist.")
_TINY = flags.DEFINE_bool("tiny", False, "The smallest sizes, to try the command: no rate holds.")


def main() -> None:
    """Checks, prints, writes, and exits with 1 if something is wrong."""
    started = time.monotonic()
    for flag in (_JSON, _HTML):
        if flag.value:
            files.check_file(flag.value, flag=f"--{flag.name}", overwrite=_OVERWRITE.value)
    if _JSON.value and _HTML.value and _same(_JSON.value, _HTML.value):
        raise command.UsageError(f"--json and --html are both {_JSON.value}: name two files")
    config = command.config_value(_CONFIG)
    unknown = sorted(set(_PARTS.value) - set(PARTS))
    if unknown:
        raise command.UsageError(f"--parts={unknown[0]}: there are {', '.join(PARTS)}")
    if "rollout" not in config:
        raise command.UsageError(
            f"--config={_name()}: a supervised run samples nothing; name a run of experiments.train"
        )
    from experiments.machine import registry, report, running
    from luspo_jax.run.checks import check

    check(config)
    known = registry.known(
        config,
        _name(),
        deadline=started + 60 * _MINUTES.value,
        tiny=_TINY.value,
    )
    checks = registry.checks(known.device, _PARTS.value)
    print(f"{len(checks)} checks, at most about {_MINUTES.value:g} min", flush=True)
    outcomes = running.run(checks, known, say=lambda line: print(line, flush=True))
    seconds = time.monotonic() - started
    print(report.text(outcomes, seconds), flush=True)
    found = report.record(outcomes, config=_name(), minutes=_MINUTES.value, seconds=seconds)
    title = f"Checkup of {known.device.device_kind}, for {_name()}"
    for flag, content in (  # A flag cannot be the key of a dict.
        (_JSON, lambda: report.as_json(found)),
        (_HTML, lambda: report.page(outcomes, title, seconds)),
    ):
        if flag.value:
            files.write_new(
                flag.value, content(), flag=f"--{flag.name}", overwrite=_OVERWRITE.value
            )
    if not running.passed(outcomes):
        raise SystemExit(1)


def _same(one, other):
    return pathlib.Path(one).resolve() == pathlib.Path(other).resolve()


def _name():
    """The configuration's file, as it was named, or the last of its path."""
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    return pathlib.Path(path).stem


def call() -> int:
    """Calls `main` with the flags; returns the exit status."""
    # Not the flag's default, which is read, and its fields set, before any error is caught.
    if not any(re.match("--?config(=|$)", argument) for argument in sys.argv[1:]):
        sys.argv.insert(1, f"--config={_USUAL}")
    # The host computes what kernels must find. Set before jax is imported, as configurations do.
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked and "cpu" not in asked.split(","):
        os.environ["JAX_PLATFORMS"] = f"{asked},cpu"
    return command.call(main)


if __name__ == "__main__":
    sys.exit(call())
