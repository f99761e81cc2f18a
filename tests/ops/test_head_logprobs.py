"""The chunked head against log_softmax, in float64, and the arrays it must not make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops.head_logprobs import head_logprobs

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, T, D, V = 3, 13, 8, 17


def _inputs(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    hidden_BTD = rng.normal(size=(B, T, D)).astype(dtype)
    kernel_VD = rng.normal(size=(V, D)).astype(dtype)
    targets_BT = rng.integers(0, V, (B, T)).astype(np.int32)
    mask_BT = rng.random((B, T)) > 0.4
    mask_BT[:, :4] = False  # a whole chunk in which nothing is scored
    return hidden_BTD, kernel_VD, targets_BT, mask_BT


def _plain(hidden_BTD, kernel_VD, targets_BT, mask_BT, temperature):
    logits = jnp.einsum("btd,vd->btv", hidden_BTD, kernel_VD) / jnp.asarray(
        temperature, hidden_BTD.dtype
    )
    logp = jax.nn.log_softmax(logits, -1)
    target = jnp.take_along_axis(logp, targets_BT[..., None], -1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
    return jnp.where(mask_BT, target, 0.0), jnp.where(mask_BT, entropy, 0.0)


@pytest.mark.parametrize("chunk_length", [1, 4, 5, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_match_log_softmax(chunk_length, temperature):
    hidden, kernel, targets, mask = _inputs(dtype=np.float32)
    weights = np.random.default_rng(1).normal(size=(2, B, T)).astype(np.float32)

    def total(function):
        def scalar(hidden, kernel):
            logprobs, entropy = function(hidden, kernel)
            value = jnp.sum(logprobs * weights[0]) + jnp.sum(entropy * weights[1])
            return value, (logprobs, entropy)

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(hidden, kernel)

    (_, ours), our_grads = total(
        lambda h, k: head_logprobs(
            h, k, targets, mask, temperature=temperature, chunk_tokens=B * chunk_length
        )
    )
    (_, plain), plain_grads = total(lambda h, k: _plain(h, k, targets, mask, temperature))
    for got, expected in zip((*ours, *our_grads), (*plain, *plain_grads), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=3e-6 * scale, rtol=0)


@pytest.mark.parametrize("chunk_length", [1, 5, 100])
def test_collision_is_the_sum_of_squares_and_changes_nothing_else(chunk_length):
    hidden, kernel, targets, mask = _inputs(dtype=np.float32)
    how = {"temperature": 0.7, "chunk_tokens": B * chunk_length}
    *others, collision = head_logprobs(hidden, kernel, targets, mask, collision=True, **how)
    for got, expected in zip(
        others, head_logprobs(hidden, kernel, targets, mask, **how), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    logits = np.einsum("btd,vd->btv", hidden, kernel, dtype=np.float64) / 0.7
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(collision, np.where(mask, (p**2).sum(-1), 0), atol=3e-6)


def test_never_positive_and_zero_where_masked():
    hidden, kernel, targets, mask = _inputs(dtype=np.float32)
    # A certain choice: log p rounds to 0 and must not become positive.
    logprobs, entropy = head_logprobs(
        hidden * 100, kernel, targets, mask, temperature=1.0, chunk_tokens=4 * B
    )
    assert np.all(np.asarray(logprobs) <= 0)
    assert np.all(np.asarray(entropy) >= 0)
    assert np.all(np.asarray(logprobs)[~mask] == 0)


def test_masked_hidden_states_may_be_anything():
    hidden, kernel, targets, mask = _inputs(dtype=np.float32)
    poisoned = np.where(mask[..., None], hidden, np.nan).astype(np.float32)

    def score(h):
        return head_logprobs(h, kernel, targets, mask, temperature=1.0, chunk_tokens=4 * B)[0]

    np.testing.assert_array_equal(score(poisoned), score(hidden))


def test_no_array_of_all_logits_is_made():
    """Peak temporary bytes follow the chunk, not T × V."""
    b, t, d, v = 2, 512, 16, 4096
    shapes = (
        jax.ShapeDtypeStruct((b, t, d), jnp.float32),
        jax.ShapeDtypeStruct((v, d), jnp.float32),
        jax.ShapeDtypeStruct((b, t), jnp.int32),
        jax.ShapeDtypeStruct((b, t), jnp.bool_),
    )

    def loss(hidden, kernel, targets, mask, chunk):
        return jnp.sum(
            head_logprobs(hidden, kernel, targets, mask, temperature=1.0, chunk_tokens=b * chunk)[0]
        )

    def temporary_bytes(chunk):
        grad = jax.jit(jax.grad(lambda *args: loss(*args, chunk), argnums=(0, 1)))
        return grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    whole = b * t * v * 4
    assert temporary_bytes(8) < whole / 4
    assert temporary_bytes(8) < temporary_bytes(128)


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("chunk_tokens", 0)])
def test_bad_arguments_are_named(field, value):
    arguments = {"temperature": 1.0, "chunk_tokens": 4, field: value}
    with pytest.raises(ValueError, match=field):
        head_logprobs(*_inputs(dtype=np.float32), **arguments)
