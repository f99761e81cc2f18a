"""Says what runs are doing, from their workdirs, and changes nothing there:

`python -m experiments.status WORKDIR [WORKDIR …] [--watch[=SECONDS]] [--json]`

Steps and the time they take, reward, length, held-out accuracy, warnings, each process's last sign
of life, checkpoints and disk. Of a sweep's workdir: a line for each member. WORKDIR may be the
address of a bucket, gs://… or s3://…, read from any host that may list it. `--watch` draws it anew
every 10 seconds, or as often as it says, until Ctrl-C. The exit status is 0 if all runs are running
or finished, and 1 if one is silent, failed, never started or gone.
"""

import math
import sys

from absl import flags

from experiments import command

_WATCH_S = 10.0


class _Seconds(flags.ArgumentParser):
    """Reads a number of seconds, or what --watch and --nowatch alone mean."""

    syntactic_help = "seconds"

    def parse(self, argument):
        alone = {"true": _WATCH_S, "false": 0.0}
        try:
            seconds = alone[argument] if argument in alone else float(argument)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise ValueError("give seconds, as in --watch=10")
        return seconds


class _WatchFlag(flags.Flag):
    """A flag that may stand without a value, as those of yes and no may."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.boolean = True


_WORKDIR = flags.DEFINE_multi_string("workdir", [], "Folder of a run or sweep; or WORKDIR alone.")
_WATCH = flags.DEFINE_flag(
    _WatchFlag(
        _Seconds(), flags.ArgumentSerializer(), "watch", 0.0,
        f"Draw anew every so many seconds, {_WATCH_S:g} if none are given, until Ctrl-C.",
    )
)  # fmt: skip
_JSON = flags.DEFINE_bool("json", False, "A line of JSON for each run instead of text.")


def main() -> None:
    """Prints what the runs are doing, once or until Ctrl-C, and exits."""
    from experiments.progress import watching

    if not watching.show(_WORKDIR.value, every_s=_WATCH.value, as_json=_JSON.value):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",), positional="workdir"))
