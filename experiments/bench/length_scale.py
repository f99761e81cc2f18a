"""Cost of a length scale: one update on a frozen rollout, LUSPO's and GSPO's in turn.

`python -m experiments.bench.length_scale` prints the compiled updates' floating-point operations
and temporary bytes, and the ratio of their times, pair by pair. Responses have ragged lengths.
"""

import json
import sys

from absl import flags

from experiments import command
from luspo_jax.hosts import files

_PAIRS = flags.DEFINE_integer("pairs", 20, "Pairs of updates that count.", lower_bound=2)
_SCALE = flags.DEFINE_string("length_scale", "length", "The scale compared with none.")
_SMALL = flags.DEFINE_bool("small", False, "A shape that takes a second, for a try.")
_JSON = flags.DEFINE_string("json", None, "File for everything measured.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace that file if it exists.")


def measure(workload, *, pairs: int, length_scale: str) -> dict:
    """Returns operations, bytes and paired times of updates with and without a length scale."""
    import jax

    from experiments.bench import frozen, turns
    from experiments.bench.report import paired
    from luspo_jax.learner.state import initial_state
    from luspo_jax.models import decoder

    rules = {name: frozen.rule(workload, name) for name in (length_scale, "none")}
    params = decoder.init_params(jax.random.key(0), workload.model)
    states = {name: initial_state(params, rule) for name, rule in rules.items()}
    costs, updates = frozen.updates(rules, states, frozen.rollout(workload))
    seconds = turns.alternate(updates, pairs)
    ratio = paired(seconds[length_scale], seconds["none"])
    return {"workload": str(workload), "costs": costs, "seconds": seconds, "ratio": ratio}


def main() -> None:
    """Measures and prints."""
    if _JSON.value:
        files.check_file(_JSON.value, flag="--json", overwrite=_OVERWRITE.value)
    from experiments.bench.workload import SMALL, Workload

    workload = SMALL if _SMALL.value else Workload()
    found = measure(workload, pairs=_PAIRS.value, length_scale=_SCALE.value)
    scaled, plain, ratio = found["costs"][_SCALE.value], found["costs"]["none"], found["ratio"]
    print(found["workload"])
    for name in plain:
        more = 100 * (scaled[name] / plain[name] - 1)
        print(f"{name:16} {_SCALE.value} {scaled[name]:.6g}  none {plain[name]:.6g}  {more:+.4f} %")
    print(
        f"time ratio {_SCALE.value} / none over {_PAIRS.value} pairs: geometric mean "
        f"{ratio['geometric_mean']:.4f}, 95 % interval {ratio['ci95_low']:.4f} … "
        f"{ratio['ci95_high']:.4f}"
    )
    if _JSON.value:
        text = json.dumps(found, indent=2) + "\n"
        files.write_new(_JSON.value, text, flag="--json", overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    sys.exit(command.call(main))
