"""Supervised steps: the loss and gradient of demonstrations, however they are laid out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.learner import optimizer
from luspo_jax.learner.demonstrations import AGGREGATIONS, losses, nll_objective, update
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.learner.programs import LogprobPass, StepPrograms
from luspo_jax.learner.rows import Planner
from luspo_jax.learner.state import UpdateRule, initial_state
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from tests.models import expert_cases

MODEL = DecoderConfig(
    model_type="qwen3", vocab_size=20, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=4,
    num_kv_heads=2, head_dim=4, rope_theta=1e4, rms_norm_eps=1e-6, qkv_bias=False, qk_norm=True,
    tie_embeddings=True, max_position=64,
)  # fmt: skip
# With b1 = 0 the first moment is the gradient itself, exactly: that is what is compared.
PLAIN = optimizer.adamw(b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0)
LAYOUTS = {
    "all at once": {"rows_per_microbatch": 6},
    "three micro-batches": {"rows_per_microbatch": 2},
    "few widths": {"rows_per_microbatch": 6, "num_buckets": 1},
    "dense": {"rows_per_microbatch": 2, "pack_length": 20},
    "one dense row at a time": {"rows_per_microbatch": 1, "pack_length": 32},
}
LONGEST = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """What the learner reads of a demonstration."""

    tokens: np.ndarray
    trained: np.ndarray
    weights: np.ndarray | None = None
    images: tuple = ()


def _shown(weighted=False, vocab_size=19, seed=0):
    """Six: three of an answer after a prompt, one of two answers, one trained whole, one short."""
    rng = np.random.default_rng(seed)
    found = []
    for trained in (
        [0] * 4 + [1] * 7, [0] * 9 + [1], [0, 0] + [1] * 12, [0, 0, 1, 1, 1, 0, 0, 0, 1, 1],
        [0] + [1] * 8, [0, 1],
    ):  # fmt: skip
        trained = np.array(trained, bool)
        tokens = rng.integers(1, vocab_size, len(trained)).astype(np.int32)
        weights = rng.uniform(0.5, 6, len(trained)).astype(np.float32) if weighted else None
        found.append(Shown(tokens, trained, weights))
    return found


def _rule(aggregation="token-mean", dtype="float64", model=MODEL, layout=None, **fields):
    how = Forward(model, dtype, layout=layout)
    logprobs = LogprobRule(how, head_chunk_tokens=16)
    return UpdateRule(logprobs, nll_objective(aggregation), PLAIN, 0.0, **fields)


def _planner(model=MODEL, *, num_buckets=4, rows_per_microbatch=6, **fields):
    return Planner(model, LONGEST, num_buckets, rows_per_microbatch, **fields)


def _stepped(params, rule, planner, shown):
    """(gradients, metrics) of one step."""
    state = initial_state(params, rule)
    state, metrics = update(StepPrograms(rule), planner, state, shown, rate=1.0)
    return jax.device_get(state.opt_state[0].mu), metrics


@jax.jit
def _token_losses(params, tokens_NT):
    """−log p [N, T − 1] of each token after the first: all logits, log_softmax.

    Rows are padded at their ends, which nothing before them sees.
    """
    ones_NT = jnp.ones_like(tokens_NT)
    places_NT = jnp.cumsum(ones_NT, axis=1) - 1
    hidden, _ = decoder.forward(
        params, tokens_NT, places_NT, ones_NT, how=Forward(MODEL, "float64")
    )
    logprobs = jax.nn.log_softmax(hidden[:, :-1] @ decoder.head_kernel(params).T)
    return -jnp.take_along_axis(logprobs, tokens_NT[:, 1:, None], axis=2)[..., 0]


def _padded(rows):
    """[N, T]: values of unequal length, zeros after them."""
    return np.array([np.pad(row, (0, LONGEST - len(row))) for row in rows])


def _plain_loss(params, shown, aggregation):
    """The objective by its definition."""
    trained_NT = _padded([one.trained.astype(float) for one in shown])[:, 1:]
    weights_NT = trained_NT
    if shown[0].weights is not None:
        weights_NT = trained_NT * _padded([one.weights for one in shown])[:, 1:]
        weights_NT = weights_NT / (weights_NT.sum() / trained_NT.sum())
    sums_N = (_token_losses(params, _padded([one.tokens for one in shown])) * weights_NT).sum(1)
    if aggregation == "token-mean":
        return sums_N.sum() / trained_NT.sum()
    if aggregation == "seq-mean-token-mean":
        sums_N = sums_N / trained_NT.sum(1)
    return sums_N.mean()


def _assert_near(got, expected, tolerance):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        scale = max(np.abs(b).max(), 1e-12)
        assert np.abs(a - b).max() <= tolerance * scale, jax.tree_util.keystr(path)


@pytest.fixture
def params64(x64):
    drawn = decoder.init_params(jax.random.key(0), MODEL)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), drawn)


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_and_gradient_are_those_of_the_definition(params64, aggregation, weighted):
    shown = _shown(weighted)
    expected, gradient = jax.value_and_grad(_plain_loss)(params64, shown, aggregation)
    grads, metrics = _stepped(params64, _rule(aggregation), _planner(), shown)
    assert metrics["sft/loss"] == pytest.approx(float(expected), rel=1e-6)
    _assert_near(grads, jax.device_get(gradient), 1e-6 if weighted else 1e-10)
    assert metrics["sft/trained_tokens"] == sum(one.trained.sum() for one in shown)
    assert metrics["sft/tokens"] == sum(len(one.tokens) for one in shown)


def test_a_token_mean_is_no_sequence_mean(params64):
    found = {
        name: _stepped(params64, _rule(name), _planner(), _shown())[1]["sft/loss"]
        for name in AGGREGATIONS
    }
    assert len({round(value, 4) for value in found.values()}) == 3


def _rest_slow(values, count):
    """Parameters, all but the first `count` of them slow: each compiles a step of its own."""
    return [
        pytest.param(value, marks=[pytest.mark.slow] * (place >= count))
        for place, value in enumerate(values)
    ]


@pytest.mark.parametrize("layout", _rest_slow(["dense", *sorted({*LAYOUTS} - {"dense"})], 1))
@pytest.mark.parametrize("aggregation", AGGREGATIONS[:2])
def test_neither_packing_nor_micro_batches_change_a_step(params64, aggregation, layout):
    shown = _shown(weighted=True)
    grads, metrics = _stepped(params64, _rule(aggregation), _planner(), shown)
    got, other = _stepped(params64, _rule(aggregation), _planner(**LAYOUTS[layout]), shown)
    assert other["sft/loss"] == pytest.approx(metrics["sft/loss"], rel=1e-12)
    _assert_near(got, grads, 1e-10)


def test_tokens_that_are_not_trained_and_the_order_change_nothing(params64):
    shown, rule = _shown(), _rule()
    grads, metrics = _stepped(params64, rule, _planner(), shown)
    assert np.abs(grads["embed"]["embedding"] if "embed" in grads else 1).max() > 0
    got, other = _stepped(params64, rule, _planner(), shown[::-1])
    assert other["sft/loss"] == pytest.approx(metrics["sft/loss"], rel=1e-12)
    _assert_near(got, grads, 1e-10)
    # The last token is read by nothing: only as a target does it count.
    last = dataclasses.replace(shown[3], trained=np.arange(10) == 2)
    changed = dataclasses.replace(last, tokens=np.append(last.tokens[:-1], 1).astype(np.int32))
    pair = [
        _stepped(params64, rule, _planner(), [*shown[:3], x, *shown[4:]]) for x in (last, changed)
    ]
    assert pair[0][1]["sft/loss"] == pair[1][1]["sft/loss"]


@pytest.mark.parametrize("layout", ["three micro-batches", "dense"])
@pytest.mark.parametrize("count", [1, 4])
def test_held_out_losses_are_sums_over_trained_tokens(params64, layout, count):
    shown, planner = _shown()[:count], _planner(**LAYOUTS[layout])
    rule = _rule()
    one = LogprobPass("params", rule.logprobs)
    sums_N, counts_N = losses(one, planner, initial_state(params64, rule), shown, at_once=6)
    tokens_NT, trained_NT = _padded([d.tokens for d in shown]), _padded([d.trained for d in shown])
    expected_N = (_token_losses(params64, tokens_NT) * trained_NT[:, 1:]).sum(1)
    np.testing.assert_allclose(sums_N, expected_N, rtol=1e-6)
    np.testing.assert_array_equal(counts_N, [d.trained.sum() for d in shown])


@pytest.mark.parametrize(
    "sizes", _rest_slow([{"fsdp": 2}, {"data": 2}, {"context": 2}, {"tensor": 2}], 1)
)
def test_two_devices_take_the_step_of_one(sizes):
    params = decoder.init_params(jax.random.key(0), MODEL)
    shown = _shown(weighted=True)
    grads, metrics = _stepped(params, _rule(dtype="float32"), _planner(), shown)
    layout = sharding.layout("train", sizes, jax.devices()[:2])
    rule, planner = _rule(dtype="float32", layout=layout), _planner(layout=layout)
    got, other = _stepped(params, rule, planner, shown)
    assert other["sft/loss"] == pytest.approx(metrics["sft/loss"], rel=1e-5)
    _assert_near(got, grads, 1e-5)
    one = LogprobPass("params", rule.logprobs)
    sums_N, _ = losses(one, planner, initial_state(params, rule), shown, at_once=6)
    alone = LogprobPass("params", _rule(dtype="float32").logprobs)
    state = initial_state(params, _rule(dtype="float32"))
    expected_N, _ = losses(alone, _planner(), state, shown, at_once=6)
    np.testing.assert_allclose(sums_N, expected_N, rtol=1e-5)


@pytest.mark.slow
def test_experts_are_balanced_over_the_whole_step():
    """The balancing term is the Switch loss of all tokens, prompts included, in any layout."""
    model = expert_cases.config(num_layers=2)
    params, shown = expert_cases.params(model, 0), _shown(vocab_size=model.vocab_size)
    rule = _rule(dtype="float32", model=model, router_aux_coef=0.1)
    found = [
        _stepped(params, rule, _planner(model, **LAYOUTS[name]), shown)
        for name in ("all at once", "three micro-batches", "dense")
    ]
    for grads, metrics in found[1:]:
        assert metrics["sft/loss"] == pytest.approx(found[0][1]["sft/loss"], rel=1e-5)
        assert metrics["router/aux_loss"] == pytest.approx(found[0][1]["router/aux_loss"], rel=1e-5)
        _assert_near(grads, found[0][0], 1e-4)
    without, _ = _stepped(params, _rule(dtype="float32", model=model), _planner(model), shown)
    routers = [
        (a, b)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(without), jax.tree.leaves(found[0][0]), strict=True
        )
        if "router" in jax.tree_util.keystr(path) or "gate" in jax.tree_util.keystr(path)
    ]
    assert routers
    assert any(np.abs(a - b).max() > 1e-6 for a, b in routers)
