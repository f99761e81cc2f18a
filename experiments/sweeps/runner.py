"""Runs the members of a sweep in a few worker processes; one may fail without the others."""

import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.sweeps import spec
from experiments.sweeps.spec import Member, Sweep
from luspo_jax.hosts import files
from luspo_jax.hosts.values import ConfigError, nearest
from luspo_jax.metrics import read_metrics
from luspo_jax.run import fields

Task = dict  # worker input: folder, log, config, fingerprint, compile_cache


def run(
    sweep: Sweep,
    workdir: pathlib.Path,
    *,
    parallel: int = 1,
    only: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Runs the unfinished members; returns member → reason for those that failed.

    Args:
      sweep: the sweep.
      workdir: of the sweep.
      parallel: runs at a time, on a share of the cores each.
      only: members or variants to run, in this order; empty for all.
      environment: variables that the runs have besides this process's.

    Raises:
      ConfigError: an invalid sweep, or a workdir that holds another one.
      WorkdirError: a workdir that cannot be written.
    """
    members = spec.check(sweep)
    if only:
        members = _chosen(members, only)
    configs = {m.name: spec.config_of(sweep, m) for m in members}
    prints = {name: fields.fingerprint(config) for name, config in configs.items()}
    _claim(workdir, prints)
    failures, waiting = {}, []
    for member in members:
        state, reason = standing(member.folder(workdir), configs[member.name])
        if state == "broken":
            failures[member.name] = reason
        elif state == "unfinished":
            waiting.append(
                (member, _task(member, configs[member.name], prints[member.name], workdir))
            )
    total = len(members)
    with tqdm(
        total=total, initial=total - len(waiting) - len(failures), unit="run", disable=None
    ) as bar:
        for name, reason in failures.items():
            _report(bar, f"FAILED {name}: {reason}")
            bar.update()
        _run_all(waiting, parallel, bar, failures, {**os.environ, **(environment or {})})
    return failures


def _chosen(members, only):
    names = {name for m in members for name in (m.name, m.variant.name)}
    for name in only:
        if name not in names:
            near = nearest(name, names)
            raise ConfigError(f"--only={name} is no member: {near}")
    chosen = (m for name in only for m in members if name in (m.name, m.variant.name))
    return list({m.name: m for m in chosen}.values())


def standing(folder: pathlib.Path, config: ConfigDict) -> tuple[str, str]:
    """Returns ("finished" | "unfinished" | "broken", why it is broken)."""
    remedy = f"delete {folder} to run it again"
    for name in ("finished.json", "run.json"):
        file = folder / name
        try:
            stored = json.loads(file.read_text()) if file.is_file() else None
            if stored is not None and not isinstance(stored, dict):
                raise ValueError("not an object")
        except (ValueError, OSError) as error:
            return "broken", f"{file} is damaged ({error}): {remedy}"
        if name == "finished.json" and stored is not None:
            if stored.get("fingerprint") != fields.fingerprint(config):
                return "broken", f"{file} belongs to another configuration: {remedy}"
            try:
                _check_complete(folder, config.num_steps)
            except (ValueError, OSError) as error:
                return "broken", f"it is marked as finished, but {error}: {remedy}"
            return "finished", ""
    return "unfinished", ""


def _check_complete(folder, num_steps):
    # A truncated file may still parse: only the number of its last step shows it.
    rows = rows_of(folder)
    last = rows[-1]["step"] if rows else None
    if last != num_steps:
        raise ValueError(f"{folder / 'metrics.jsonl'} ends at step {last} of {num_steps}")


def rows_of(folder: pathlib.Path) -> list[dict[str, float]]:
    """Reads the metrics of a run's folder.

    Raises:
      ValueError: a damaged line.
      OSError: the file cannot be read.
    """
    file, rows = folder / "metrics.jsonl", []
    try:
        for row in read_metrics(file):
            if not all(isinstance(value, (int, float)) for value in (row["step"], *row.values())):
                raise TypeError("a value is no number")
            rows.append(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}, line {len(rows) + 1}: no metrics of a step ({error})") from error
    return rows


def locked(workdir: pathlib.Path) -> contextlib.AbstractContextManager:
    """Waits for other processes: a cluster may run many `--only` in one folder at once."""
    return files.locked(workdir, wait=True)


def _claim(workdir, prints):
    """Records the members of the folder; members may be added, but not changed."""
    files.check_own(workdir, ours=["sweep.json", "members"], what="sweep")
    with locked(workdir):
        _claim_locked(workdir, prints)


def _claim_locked(workdir, prints):
    file, stored = workdir / "sweep.json", {}
    if file.is_file():
        try:
            stored = dict(json.loads(file.read_text())["members"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is damaged ({error}): delete it to go on") from error
    changed = sorted(name for name in prints if stored.get(name, prints[name]) != prints[name])
    if changed:
        raise ConfigError(
            f"{workdir} holds another sweep: {', '.join(changed[:5])} "
            f"{'has' if len(changed) == 1 else 'have'} other fields there; choose another --workdir"
        )
    files.write_text(file, json.dumps({"members": stored | prints}, indent=1) + "\n")


def _task(member, config, fingerprint, workdir) -> Task:
    folder = member.folder(workdir).absolute()
    log = workdir / "logs" / spec.slug(member.variant.name) / f"seed_{member.seed}.log"
    return {
        "folder": str(folder),
        "log": str(log.absolute()),
        "config": fields.flat(config) | spec.tracked(config, member, workdir),
        "fingerprint": fingerprint,
        "compile_cache": str((workdir / ".compile_cache").absolute()),
    }


def _run_all(waiting, parallel, bar, failures, environment):
    """Gives the next member to the first free worker."""
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    for item in waiting:
        tasks.put(item)
    lock = threading.Lock()

    def done(member: Member, seconds: float, error: str | None) -> None:
        with lock:
            if error:
                failures[member.name] = error
            _report(
                bar, f"{'FAILED ' if error else ''}{member.name}: {error or f'{seconds:.1f} s'}"
            )
            bar.update()

    threads = [
        threading.Thread(
            target=_serve, args=(tasks, done, index, parallel, environment), daemon=True
        )
        for index in range(min(parallel, max(1, len(waiting))))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # joined in pieces, so that Ctrl-C is heard
            thread.join(0.5)


def _serve(tasks, done: Callable, index: int, parallel: int, environment) -> None:
    """Feeds one worker at a time; replaces one that dies."""
    worker = None
    while True:
        try:
            member, task = tasks.get_nowait()
        except queue.Empty:
            break
        started = time.monotonic()
        try:
            worker = worker or _start(index, parallel, environment)
            worker.stdin.write(json.dumps(task) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except OSError as problem:
            line, error = "", f"no process could be started: {problem}"
        if line.endswith("\n"):
            error = json.loads(line)["error"]
        elif worker is not None:
            error, worker = _last_words(worker), None
        done(member, time.monotonic() - started, f"{error} (log: {task['log']})" if error else None)
    if worker is not None:
        worker.stdin.close()
        worker.wait()


def _start(index, parallel, environment):
    """Starts a worker on its share of the cores: one run's threads do not slow another's."""
    command = [sys.executable, "-m", "experiments.sweeps.worker"]
    worker = subprocess.Popen(
        command,
        cwd=spec.ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(worker.pid, set(cores[index % len(cores) :: parallel]))
    return worker


def _last_words(worker):
    status = worker.wait()
    return f"its process was killed by signal {-status}" if status < 0 else f"exit status {status}"


def _report(bar, line):
    bar.write(line)
    sys.stdout.flush()  # into a log file, too, as it happens
