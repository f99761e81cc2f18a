"""Cost of advantages of tokens: an update with them and without, and Σπ² from the head.

`python -m experiments.bench.token_advantages` prints ratios pair by pair, in alternating turns: of
updates with an advantage for each token and for each response, and of the pass that computes
log-probs with and without Σ_v π_v²; then what both, and forming the advantages, add to an update.
"""

import dataclasses
import functools
import sys

from absl import flags

from experiments import command

_PAIRS = flags.DEFINE_integer("pairs", 20, "Pairs that count.", lower_bound=2)
_SMALL = flags.DEFINE_bool("small", False, "A shape that takes a second, for a try.")


def measure(workload, *, pairs: int) -> dict:
    """Returns seconds of each side, pair by pair, and of forming the advantages of tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.bench import frozen, turns
    from luspo_jax import objectives
    from luspo_jax.learner.logprobs import row_logprobs
    from luspo_jax.learner.state import initial_state
    from luspo_jax.learner.step import update_step
    from luspo_jax.models import decoder

    rule = frozen.rule(workload, "none")
    rule = dataclasses.replace(rule, objective=objectives.preset("dapo"))
    batch = frozen.rollout(workload)
    mask_BT = batch.responses.response_mask_BT
    drawn = np.random.default_rng(1).normal(size=mask_BT.shape).astype(np.float32)
    of_tokens = dataclasses.replace(batch.responses, token_advantages_BT=jnp.asarray(drawn))
    batches = {"tokens": dataclasses.replace(batch, responses=of_tokens), "responses": batch}
    params = decoder.init_params(jax.random.key(0), workload.model)
    rate, states = jnp.float32(1e-6), {}
    programs = {}
    for name, each in batches.items():
        states[name] = initial_state(params, rule)
        programs[name] = update_step.lower(states[name], each, rate, rule=rule).compile()

    def update(name):
        states[name], _ = jax.block_until_ready(programs[name](states[name], batches[name], rate))

    rules = {
        "collision": dataclasses.replace(rule.logprobs, collision=True),
        "without": rule.logprobs,
    }

    def score(name):
        jax.block_until_ready(row_logprobs(params, batch.rows, rule=rules[name]))

    otb = objectives.preset("otb")
    lengths_B = np.asarray(mask_BT.sum(axis=1))
    rewards_B = drawn[:, 0]
    tokens = objectives.TokenStatistics(
        mask_BT, batch.responses.old_logprobs_BT, jnp.full(mask_BT.shape, 0.5)
    )

    def form():
        jax.block_until_ready(
            objectives.advantages(
                otb, rewards_B, batch.responses.group_ids_B, lengths_B, tokens=tokens
            )
        )

    sides = {name: functools.partial(update, name) for name in batches}
    passes = {name: functools.partial(score, name) for name in rules} | {"forming": form}
    return turns.alternate(sides, pairs) | turns.alternate(passes, pairs)


def main() -> None:
    """Measures and prints."""
    import numpy as np

    from experiments.bench.report import paired
    from experiments.bench.workload import SMALL, Workload

    workload = SMALL if _SMALL.value else Workload()
    seconds = measure(workload, pairs=_PAIRS.value)
    print(workload)
    for one, other in (("tokens", "responses"), ("collision", "without")):
        ratio = paired(seconds[one], seconds[other])
        print(
            f"{one} / {other} over {_PAIRS.value} pairs: {ratio['geometric_mean']:.4f}, 95 % "
            f"interval {ratio['ci95_low']:.4f} … {ratio['ci95_high']:.4f}"
        )
    update = np.median(seconds["responses"])
    print(f"one update {update:.3f} s; added to it, medians of differences:")
    for one, other in (("tokens", "responses"), ("collision", "without"), ("forming", None)):
        of_other = np.array(seconds[other]) if other else 0.0
        added = np.median(np.array(seconds[one]) - of_other)
        print(f"  {one:10} {added:+.4f} s, {100 * added / update:+.2f} %")


if __name__ == "__main__":
    sys.exit(command.call(main))
