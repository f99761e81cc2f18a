"""The sampler against exact probabilities, sorted references, and its own noise law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.rollout import sampling as s

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RNG = np.random.default_rng(0)
SAMPLE = jax.jit(s.sample, static_argnames="sampling")
KEEP = jax.jit(s.keep, static_argnames=("top_k", "top_p"))
UNIFORMS = jax.jit(s.uniforms)


def _sampling(**kwargs):
    return s.Sampling(**({"max_response_length": 8, "stop_token_ids": (0,)} | kwargs))


def _draws(logits_V, count, sampling, seed=0):
    """`count` draws from one row of logits, each with the noise of its own position."""
    key = jax.random.key(seed)
    keys_B = jnp.broadcast_to(key, (count,))
    uniforms_B2 = UNIFORMS(keys_B, jnp.arange(count, dtype=jnp.int32))
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V)[None], (count, len(logits_V)))
    return jax.tree.map(np.asarray, SAMPLE(logits_BV, uniforms_B2, sampling=sampling))


def _probabilities(logits_V, temperature=1.0):
    scaled = np.asarray(logits_V, np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def _chi_square(tokens, probabilities):
    """(statistic, degrees of freedom), tokens expected fewer than 5 times pooled into one cell."""
    counts = np.bincount(tokens, minlength=len(probabilities)).astype(np.float64)
    expected = probabilities * len(tokens)
    assert not counts[expected == 0].any()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    return ((counts - expected) ** 2 / expected).sum(), len(expected) - 1


def _assert_follows(tokens, probabilities):
    statistic, freedom = _chi_square(tokens, probabilities)
    # Mean k, variance 2k: five standard deviations, and the seed is fixed.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 5, (statistic, freedom)


@pytest.mark.parametrize(
    ("vocab_size", "temperature"), [(2, 1.0), (5, 0.6), (32, 1.7), (37, 1.0), (600, 0.8)]
)
def test_draws_follow_the_softmax(vocab_size, temperature):
    logits_V = RNG.normal(0, 1.5, vocab_size).astype(np.float32)
    tokens, _ = _draws(logits_V, 40_000, _sampling(temperature=temperature))
    _assert_follows(tokens, _probabilities(logits_V, temperature))


def test_chi_square_rejects_another_temperature():
    logits_V = RNG.normal(0, 1.5, 64).astype(np.float32)
    tokens, _ = _draws(logits_V, 40_000, _sampling(temperature=1.0))
    statistic, freedom = _chi_square(tokens, _probabilities(logits_V, 1.1))
    assert statistic > freedom + 5 * np.sqrt(2 * freedom) + 5


def test_draws_follow_the_softmax_at_qwen_vocabulary():
    """Half of the mass on 64 tokens spread over the range, half a long tail."""
    V = 151_936
    logits_V = RNG.normal(0, 1.0, V).astype(np.float32)
    heads = np.linspace(0, V - 1, 64).astype(int)
    logits_V[heads] = np.log(V * np.exp(0.5) / 64)
    probabilities = _probabilities(logits_V)
    tokens = np.concatenate([_draws(logits_V, 64, _sampling(), seed)[0] for seed in range(20)])
    cells = np.where(np.isin(np.arange(V), heads), np.arange(V), V + np.arange(V) % 7)
    names, cell_of = np.unique(cells, return_inverse=True)
    _assert_follows(cell_of[tokens], np.bincount(cell_of, probabilities, len(names)))


def test_every_token_can_be_drawn_and_no_impossible_one():
    logits_V = np.zeros(37, np.float32)
    logits_V[[0, 5, 36]] = -np.inf
    tokens, _ = _draws(logits_V, 4000, _sampling())
    assert set(tokens) == set(range(37)) - {0, 5, 36}


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
@pytest.mark.parametrize("possible", [[3], [0, 36], [17, 18]])
def test_extreme_uniforms_choose_a_possible_token(u, possible):
    logits_BV = np.full((1, 37), -np.inf, np.float32)
    logits_BV[0, possible] = 0.3
    tokens, logprobs = SAMPLE(
        jnp.asarray(logits_BV), jnp.full((1, 2), u, jnp.float32), sampling=_sampling()
    )
    assert tokens[0] == (possible[0] if u == 0 else possible[-1])
    np.testing.assert_allclose(logprobs[0], -np.log(len(possible)), atol=1e-6)


def test_token_is_the_two_level_inverse_cdf_of_its_uniforms():
    V, B = 1000, 500
    Y = s.block_size(V)
    logits_BV = RNG.normal(0, 2, (B, V)).astype(np.float32)
    uniforms_B2 = RNG.uniform(size=(B, 2)).astype(np.float32)
    tokens, _ = SAMPLE(jnp.asarray(logits_BV), jnp.asarray(uniforms_B2), sampling=_sampling())
    for b in range(B):
        p = _probabilities(logits_BV[b])
        masses = np.add.reduceat(p, np.arange(0, V, Y))
        block = np.searchsorted(np.cumsum(masses), uniforms_B2[b, 0], side="right")
        within = p[block * Y : (block + 1) * Y]
        token = np.searchsorted(np.cumsum(within) / within.sum(), uniforms_B2[b, 1], side="right")
        assert tokens[b] == block * Y + token


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_logprobs_are_of_the_full_vocabulary_and_never_positive(temperature, top_p):
    logits_BV = RNG.normal(0, 4, (64, 333)).astype(np.float32) + 50
    logits_BV[:8, 7] = 300.0  # a certainty: log-prob 0, not above
    sampling = _sampling(temperature=temperature, top_p=top_p)
    uniforms_B2 = RNG.uniform(size=(64, 2)).astype(np.float32)
    tokens, logprobs = SAMPLE(jnp.asarray(logits_BV), jnp.asarray(uniforms_B2), sampling=sampling)
    for b in range(64):
        p = _probabilities(logits_BV[b], temperature or 1.0)
        np.testing.assert_allclose(logprobs[b], np.log(p[tokens[b]]), atol=2e-5)
    assert logprobs.dtype == np.float32
    assert (logprobs <= 0).all()


def test_greedy_takes_the_likeliest():
    logits_BV = RNG.normal(size=(16, 99)).astype(np.float32)
    tokens, _ = SAMPLE(
        jnp.asarray(logits_BV), jnp.zeros((16, 2)), sampling=_sampling(temperature=0)
    )
    np.testing.assert_array_equal(tokens, logits_BV.argmax(-1))


def _keep_by_sorting(logits_V, top_k, top_p):
    """As transformers' warpers: top-k first (ties with the k-th stay), then top-p, at least one."""
    scores = np.asarray(logits_V, np.float64).copy()
    if top_k:
        scores[scores < np.sort(scores)[-min(top_k, len(scores))]] = -np.inf
    if top_p < 1:
        order = np.argsort(scores, kind="stable")
        p = _probabilities(scores)[order]
        remove = np.cumsum(p) <= 1 - top_p
        remove[-1] = False
        scores[order[remove]] = -np.inf
    return np.isfinite(scores)


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(1, 1.0), (40, 1.0), (10_000, 1.0), (0, 0.95), (0, 0.3), (0, 1e-6), (5, 0.7), (40, 0.95)],
)
def test_kept_tokens_are_those_of_a_sort(top_k, top_p):
    logits_BV = RNG.normal(0, 2, (50, 257)).astype(np.float32)
    kept_BV = np.asarray(KEEP(jnp.asarray(logits_BV), top_k=top_k, top_p=top_p))
    for b in range(50):
        np.testing.assert_array_equal(kept_BV[b], _keep_by_sorting(logits_BV[b], top_k, top_p))
    assert kept_BV.any(-1).all()


def test_equally_likely_tokens():
    logits_BV = jnp.zeros((1, 10))
    assert np.asarray(KEEP(logits_BV, top_p=0.45))[0].tolist() == [True] * 5 + [False] * 5
    assert np.asarray(KEEP(logits_BV, top_k=3))[0].all()  # ties with the third stay
    logits_BV = jnp.log(jnp.asarray([[0.1, 0.3, 0.3, 0.2, 0.1]]))
    assert np.asarray(KEEP(logits_BV, top_p=0.25))[0].tolist() == [False, True] + [False] * 3
    assert np.asarray(KEEP(logits_BV, top_k=1))[0].tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("kwargs", [{"top_p": 0.6}, {"top_p": 0.8, "top_k": 20}])
def test_truncated_draws_follow_the_renormalised_softmax(kwargs):
    logits_V = RNG.normal(0, 1.5, 100).astype(np.float32)
    tokens, _ = _draws(logits_V, 20_000, _sampling(temperature=0.9, **kwargs))
    scaled = logits_V / np.float32(0.9)
    kept = _keep_by_sorting(scaled, kwargs.get("top_k", 0), kwargs.get("top_p", 1.0))
    probabilities = np.where(kept, _probabilities(scaled), 0)
    _assert_follows(tokens, probabilities / probabilities.sum())


def test_noise_depends_on_seed_step_prompt_sample_and_position_only():
    def noise(seed, step, prompt_ids, sample_ids, positions):
        steps = [step] * len(prompt_ids)
        ids = [jnp.asarray(x, jnp.int32) for x in (steps, prompt_ids, sample_ids, positions)]
        return np.asarray(s.uniforms(s.row_keys(s.seed_key(seed), *ids[:3]), ids[3]))

    base = noise(1, 2, [3], [4], [5])
    for other in [(0, 2, 3, 4, 5), (1, 3, 3, 4, 5), (1, 2, 4, 3, 5), (1, 2, 3, 4, 6)]:
        assert (noise(*other[:2], *[[x] for x in other[2:]]) != base).all()
    batch = noise(1, 2, [9, 3, 3], [0, 4, 5], [7, 5, 5])
    np.testing.assert_array_equal(batch[1:2], base)
    many = noise(0, 0, [0] * 5000, [0] * 5000, np.arange(5000))
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(np.corrcoef(many.T)[0, 1]) < 0.05
    np.testing.assert_allclose(many.mean(0), 0.5, atol=0.02)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("max_response_length", 0),
        ("stop_token_ids", (3, -1)),
    ],
)
def test_senseless_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        _sampling(**{field: value})


def test_settings_are_hashable_whatever_sequence_the_stop_set_is():
    assert hash(_sampling(stop_token_ids=[1, 2])) == hash(_sampling(stop_token_ids=(1, 2)))
