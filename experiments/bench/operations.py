"""Where an update's time goes, operation by operation, on the machine at hand.

`python -m experiments.bench.operations` runs the compiled update of `bench.rl_step`'s synthetic
shape under jax's profiler and prints the operations that took longest, with what they compute.
`--pack_length` lays the responses in packed rows, with prompts once. On several cores operations
run beside each other, so their times add up to more than the step's.
"""

import collections
import glob
import gzip
import json
import re
import sys
import tempfile
import time

from absl import flags

from experiments import command

_PACK = flags.DEFINE_integer("pack_length", 0, "Tokens of a packed row; 0 = a response a row.", 0)
_MOST = flags.DEFINE_integer("most", 30, "Operations that are shown.", 1)
_SMALL = flags.DEFINE_bool("small", False, "A shape that takes a second, for a try.")

# A thunk that runs others, or waits: their time is that of what they run.
_AROUND = re.compile(r"^(ThunkExecutor|Slinky|\$|while|cond|call|Pjit|Parse|Trace|Xla)", re.I)


def measure(workload, *, pack_length: int) -> dict:
    """Returns the seconds of an update, and of each of its operations.

    Returns:
      seconds: of a step that is not traced, the least of three.
      operations: name → (milliseconds, calls, shape, the function that it comes from).
    """
    import jax

    from experiments.bench import frozen
    from luspo_jax.learner.state import initial_state
    from luspo_jax.learner.step import update_step
    from luspo_jax.models import decoder

    rule, batch = frozen.rule(workload), frozen.rollout(workload, pack_length)
    state = initial_state(decoder.init_params(jax.random.key(0), workload.model), rule)
    rate = jax.numpy.float32(1e-6)
    program = update_step.lower(state, batch, rate, rule=rule).compile()
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, batch, rate))
        taken.append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory(prefix="luspo_trace_") as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(state, batch, rate))
        (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    return {"seconds": min(taken[1:]), "operations": _operations(events, program.as_text())}


def _operations(events, hlo):
    known = {}
    for found in re.finditer(r'%?([\w.\-]+) = (\S+) .*?op_name="([^"]*)"', hlo):
        known.setdefault(found[1], (found[2], found[3]))
    spent, calls = collections.Counter(), collections.Counter()
    for event in events:
        name = event.get("name", "")
        if event.get("ph") == "X" and name in known and not _AROUND.match(name):
            spent[name] += event["dur"] / 1e3
            calls[name] += 1
    return {name: (ms, calls[name], *known[name]) for name, ms in spent.most_common()}


def main() -> None:
    """Measures and prints."""
    from experiments.bench.workload import SMALL, Workload

    workload = SMALL if _SMALL.value else Workload()
    found = measure(workload, pack_length=_PACK.value)
    print(workload)
    print(f"an update takes {found['seconds']:.3f} s; its operations, milliseconds of all calls:")
    for name, (spent, calls, shape, origin) in list(found["operations"].items())[: _MOST.value]:
        # The end of the path names the layer and the function.
        path = origin.replace("closed_call/", "").replace("while/body/", "")
        print(f"{spent:9.1f} {calls:5}  {name[:34]:34} {shape[:28]:28} …{path[-60:]}")


if __name__ == "__main__":
    sys.exit(command.call(main))
