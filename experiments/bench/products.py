"""What bfloat16 products gain and move: an update and log-probs, with them and in float32.

`python -m experiments.bench.products` takes updates of packed rows with `model.products=bfloat16`
and without in alternating turns, and prints the ratio of their times pair by pair, and by how much
the log-probs of the same random weights differ.
"""

import dataclasses
import sys

from absl import flags

from experiments import command

_PAIRS = flags.DEFINE_integer("pairs", 10, "Pairs that count.", lower_bound=2)
_PACK = flags.DEFINE_integer("pack_length", 1120, "Tokens of a packed row; 0 = none.", 0)
_SMALL = flags.DEFINE_bool("small", False, "A shape that takes a second, for a try.")
ROUNDED, WHOLE = "bfloat16", "float32"


def measure(workload, *, pairs: int, pack_length: int) -> dict:
    """Returns the seconds of each side's updates, and the differences of their log-probs in nats.

    Returns:
      seconds: by side, pair by pair.
      differences: of the log-probs of scored tokens, of random weights.
    """
    import jax
    import numpy as np

    from experiments.bench import frozen, turns
    from luspo_jax.learner.logprobs import row_logprobs
    from luspo_jax.learner.state import initial_state
    from luspo_jax.models import decoder

    rule = frozen.rule(workload)
    how = dataclasses.replace(rule.logprobs.how, products=ROUNDED)
    rounded = dataclasses.replace(rule, logprobs=dataclasses.replace(rule.logprobs, how=how))
    rules = {ROUNDED: rounded, WHOLE: rule}
    batch = frozen.rollout(workload, pack_length)
    params = decoder.init_params(jax.random.key(0), workload.model)
    found = {
        name: np.asarray(row_logprobs(params, batch.rows, rule=each.logprobs).logprobs_RT)
        for name, each in rules.items()
    }
    states = {name: initial_state(params, rule) for name in rules}
    states = jax.tree.map(lambda x: x.copy(), states)  # an update uses its own up
    _, steps = frozen.updates(rules, states, batch)
    scored = found[WHOLE] != 0
    return {
        "seconds": turns.alternate(steps, pairs),
        "differences": np.abs(found[ROUNDED] - found[WHOLE])[scored],
    }


def main() -> None:
    """Measures and prints."""
    from experiments.bench.report import paired
    from experiments.bench.workload import SMALL, Workload

    workload = SMALL if _SMALL.value else Workload()
    measured = measure(workload, pairs=_PAIRS.value, pack_length=_PACK.value)
    seconds, differences = measured["seconds"], measured["differences"]
    ratio = paired(seconds[ROUNDED], seconds[WHOLE])
    print(workload)
    print(
        f"an update with bfloat16 products / in float32 over {_PAIRS.value} pairs: "
        f"{ratio['geometric_mean']:.3f}, 95 % interval {ratio['ci95_low']:.3f} … "
        f"{ratio['ci95_high']:.3f}"
    )
    print(
        f"log-probs of {differences.size:,} tokens differ by {differences.mean():.2g} nats on "
        f"average, by {differences.max():.2g} at most"
    )


if __name__ == "__main__":
    sys.exit(command.call(main))
