"""Cost of the signs of life of several processes: `python -m experiments.bench.life_signs`.

Two real processes on this host, connected by `jax.distributed`, post and read as fast as `--every`
says; of each, the CPU time of a beat is printed, with that of jax's own threads meanwhile. The
posts of further processes are put there beforehand: everyone reads those of all.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time

from absl import flags

from experiments import command

_BEATS = flags.DEFINE_integer("beats", 100, "Beats that count.", 1)
_EVERY = flags.DEFINE_float("every", 0.05, "Seconds between two beats.", 1e-3)
_POSTS = flags.DEFINE_multi_integer("posts", [2, 256], "Processes whose posts are read.", 2)
_CHILD = flags.DEFINE_string("child", None, "INDEX:PORT of a process that this program starts.")
_WAIT_S = 120.0  # for the other process


def main() -> None:
    """Measures."""
    if _CHILD.value:
        index, port = map(int, _CHILD.value.split(":"))
        cpu_s = measured(index, port, _POSTS.value[0], _BEATS.value, _EVERY.value)
        print(f"process {index}, posts of {_POSTS.value[0]}: {1e3 * cpu_s:.2f} ms of CPU a beat")
        return
    for posts in _POSTS.value:
        port = _free_port()
        start = [sys.executable, "-m", "experiments.bench.life_signs"]
        start += [f"--posts={posts}", f"--beats={_BEATS.value}", f"--every={_EVERY.value}"]
        children = [
            subprocess.Popen(
                [*start, f"--child={i}:{port}"],
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stderr=subprocess.DEVNULL,
            )
            for i in range(2)
        ]
        if any([child.wait(_WAIT_S) for child in children]):
            sys.exit("a process failed: give it --child=0:PORT --posts=2 by hand to see why")


def measured(index: int, port: int, num_posts: int, beats: int, every_s: float) -> float:
    """Returns the CPU seconds of a beat on one of two processes."""
    import jax

    from luspo_jax.hosts import lifesigns, peers, store

    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
    posts, done = store.Store("luspo_jax/bench"), threading.Event()
    post = {
        "process": index, "host": socket.gethostname(), "pid": os.getpid(), "attempt": "0" * 32,
        "guard": (socket.gethostname(), port), "phase": "update_actor", "phase_s": 1.0,
        "step": 100, "status": "running", "message": "",
    }  # fmt: skip
    for absent in range(2, num_posts if index == 0 else 0):
        posts.put(absent, json.dumps(post | {"process": absent, "beat": 0}))
    here, there = socket.socketpair()
    threading.Thread(target=_drain, args=(there,), daemon=True).start()
    seen = []

    def tell(**news):
        here.sendall(json.dumps(news).encode())  # as to the guard
        seen.append("posts" in news)
        if sum(seen) >= beats:
            done.set()

    peers.BEAT_S = every_s
    posts.meet("start", _WAIT_S)
    before = time.process_time()
    signs = lifesigns.Signs(posts, index, lambda: post, tell)
    if not done.wait(_WAIT_S):
        raise RuntimeError(f"no {beats} beats within {_WAIT_S:g} s")
    cpu_s = (time.process_time() - before) / sum(seen)
    signs.leave(_WAIT_S)
    jax.distributed.shutdown()
    return cpu_s


def _drain(channel):
    while channel.recv(1 << 16):
        pass


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    sys.exit(command.call(main))
