"""Cost of an adapter's update against that of all weights, on a frozen rollout, in turn.

`python -m experiments.bench.adapters` prints the compiled updates' floating-point operations and
temporary bytes, and the ratio of their times, pair by pair, at the shape of `bench.rl_step`.
"""

import json
import sys

from absl import flags

from experiments import command
from luspo_jax.hosts import files

_PAIRS = flags.DEFINE_integer("pairs", 20, "Pairs of updates that count.", lower_bound=2)
_RANK = flags.DEFINE_integer("rank", 8, "Rank of the adapter.", 1)
_BASES = flags.DEFINE_list("bases", ["float32", "bfloat16"], "Types of the frozen weights.")
_SMALL = flags.DEFINE_bool("small", False, "A shape that takes a second, for a try.")
_JSON = flags.DEFINE_string("json", None, "File for everything measured.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace that file if it exists.")

FULL = "full"


def measure(workload, *, pairs: int, rank: int, bases: list[str]) -> dict:
    """Returns operations, bytes and paired times of updates of all weights and of adapters."""
    import jax

    from experiments.bench import frozen, turns
    from experiments.bench.report import paired
    from luspo_jax.learner.state import initial_state, with_base
    from luspo_jax.models import decoder, low_rank

    def weights(dtype):
        return decoder.init_params(jax.random.key(0), workload.model, dtype)

    axes = decoder.param_axes(workload.model)
    rules = {FULL: frozen.rule(workload)}
    states = {FULL: initial_state(weights("float32"), rules[FULL])}
    for base in bases:
        made = low_rank.Adapter(rank=rank, alpha=2.0 * rank, base=base)
        rule = rules[base] = frozen.rule(workload, adapter=made)
        given = weights(low_rank.float_type(made))
        fixed, trained = low_rank.begun(jax.random.key(1), given, axes, made, None)
        states[base] = with_base(initial_state(trained, rule), fixed)
    costs, updates = frozen.updates(rules, states, frozen.rollout(workload))
    seconds = turns.alternate(updates, pairs)
    ratios = {base: paired(seconds[base], seconds[FULL]) for base in bases}
    return {"workload": str(workload), "costs": costs, "seconds": seconds, "ratios": ratios}


def main() -> None:
    """Measures and prints."""
    if _JSON.value:
        files.check_file(_JSON.value, flag="--json", overwrite=_OVERWRITE.value)
    from experiments.bench.workload import SMALL, Workload

    workload = SMALL if _SMALL.value else Workload()
    found = measure(workload, pairs=_PAIRS.value, rank=_RANK.value, bases=_BASES.value)
    print(found["workload"])
    for name, cost in found["costs"].items():
        share = cost["flops"] / found["costs"][FULL]["flops"]
        print(
            f"{name:10} {cost['flops'] / 1e9:10.2f} GFLOP ({share:.3f} of all weights'), "
            f"{cost['temporary_bytes'] / 1e6:9.1f} MB of temporaries"
        )
    for base, ratio in found["ratios"].items():
        print(
            f"rank {_RANK.value} on {base}: {ratio['geometric_mean']:.3f} of an update of all "
            f"weights, 95 % interval {ratio['ci95_low']:.3f} … {ratio['ci95_high']:.3f}"
        )
    if _JSON.value:
        text = json.dumps(found, indent=2) + "\n"
        files.write_new(_JSON.value, text, flag="--json", overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    sys.exit(command.call(main))
