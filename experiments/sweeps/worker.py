"""A process that runs members of a sweep one after another, so that they share compilations.

Members come as JSON lines on standard input and answers go back on standard output; a run's prints
go to its own log. The end of the input ends the process at once: a worker never outlives its sweep.
"""

import contextlib
import json
import os
import pathlib
import queue
import sys
import threading
from typing import Any

_LONGEST_REASON = 500  # characters of an error that are sent; the log has all of it


def main() -> None:
    """Runs members until the input ends."""
    tasks: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    while True:
        task = json.loads(tasks.get())
        with _output_to(pathlib.Path(task["log"])):
            answer = _answer(task)
        answers.write(json.dumps(answer) + "\n")


def _read(tasks):
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    try:
        run_member(task)
    except BaseException as error:  # one member's failure must not end the others
        import traceback

        traceback.print_exc()
        reason = " ".join(str(error).split())  # on one line: its second line may matter
        return {"error": f"{type(error).__name__}: {reason[:_LONGEST_REASON]}"}
    return {"error": None}


def run_member(task: dict[str, Any]) -> None:
    """Trains or resumes one member, and marks it as finished."""
    import jax

    from luspo_jax import train
    from luspo_jax.hosts import files
    from luspo_jax.run import fields
    from luspo_jax.run import workdir as workdirs
    from luspo_jax.run.build import build, facts

    jax.config.update("jax_compilation_cache_dir", task["compile_cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    config = fields.default_config()
    fields.assign(config, task["config"])
    run = build(config)
    folder = pathlib.Path(task["folder"])
    workdir = workdirs.Workdir(folder, config, facts(run))
    with contextlib.closing(workdir):
        train.train(run, workdir)
    mark = {"fingerprint": task["fingerprint"]}
    files.write_text(folder / "finished.json", json.dumps(mark) + "\n")


@contextlib.contextmanager
def _output_to(log: pathlib.Path):
    """Redirects file descriptors 1 and 2 to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with log.open("a") as stream:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, old in enumerate(kept, start=1):
            os.dup2(old, target)
            os.close(old)


if __name__ == "__main__":
    main()
