"""Says what runs are doing, from their workdirs, and changes nothing there:

`python -m experiments.status WORKDIR [WORKDIR …] [--watch[=SECONDS]] [--json]`

Steps and the time they take, reward, length, held-out accuracy, warnings, each process's last sign
of life, checkpoints and disk. Of a sweep's workdir: a line for each member. `--watch` draws it anew
every 10 seconds, or as often as it says, until Ctrl-C. The exit status is 0 if all runs are running
or finished, and 1 if one is silent, failed, never started or gone.
"""

import dataclasses
import json
import math
import shutil
import sys
import time

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
    from experiments.progress import facts, reading

    folders = {name: reading.folder(name) for name in _WORKDIR.value}
    beats, well = facts.Beats(), True
    try:
        while True:
            text, well = _drawn(folders, beats)
            screen = sys.stdout.isatty() and not _JSON.value
            if _WATCH.value and screen:
                text = f"\x1b[H\x1b[J{text}"  # from the top of a cleared screen
            print(text, flush=True)
            if not _WATCH.value:
                break
            if not (screen or _JSON.value):
                print()
            time.sleep(_WATCH.value)
    except KeyboardInterrupt:
        pass
    if not well:
        sys.exit(1)


def _drawn(folders, beats):
    """Returns the text of all runs, and whether all are well."""
    from experiments.progress import facts, reading, text

    width, parts, well = shutil.get_terminal_size().columns, [], True
    for name, folder in folders.items():
        members = facts.members(folder)
        paths = {path: reading.folder(f"{name}/{path}") for path in members} or {name: folder}
        known = [facts.progress(path, place, beats) for path, place in paths.items()]
        well = well and all(one.state in facts.WELL for one in known)
        if _JSON.value:
            parts += [_json(one, f"{name}/{one.workdir}" if members else name) for one in known]
        elif members:
            short = [dataclasses.replace(k, workdir=k.workdir.split("/", 1)[1]) for k in known]
            finished = sum(one.state == facts.FINISHED for one in known)
            head = f"{name}: a sweep, {finished} of {len(known)} members that began are finished"
            parts.append(f"{head}\n{text.member_lines(short, width)}")
        else:
            parts.append(text.page(known[0], width))
    return ("\n" if _JSON.value else "\n\n").join(parts), well


def _json(known, workdir):
    """Returns a run as a line of JSON, which has no NaN and no infinity: null."""
    return json.dumps(_finite(dataclasses.asdict(dataclasses.replace(known, workdir=workdir))))


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(command.call(main, required=("workdir",), positional="workdir"))
