"""Shows what runs are doing, once or again and again."""

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence

from experiments.progress import facts, reading, text
from luspo_jax.hosts.buckets import BucketError

_FROM_THE_TOP = "\x1b[H\x1b[J"  # of a cleared screen


def show(workdirs: Sequence[str], *, every_s: float = 0.0, as_json: bool = False) -> bool:
    """Prints the state of runs and sweeps; returns whether all are running or finished.

    Args:
      workdirs: their folders.
      every_s: seconds between two looks, until Ctrl-C; 0 looks once.
      as_json: print a line of JSON for each run instead of text.

    Raises:
      BucketError: an address that cannot be read, at the first look.
    """
    folders = {name: reading.folder(name) for name in workdirs}
    screen = every_s and sys.stdout.isatty() and not as_json
    beats, well, seen = facts.Beats(), True, False
    try:
        while True:
            try:
                page, well = _drawn(folders, beats, as_json)
                print(f"{_FROM_THE_TOP}{page}" if screen else page, flush=True)
                seen = True
            except BucketError as error:  # the next look may find the server again
                if not (seen and every_s):
                    raise
                print(error, file=sys.stderr, flush=True)
            if not every_s:
                break
            if not (screen or as_json):
                print()
            time.sleep(every_s)
    except KeyboardInterrupt:
        pass
    return well


def _drawn(folders, beats, as_json):
    """Returns the text of all runs, and whether all are well."""
    width, parts, well = shutil.get_terminal_size().columns, [], True
    for name, folder in folders.items():
        members = facts.members(folder)
        paths = {path: reading.folder(f"{name}/{path}") for path in members} or {name: folder}
        known = [facts.progress(path, place, beats) for path, place in paths.items()]
        well = well and all(one.state in facts.WELL for one in known)
        if as_json:
            parts += [_json(one, f"{name}/{one.workdir}" if members else name) for one in known]
        elif members:
            short = [dataclasses.replace(k, workdir=k.workdir.split("/", 1)[1]) for k in known]
            finished = sum(one.state == facts.FINISHED for one in known)
            head = f"{name}: a sweep, {finished} of {len(known)} members that began are finished"
            parts.append(f"{head}\n{text.member_lines(short, width)}")
        else:
            parts.append(text.page(known[0], width))
    return ("\n" if as_json else "\n\n").join(parts), well


def _json(known, workdir):
    """Returns a run as a line of JSON, which has no NaN and no infinity: null."""
    return json.dumps(_finite(dataclasses.asdict(dataclasses.replace(known, workdir=workdir))))


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
