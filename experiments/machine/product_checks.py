"""Checks of experts' products, the head, drawing, random numbers, and matrices of few bits."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.machine import plain
from experiments.machine.attention_checks import TYPES, choices, tolerance, without_a_kernel
from experiments.machine.records import Agreed, Check
from experiments.machine.running import Known
from luspo_jax.models import nf4, quantised
from luspo_jax.ops import grouped_matmul
from luspo_jax.ops.head_logprobs import head_logprobs
from luspo_jax.ops.normal_slice import normal_slice
from luspo_jax.rollout.sampling import Sampling, row_keys, sample, seed_key, uniforms

_GROUPS = (3, 0, 1, 2)  # rows of each group, in multiples of what the kernel asks for


def checks(device: jax.Device) -> Iterator[Check]:
    """Yields the checks of every product, and of what draws."""
    for name in grouped_matmul.IMPLEMENTATIONS:
        title = f"products of experts: {name}"
        resolve = functools.partial(grouped_matmul.resolve, name, platform=device.platform)
        kinds, reason = choices(lambda _, resolve=resolve: resolve())
        if not kinds:
            yield without_a_kernel("kernels", title, reason)
        for kind in kinds:
            run = functools.partial(grouped, name, kind)
            yield Check("kernels", f"{title}, {kind}", 4.0, run)
        if kinds:
            run = functools.partial(grouped_int8, name)
            yield Check("kernels", f"{title}, int8 kernels", 3.0, run)
    for kind in TYPES:
        run = functools.partial(head, kind)
        yield Check("kernels", f"log-probs and entropies of the head, {kind}", 4.0, run)
    for title, asked in (("", {}), (", top-k and top-p", {"top_k": 50, "top_p": 0.9})):
        run = functools.partial(drawing, asked)
        yield Check("kernels", f"drawing tokens by inverse CDF{title}", 4.0, run)
    yield Check("kernels", "noise of a token, bit for bit", 2.0, noise)
    yield Check("kernels", "random weights, drawn in parts", 3.0, slices)
    yield Check("kernels", "int8 matrices: rounding", 2.0, int8_rounding)
    for kind in TYPES:
        run = functools.partial(int8_product, kind)
        yield Check("kernels", f"int8 matrices: products, {kind}", 2.0, run)
    yield Check("kernels", "nf4 matrices: rounding", 3.0, nf4_rounding)


def _random(rng, shape, dtype):
    return jnp.asarray(rng.normal(size=shape), dtype)


def _wide(array):
    return np.asarray(jnp.asarray(array).astype(jnp.float32), np.float64)


# ---------------------------------------------------------------- products


def _groups(name, known):
    """(sizes of the groups, D, F) that a kernel takes."""
    share, D, F = (8, 16, 24) if known.tiny else (64, 128, 192)
    multiple = grouped_matmul.row_multiple(name, share * sum(_GROUPS), len(_GROUPS))
    rows = -(-share // multiple) * multiple
    return np.array(_GROUPS, np.int32) * rows, D, F


def grouped(name: str, dtype: str, known: Known) -> list[Agreed]:
    """Checks rows of each group times its kernel, with both gradients."""
    sizes_E, D, F = _groups(name, known)
    rng = np.random.default_rng(3)
    x_MD, grad_MF = (_random(rng, (sizes_E.sum(), n), dtype) for n in (D, F))
    kernel_EDF = _random(rng, (len(sizes_E), D, F), dtype)

    @jax.jit
    def both(x, kernel, grad):
        function = functools.partial(
            grouped_matmul.grouped_matmul, group_sizes_E=jnp.asarray(sizes_E), implementation=name
        )
        out, pull = jax.vjp(function, x, kernel)
        return out, *pull(grad)

    def exact(x, kernel):
        return (plain.grouped(x, kernel, sizes_E),)

    out, *gradients = map(_wide, both(x_MD, kernel_EDF, grad_MF))
    want, expected = plain.pulled(exact, [_wide(x_MD), _wide(kernel_EDF)], [_wide(grad_MF)])
    return [
        Agreed(
            plain.error([out], want),
            tolerance(dtype, known.device),
            plain.error(gradients, expected),
        )
    ]


def grouped_int8(name: str, known: Known) -> list[Agreed]:
    """Checks rows of each group times integers."""
    sizes_E, D, F = _groups(name, known)
    rng, dtype = np.random.default_rng(4), "float32" if known.on_cpu else "bfloat16"
    x_MD = _random(rng, (sizes_E.sum(), D), dtype)
    kernel_EDF = rng.integers(-127, 128, (len(sizes_E), D, F)).astype(np.int8)
    product = jax.jit(functools.partial(grouped_matmul.grouped_matmul, implementation=name))
    out = _wide(product(x_MD, jnp.asarray(kernel_EDF), jnp.asarray(sizes_E)))

    def exact(x, kernel):
        return (plain.grouped(x, kernel, sizes_E),)

    want, _ = plain.pulled(exact, [_wide(x_MD), kernel_EDF], None)
    return [Agreed(plain.error([out], want), tolerance(dtype, known.device))]


def head(dtype: str, known: Known) -> list[Agreed]:
    """Checks log-probs and entropies in chunks, with the gradients of both."""
    B, T, D, V = (2, 10, 16, 50) if known.tiny else (2, 50, 128, 3000)
    rng = np.random.default_rng(5)
    hidden_BTD = _random(rng, (B, T, D), dtype)
    kernel_VD = jnp.asarray(rng.normal(size=(V, D)) / np.sqrt(D), dtype)
    targets_BT, mask_BT = rng.integers(0, V, (B, T)).astype(np.int32), rng.random((B, T)) < 0.7
    grads = [rng.normal(size=(B, T)) for _ in range(2)]

    @jax.jit
    def both(hidden, kernel, grads):
        def function(hidden, kernel):
            return head_logprobs(
                hidden, kernel, targets_BT, mask_BT, temperature=1.0, chunk_tokens=B * T // 3
            )

        out, pull = jax.vjp(function, hidden, kernel)
        return out, pull(tuple(g.astype(x.dtype) for g, x in zip(grads, out, strict=True)))

    def exact(hidden, kernel):
        return plain.head(hidden, kernel, targets_BT, mask_BT)

    out, gradients = both(hidden_BTD, kernel_VD, tuple(jnp.asarray(g, "float32") for g in grads))
    arrays = [_wide(hidden_BTD), _wide(kernel_VD)]
    want, expected = plain.pulled(exact, arrays, grads)
    return [
        Agreed(
            plain.error(list(map(_wide, out)), want),
            tolerance(dtype, known.device),
            plain.error(list(map(_wide, gradients)), expected),
        )
    ]


# ---------------------------------------------------------------- drawing


def drawing(asked: dict, known: Known) -> list[Agreed]:
    """Checks log-probs of drawn tokens, and how many are others than float64 draws."""
    B, V = (16, 100) if known.tiny else (512, 3000)
    rng = np.random.default_rng(6)
    logits_BV = (3 * rng.normal(size=(B, V))).astype(np.float32)
    uniforms_B2 = rng.random((B, 2)).astype(np.float32)
    sampling = Sampling(max_response_length=1, stop_token_ids=(), temperature=0.8, **asked)
    draw = jax.jit(functools.partial(sample, sampling=sampling))
    tokens_B, logprobs_B = jax.device_get(draw(jnp.asarray(logits_BV), jnp.asarray(uniforms_B2)))
    scaled_BV = np.asarray(logits_BV, np.float64) * np.float64(np.float32(1 / 0.8))
    wanted = [
        plain.drawn(row, plain.kept(row, sampling.top_k, sampling.top_p), u)
        for row, u in zip(scaled_BV, uniforms_B2, strict=True)
    ]
    top_B1 = scaled_BV.max(axis=1, keepdims=True)
    total_B = top_B1[:, 0] + np.log(np.exp(scaled_BV - top_B1).sum(axis=1))
    exact_B = scaled_BV[np.arange(B), tokens_B] - total_B
    gap = float(np.max(np.abs(exact_B - logprobs_B)))
    # An edge between two tokens falls where rounding puts it: of few tokens, the other may come.
    other = float(np.mean(tokens_B != np.array(wanted)))
    return [
        Agreed(gap, 1e-4, of="nats of a token's log-prob"),
        Agreed(other, 0.01, of="of the tokens are others"),
    ]


def noise(known: Known) -> list[Agreed]:
    """Checks that a token's uniforms are those of the host, so that no seed's run depends on the
    device."""
    ids_B = np.arange(1000, dtype=np.uint32)

    def drawn():
        keys_B = row_keys(seed_key(3), ids_B % 7, ids_B, ids_B % 5)
        return np.asarray(jax.jit(uniforms)(keys_B, ids_B))

    here = drawn()
    with jax.default_device(jax.devices("cpu")[0]):
        there = drawn()
    return [Agreed(float(np.mean(here != there)), 0.0, of="of the numbers differ from the host's")]


def slices(known: Known) -> list[Agreed]:
    """Checks that a part of a draw is that part of the whole."""
    del known
    with jax.enable_x64(True):
        key = jax.random.key(11)
        part = jax.jit(normal_slice, static_argnums=2)(key, np.uint64(1000), (20, 50))
        whole = jax.jit(jax.random.normal, static_argnums=(1, 2))(key, (3000,), jnp.float32)
    return [Agreed(plain.error([part], [whole[1000:2000].reshape(20, 50)]), 1e-6)]


# ---------------------------------------------------------------- few bits


def _matrix(known):
    shape = (70, 20) if known.tiny else (640, 384)
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def int8_rounding(known: Known) -> list[Agreed]:
    """Checks that no entry is off by more than half a step of its channel."""
    weights = _matrix(known)
    made = jax.jit(quantised.quantise, static_argnums=1)(jnp.asarray(weights), (-2,))
    values, scales = (np.asarray(x, np.float64) for x in (made.values, made.scales))
    off = np.abs(weights - values * scales) / scales
    return [Agreed(float(off.max()), 0.5 + 1e-4, of="steps of the channel")]


def int8_product(dtype: str, known: Known) -> list[Agreed]:
    """Checks x · q scaled by channel, as layers compute it."""
    weights = _matrix(known)
    made = quantised.quantise(jnp.asarray(weights), (-2,))
    x = _random(np.random.default_rng(8), (40, len(weights)), dtype)

    @jax.jit
    def product(x, made):
        values, scales = quantised.split(made)
        return quantised.scaled(x @ values.astype(x.dtype), scales)

    want = _wide(x) @ (_wide(made.values) * np.asarray(made.scales, np.float64))
    return [Agreed(plain.error([_wide(product(x, made))], [want]), tolerance(dtype, known.device))]


def nf4_rounding(known: Known) -> list[Agreed]:
    """Checks that no entry is further from its own than the nearest level is."""
    weights = _matrix(known)

    @jax.jit
    def rounded(weights):
        return nf4.dense(nf4.quantise(weights, 1, 0))

    got = np.asarray(rounded(jnp.asarray(weights)), np.float64)
    least = np.abs(weights - plain.nearest(weights, nf4.LEVELS, nf4.BLOCK))
    further = np.max(np.abs(weights - got) - least) / np.abs(weights).max()
    return [Agreed(float(max(further, 0.0)), 1e-5)]
