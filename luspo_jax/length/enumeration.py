"""A policy small enough to enumerate all its responses, so that length pressure is exact.

A tabular policy holds one row of logits for each prefix of each prompt. With V tokens (token 0 is
the stop token) and at most T tokens per response there are Σ_{t<T} (V−1)^t prefixes, as many
responses that stop, and (V−1)^T truncated ones: 63 at V = 3, T = 5. Means are sums over responses,
gradients are exact, and an objective's expected gradient is a sum over all possible half-batches.
Only `draw` samples.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.length.pressure import (
    Candidate,
    Half,
    Logprobs,
    Pressure,
    coefficients,
    of_half,
)
from luspo_jax.objectives import Objective

STOP = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Responses in the form a tabular policy reads.

    Attributes:
      states_BT: row of the logit table at each token, for the prompt and prefix before it.
      tokens_BT: the tokens; STOP ends a response.
      mask_BT: bool, true on response tokens.
    """

    states_BT: jax.Array
    tokens_BT: jax.Array
    mask_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class World:
    """All responses to each of a few prompts, prompt by prompt.

    Attributes:
      rows: every response to prompt 0, then to prompt 1, …
      num_prompts: number of prompts.
      num_states: rows of the table of logits.
      vocab_size: number of tokens, STOP included.
    """

    rows: Rows
    num_prompts: int
    num_states: int
    vocab_size: int

    @property
    def num_responses(self) -> int:
        """Counts the responses to one prompt."""
        return self.rows.tokens_BT.shape[0] // self.num_prompts

    @property
    def lengths_B(self) -> np.ndarray:
        """Returns the tokens of each response, STOP included."""
        return np.asarray(self.rows.mask_BT).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Known:
    """What objectives read of responses besides lengths and rewards.

    Attributes:
      other_rewards: name → function of the rows of a half-batch [prompts · half_size], group by
        group, that gives their rewards: those of a group depend on who is in it.
      collision_BT: Σ_v π_v² at each token of every response; None if nothing reads it.
    """

    other_rewards: Mapping[str, Callable[[jax.Array], jax.Array]] = dataclasses.field(
        default_factory=dict
    )
    collision_BT: jax.Array | None = None


NOTHING = Known()


def world(*, vocab_size: int = 3, max_length: int = 5, num_prompts: int = 1) -> World:
    """Enumerates every response of up to `max_length` tokens to each prompt.

    Raises:
      ValueError: fewer than two tokens, an empty response, or no prompt.
    """
    if vocab_size < 2 or max_length < 1 or num_prompts < 1:
        raise ValueError(
            f"vocab_size={vocab_size}, max_length={max_length}, num_prompts={num_prompts}: a world "
            "needs at least STOP and one more token, one token a response, and one prompt"
        )
    inner = range(1, vocab_size)
    prefixes = [p for t in range(max_length) for p in itertools.product(inner, repeat=t)]
    state = {prefix: k for k, prefix in enumerate(prefixes)}
    said = [(*p, STOP) for p in prefixes] + list(itertools.product(inner, repeat=max_length))
    shape = (num_prompts, len(said), max_length)
    states, tokens, mask = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape, bool)
    for y, response in enumerate(said):
        for t, token in enumerate(response):
            states[:, y, t] = state[response[:t]] + np.arange(num_prompts) * len(prefixes)
            tokens[:, y, t], mask[:, y, t] = token, True
    rows = Rows(*(x.reshape(-1, max_length) for x in (states, tokens, mask)))
    return World(rows, num_prompts, num_prompts * len(prefixes), vocab_size)


def table_logprobs(logits_SV: jax.Array, rows: Rows) -> jax.Array:
    """Returns log π of each response token under a logit table [states, V]; 0 elsewhere."""
    logprobs_BT = jax.nn.log_softmax(logits_SV)[rows.states_BT, rows.tokens_BT]
    return jnp.where(rows.mask_BT, logprobs_BT, 0)


def probabilities(compute: Logprobs, params, here: World) -> jax.Array:
    """π(y | prompt) of every response; each prompt's add up to 1."""
    return jnp.exp(compute(params, here.rows).sum(axis=1))


def mean(compute: Logprobs, params, here: World, values_B: jax.Array) -> jax.Array:
    """E[x] of a value of each response, averaged over prompts."""
    return jnp.sum(probabilities(compute, params, here) * values_B) / here.num_prompts


def expected_pressure(
    compute: Logprobs,
    params,
    here: World,
    rewards_B: jax.Array,
    *,
    objectives: Sequence[tuple],
    half_size: int = 2,
    bin_edges: tuple[int, ...] = (),
    known: Known = NOTHING,
) -> dict[str, Pressure]:
    """Returns exact dE[L]/dη and dE[R]/dη along the expected gradient of each objective.

        dE[x]/dη = −⟨E[∇loss], ∇E[x]⟩, all ratios 1.

    This is the value that `pressure.cross_fitted` estimates, with advantages computed within
    half-groups of `half_size`; `objectives` are as there. `mass` and `gradient_share` are their
    means over half-batches.
    """
    length_BT, reward_BT = (
        _along(compute, params, here, jax.grad(lambda p, x=x: mean(compute, p, here, x))(params))
        for x in (jnp.asarray(here.lengths_B, jnp.result_type(float)), rewards_B)
    )
    index_CB, weight_C = half_batches(probabilities(compute, params, here), here, half_size)
    logprobs_BT = compute(params, here.rows)

    def of_one(objective, reward, index_B):
        half, at_BT = _half(here, rewards_B, index_B, half_size, known), logprobs_BT[index_B]
        slope_BT, advantages_BU = coefficients(objective, half, at_BT, at_BT, reward=reward)
        deltas = length_BT[index_B], reward_BT[index_B]
        return of_half(half, slope_BT, advantages_BU, *deltas, bin_edges)

    found = {}
    for candidate in objectives:
        name, *what = Candidate(*candidate)
        each = jax.lax.map(functools.partial(of_one, *what), jnp.asarray(index_CB), batch_size=256)
        found[name] = jax.tree.map(lambda x: jnp.tensordot(weight_C, x, 1), each)
    return found


def expected_gradient(
    compute: Logprobs,
    params,
    here: World,
    rewards_B: jax.Array,
    objective: Objective,
    *,
    half_size: int = 2,
):
    """Returns E[∇loss] over half-batches with all ratios 1: the exact descent direction.

    Shaped like `params`. Advantages are computed within half-groups of `half_size`; only the policy
    term counts.
    """
    index_CB, weight_C = half_batches(probabilities(compute, params, here), here, half_size)
    logprobs_BT, pull = jax.vjp(lambda p: compute(p, here.rows), params)

    def of_one(index_B):
        at_BT = logprobs_BT[index_B]
        half = _half(here, rewards_B, index_B, half_size, NOTHING)
        return coefficients(objective, half, at_BT, at_BT)[0]

    slope_CBT = jax.lax.map(of_one, jnp.asarray(index_CB), batch_size=256)
    total_BT = jnp.zeros_like(logprobs_BT).at[index_CB].add(weight_C[:, None, None] * slope_CBT)
    return pull(total_BT)[0]


def half_batches(
    probabilities_B: jax.Array, here: World, half_size: int
) -> tuple[np.ndarray, jax.Array]:
    """Returns the rows of each distinct half-batch [C, prompts · half_size] and its probability."""
    bags = list(
        itertools.combinations_with_replacement(range(here.num_responses), half_size)
    )  # all orders of one multiset share a gradient
    orders = [
        math.factorial(half_size) / math.prod(math.factorial(bag.count(y)) for y in {*bag})
        for bag in bags
    ]
    chosen = np.array(list(itertools.product(range(len(bags)), repeat=here.num_prompts)))
    offsets = np.arange(here.num_prompts)[:, None] * here.num_responses
    index_CPn = np.array(bags)[chosen] + offsets
    index_CB = index_CPn.reshape(len(chosen), -1)
    ways_C = np.array(orders)[chosen].prod(axis=1)
    return index_CB, jnp.asarray(ways_C) * jnp.prod(probabilities_B[index_CB], axis=1)


def draw(
    key: jax.Array,
    probabilities_B: jax.Array,
    here: World,
    rewards_B: jax.Array,
    half_size: int,
    known: Known = NOTHING,
) -> tuple[Half, Half]:
    """Samples both halves of one batch from the policy."""
    by_prompt = jnp.log(probabilities_B).reshape(here.num_prompts, -1)
    drawn = jax.random.categorical(key, by_prompt, shape=(2, half_size, here.num_prompts))
    index = drawn + (jnp.arange(here.num_prompts) * here.num_responses)[None, None]
    sides = (index[side].T.reshape(-1) for side in range(2))
    return tuple(_half(here, rewards_B, side, half_size, known) for side in sides)


def _half(here, rewards_B, index_B, half_size, known):
    rows = jax.tree.map(lambda x: jnp.asarray(x)[index_B], here.rows)
    return Half(
        rows,
        rows.mask_BT,
        rewards_B[index_B],
        jnp.repeat(jnp.arange(here.num_prompts), half_size),
        other_rewards={name: f(index_B) for name, f in known.other_rewards.items()},
        collision_BT=None if known.collision_BT is None else known.collision_BT[index_B],
    )


def _along(compute, params, here, direction):
    return jax.jvp(lambda p: compute(p, here.rows), (params,), (direction,))[1]
