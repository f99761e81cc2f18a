"""Length pressure against exact values, where every response can be listed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.length import enumeration, pressure

NAMES = ("grpo", "gspo", "luspo", "dapo", "dr_grpo", "opo", "cispo", "sapo", "vl_norm")
CHOSEN = tuple((name, objectives.preset(name, max_response_length=5)) for name in NAMES)
EDGES = (1, 3)
NUM_BATCHES = 10_000
score = enumeration.table_logprobs


def _world(num_prompts=1, max_length=5, seed=0):
    """A world, a random policy in it, and random verdicts that longer answers get more often."""
    here = enumeration.world(max_length=max_length, num_prompts=num_prompts)
    rng = np.random.default_rng(seed)
    logits_SV = jnp.asarray(rng.normal(size=(here.num_states, here.vocab_size)))
    chance_B = 0.15 + 0.7 * here.lengths_B / max_length
    rewards_B = jnp.asarray((rng.random(len(chance_B)) < chance_B).astype(float))
    return here, logits_SV, rewards_B


def test_every_response_is_listed_once_and_probabilities_add_up(x64):
    here, logits_SV, _ = _world(num_prompts=2)
    assert here.num_responses == 63
    said = {
        (prompt, *np.asarray(tokens)[np.asarray(mask)])
        for prompt, (tokens, mask) in enumerate(
            zip(here.rows.tokens_BT, here.rows.mask_BT, strict=True)
        )
    }
    assert len(said) == 126
    p_B = enumeration.probabilities(score, logits_SV, here)
    np.testing.assert_allclose(p_B.reshape(2, -1).sum(axis=1), 1, rtol=1e-12)


def test_a_stop_ends_a_response_and_nothing_else_does():
    here = enumeration.world()
    for tokens, mask in zip(here.rows.tokens_BT, here.rows.mask_BT, strict=True):
        said = tokens[mask]
        assert (said[:-1] != enumeration.STOP).all()
        assert said[-1] == enumeration.STOP or len(said) == 5


@pytest.mark.parametrize("wrong", [{"vocab_size": 1}, {"max_length": 0}, {"num_prompts": 0}])
def test_a_world_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        enumeration.world(**wrong)


def test_half_batches_cover_everything_that_can_be_drawn(x64):
    here, logits_SV, _ = _world(num_prompts=2, max_length=2)
    p_B = enumeration.probabilities(score, logits_SV, here)
    index_CB, weight_C = enumeration.half_batches(p_B, here, 2)
    np.testing.assert_allclose(weight_C.sum(), 1, rtol=1e-12)
    # The mean of any function of one response is its mean under the policy.
    value_B = np.random.default_rng(1).normal(size=len(p_B))
    np.testing.assert_allclose(
        weight_C @ value_B[index_CB].mean(axis=1),
        enumeration.mean(score, logits_SV, here, value_B),
        rtol=1e-12,
    )


def _whole_gradient(objective, here, rewards_B, logits_SV):
    """Expected raw gradient by brute force: autodiff of each half-batch's whole loss, every
    ordered pair of responses, no adjoint and no bags."""
    p_B = np.asarray(enumeration.probabilities(score, logits_SV, here))
    pairs = np.stack(np.meshgrid(*[np.arange(len(p_B))] * 2, indexing="ij"), -1).reshape(-1, 2)
    ids_B = jnp.zeros(2, jnp.int32)

    def loss(params, index_B):
        rows = jax.tree.map(lambda x: jnp.asarray(x)[index_B], here.rows)
        lengths_B = rows.mask_BT.sum(axis=1)
        logprobs_BT = score(params, rows)
        batch = objectives.PolicyBatch(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=jax.lax.stop_gradient(logprobs_BT),
            advantages_B=objectives.advantages(objective, rewards_B[index_B], ids_B, lengths_B),
            response_mask_BT=rows.mask_BT,
            length_scale_B=objectives.length_scales(objective, lengths_B, ids_B),
        )
        return objectives.loss(objective, batch, objectives.denominators(objective, rows.mask_BT))[
            0
        ]

    grads = jax.lax.map(functools.partial(jax.grad(loss), logits_SV), pairs, batch_size=512)
    return jnp.tensordot(p_B[pairs].prod(axis=1), grads, 1)


@pytest.mark.parametrize("name", ["grpo", "gspo", "luspo", "dapo"])
def test_exact_pressure_is_the_derivative_along_the_expected_gradient(x64, name):
    here, logits_SV, rewards_B = _world(max_length=3)
    objective = dict(CHOSEN)[name]
    exact = enumeration.expected_pressure(
        score, logits_SV, here, rewards_B, objectives=[(name, objective)], bin_edges=EDGES
    )[name]
    gradient = _whole_gradient(objective, here, rewards_B, logits_SV)
    np.testing.assert_allclose(
        enumeration.expected_gradient(score, logits_SV, here, rewards_B, objective),
        gradient,
        rtol=1e-9,
        atol=1e-12,
    )

    def moved(eta, values_B):
        return enumeration.mean(score, logits_SV - eta * gradient, here, values_B)

    for value, of in ((exact.length, here.lengths_B), (exact.reward, rewards_B)):
        # By a central difference, so that not even the gradient of the mean is shared.
        slope = (moved(1e-4, of) - moved(-1e-4, of)) / 2e-4
        np.testing.assert_allclose(value, slope, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(exact.length_pos + exact.length_neg, exact.length, atol=1e-12)
    np.testing.assert_allclose(exact.length_bins.sum(), exact.length, atol=1e-12)


def _estimates(here, logits_SV, rewards_B, *, crossed=True):
    """Pressure of NUM_BATCHES sampled batches."""
    p_B = enumeration.probabilities(score, logits_SV, here)

    def one(key):
        half_a, half_b = enumeration.draw(key, p_B, here, rewards_B, 2)
        if not crossed:
            half_b = half_a
        return pressure.cross_fitted(
            score, logits_SV, half_a, half_b, objectives=CHOSEN, bin_edges=EDGES
        )

    keys = jax.random.split(jax.random.key(7), NUM_BATCHES)
    return jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(keys)


def _z(estimates, exact):
    """Leaf by leaf: (mean − exact) / standard error."""

    def score_of(sampled, value):
        spread = sampled.std(axis=0, ddof=1) / np.sqrt(len(sampled))
        # A part that is always 0 has no spread and must be exact.
        return np.where(spread > 0, (sampled.mean(axis=0) - value) / np.maximum(spread, 1e-300),
                        np.where(np.isclose(sampled.mean(axis=0), value), 0, np.inf))  # fmt: skip

    return jax.tree.map(lambda a, b: score_of(np.asarray(a), np.asarray(b)), estimates, exact)


@pytest.mark.parametrize(
    ("num_prompts", "max_length"), [(1, 5), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_the_estimator_is_unbiased(x64, num_prompts, max_length):
    """z-tests at 10⁴ batches of every objective, split and mean; two prompts share denominators."""
    here, logits_SV, rewards_B = _world(num_prompts, max_length, seed=3)
    exact = enumeration.expected_pressure(
        score, logits_SV, here, rewards_B, objectives=CHOSEN, bin_edges=EDGES
    )
    estimates = _estimates(here, logits_SV, rewards_B)
    z = _z(estimates, exact)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(z)])
    assert len(flat) == len(NAMES) * (5 + 2 * 3)
    # Two-sided 5 % over all of them together (Šidák): |z| < 3.5 for about 100 tests.
    assert np.abs(flat).max() < 3.5
    # Not all for want of precision: the pressures themselves stand out from 0.
    away = _z(estimates, jax.tree.map(jnp.zeros_like, exact))
    assert abs(away["luspo"].length) > 10


def test_without_cross_fitting_it_is_inflated(x64):
    """The same test finds the bias of one set of samples used for both sides."""
    here, logits_SV, rewards_B = _world(seed=3)
    exact = enumeration.expected_pressure(
        score, logits_SV, here, rewards_B, objectives=CHOSEN, bin_edges=EDGES
    )
    z = _z(_estimates(here, logits_SV, rewards_B, crossed=False), exact)
    assert min(abs(z[name].length) for name in NAMES) > 10


@pytest.mark.slow
def test_larger_halves(x64):
    """Three a half: the correction n/(n−1) of the weights and of the advantages both change."""
    here, logits_SV, rewards_B = _world(max_length=3, seed=5)
    exact = enumeration.expected_pressure(
        score, logits_SV, here, rewards_B, objectives=CHOSEN, half_size=3, bin_edges=EDGES
    )
    p_B = enumeration.probabilities(score, logits_SV, here)

    def one(key):
        halves = enumeration.draw(key, p_B, here, rewards_B, 3)
        return pressure.cross_fitted(score, logits_SV, *halves, objectives=CHOSEN, bin_edges=EDGES)

    keys = jax.random.split(jax.random.key(1), NUM_BATCHES)
    z = _z(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(keys), exact)
    assert max(np.abs(x).max() for x in jax.tree.leaves(z)) < 3.5


# One of each kind of control: an objective, a shaping, a baseline of tokens, a reward of the group.
CONTROLS = (
    *((name, objectives.preset(name)) for name in ("lambda_grpo", "soft_sequence", "qglas", "otb")),
    ("luspo+intern-s2", objectives.preset("luspo", advantage_shaping="intern-s2")),
    ("luspo+kimi", objectives.preset("luspo"), "kimi"),
)


def _kimi_of_triples(lengths_B, rewards_B):
    """Kimi k1.5's reward of the responses of every triple [B, B, B, 3], beside their own."""
    triples = np.stack(np.meshgrid(*[np.arange(len(lengths_B))] * 3, indexing="ij"), axis=-1)
    length, right = lengths_B[triples], rewards_B[triples]
    span = np.ptp(length, axis=-1, keepdims=True)
    low = length.min(axis=-1, keepdims=True)
    value = 0.5 - (length - low) / np.maximum(span, 1)
    value = np.where(span == 0, 0, np.where(right > 0.5, value, np.minimum(0, value)))
    return jnp.asarray(right + value)


def test_pressure_of_every_kind_of_control_is_unbiased(x64):
    """Halves of three: among two there is one that is better, and nothing to shape."""
    here, logits_SV, rewards_B = _world(max_length=3, seed=3)
    table = _kimi_of_triples(here.lengths_B, np.asarray(rewards_B))
    squares_S = jnp.exp(2 * jax.nn.log_softmax(logits_SV)).sum(axis=1)
    known = enumeration.Known(
        other_rewards={"kimi": lambda index_B: table[tuple(index_B)]},
        collision_BT=squares_S[here.rows.states_BT],
    )
    plain = [(name, objectives.preset(name)) for name in ("grpo", "luspo")]
    exact = enumeration.expected_pressure(
        score, logits_SV, here, rewards_B, objectives=(*CONTROLS, *plain), half_size=3, known=known
    )
    p_B = enumeration.probabilities(score, logits_SV, here)

    def one(key):
        halves = enumeration.draw(key, p_B, here, rewards_B, 3, known)
        return pressure.cross_fitted(score, logits_SV, *halves, objectives=CONTROLS)

    keys = jax.random.split(jax.random.key(11), NUM_BATCHES)
    estimates = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(keys)
    z = _z(estimates, {name: exact[name] for name in estimates})
    assert max(np.abs(x).max() for x in jax.tree.leaves(z)) < 3.5
    # What it says: where right answers are longer, QGLAS raises some that are short among the
    # right ones and long among all, so it need not shorten; the other two do here.
    assert exact["qglas"].length > exact["grpo"].length
    assert exact["luspo+intern-s2"].length < exact["luspo"].length
    assert exact["luspo+kimi"].length < exact["luspo"].length
    assert exact["lambda_grpo"].length != pytest.approx(exact["grpo"].length)
    np.testing.assert_allclose(exact["soft_sequence"].length, exact["grpo"].length)  # at ratio 1


# A policy of one parameter: it stops with the same chance p at every token. ∂log π(y)/∂θ is then
# S = 1[stopped] − p·L with p = sigmoid(θ), so that everything about it is a covariance.


def _constant_stop(theta, rows):
    stop, go = jax.nn.log_sigmoid(theta), jax.nn.log_sigmoid(-theta) - jnp.log(2)
    logprobs_BT = jnp.where(rows.tokens_BT == enumeration.STOP, stop, go)
    return jnp.where(rows.mask_BT, logprobs_BT, 0)


def _closed_form(p, values_B, lengths_B, stopped_B, probability_B, weight_B, half_size=2):
    """dE[L]/dη of Σ_i w_i A_i ∇log π(y_i) / n with A = R − half-group mean:

    (n − 1)/n · Cov(R, w·S) · Cov(L, S).
    """

    def covariance(a_B, b_B):
        return probability_B @ (a_B * b_B) - (probability_B @ a_B) * (probability_B @ b_B)

    slope_B = stopped_B - p * lengths_B
    return (
        (half_size - 1) / half_size
        * covariance(values_B, weight_B * slope_B)
        * covariance(lengths_B, slope_B)
    )  # fmt: skip


@pytest.mark.parametrize("right_at", [(1, 5), (3, 4), (5,), (2,)])
def test_length_bias_of_gspo_and_luspo_in_closed_form(x64, right_at):
    """LUSPO's pressure is Cov(R, S)·Cov(L, S), GSPO's Cov(R, S/L)·Cov(L, S)."""
    here, theta = enumeration.world(), jnp.asarray(-0.9)
    lengths_B = here.lengths_B.astype(float)
    stopped_B = np.asarray(here.rows.tokens_BT == enumeration.STOP).astype(float)
    stopped_B = (stopped_B * np.asarray(here.rows.mask_BT)).sum(axis=1)
    rewards_B = jnp.asarray(np.isin(lengths_B, right_at).astype(float))
    probability_B = np.asarray(enumeration.probabilities(_constant_stop, theta, here))
    chosen = {name: objectives.preset(name, advantage="none") for name in ("gspo", "luspo", "grpo")}
    exact = enumeration.expected_pressure(
        _constant_stop, theta, here, rewards_B, objectives=tuple(chosen.items())
    )
    p = 1 / (1 + np.exp(0.9))
    arguments = (p, np.asarray(rewards_B), lengths_B, stopped_B, probability_B)
    gspo = _closed_form(*arguments, 1 / lengths_B)
    luspo = _closed_form(*arguments, np.ones_like(lengths_B))
    np.testing.assert_allclose(exact["gspo"].length, gspo, rtol=1e-10)
    np.testing.assert_allclose(exact["luspo"].length, luspo, rtol=1e-10)
    np.testing.assert_allclose(exact["grpo"].length, gspo, rtol=1e-10)  # equal on-policy


def test_gspo_can_shorten_where_right_answers_are_long(x64):
    """Right answers are longer than wrong ones on average; LUSPO lengthens and GSPO shortens.

    Among the shortest, which carry the most weight 1/L, right ones are shorter than wrong ones.
    """
    here, theta = enumeration.world(), jnp.asarray(-0.9)
    rewards_B = jnp.asarray(np.isin(here.lengths_B, (1, 5)).astype(float))
    p_B = np.asarray(enumeration.probabilities(_constant_stop, theta, here))
    right = np.asarray(rewards_B) > 0
    means = [p_B[rows] @ here.lengths_B[rows] / p_B[rows].sum() for rows in (right, ~right)]
    assert means[0] > means[1]
    chosen = tuple((n, objectives.preset(n, advantage="none")) for n in ("gspo", "luspo"))
    exact = enumeration.expected_pressure(_constant_stop, theta, here, rewards_B, objectives=chosen)
    assert exact["gspo"].length < 0 < exact["luspo"].length
    # Its step is not along the gradient of the mean reward, and here it even lowers it.
    assert exact["gspo"].reward < 0 < exact["luspo"].reward
