"""Kernels' results by plain formulas in float64 on the host, with gradients by differentiation."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.rollout.sampling import block_size


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Computes on the host, in float64 where arrays are."""
    with (
        jax.enable_x64(True),
        jax.default_device(jax.devices("cpu")[0]),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        yield


def pulled(
    function: Callable, arrays: Sequence[np.ndarray], grad: Sequence[np.ndarray] | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns a plain function's results and the gradients of Σ result · grad, in float64.

    Args:
      function: takes the arrays, returns a tuple.
      arrays: of any float type.
      grad: as the results; None for no gradients.
    """
    with in_float64():
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        if grad is None:
            return [np.asarray(x) for x in function(*wide)], []
        out, pull = jax.vjp(function, *wide)
        gradients = pull(tuple(jnp.asarray(np.asarray(x, np.float64)) for x in grad))
        return [np.asarray(x) for x in out], [np.asarray(x) for x in gradients]


def error(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> float:
    """Returns the largest difference over the largest value, the larger of all arrays."""
    found = []
    for a, b in zip(got, want, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        found.append(float(np.max(np.abs(a - b)) / max(1e-30, float(np.max(np.abs(b))))))
    return float(np.max(found))  # NaN, if one is


def attention(query_BTNH, key_BSKH, value_BSKH, sees_BTS):
    """softmax(q·k / √H) v over the keys that each query sees; 0 where it sees none."""
    repeats = query_BTNH.shape[2] // key_BSKH.shape[2]
    key_BSNH, value_BSNH = (jnp.repeat(x, repeats, axis=2) for x in (key_BSKH, value_BSKH))
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", query_BTNH, key_BSNH)
    scores_BNTS = scores_BNTS / np.sqrt(query_BTNH.shape[3])
    any_BT = jnp.any(sees_BTS, axis=2)
    kept_BTS = sees_BTS | ~any_BT[:, :, None]
    weights_BNTS = jax.nn.softmax(jnp.where(kept_BTS[:, None], scores_BNTS, -jnp.inf), axis=-1)
    out_BTNH = jnp.einsum("bnts,bsnh->btnh", weights_BNTS, value_BSNH)
    return jnp.where(any_BT[:, :, None, None], out_BTNH, 0.0)


def head(hidden_BTD, kernel_VD, targets_BT, mask_BT):
    """(log-prob of each target, entropy) by log_softmax over the vocabulary; 0 where masked."""
    logp_BTV = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden_BTD, kernel_VD))
    logp_BT = jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]
    entropy_BT = -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)
    return jnp.where(mask_BT, logp_BT, 0.0), jnp.where(mask_BT, entropy_BT, 0.0)


def grouped(x_MD, kernel_EDF, sizes_E):
    """Each group of rows times its own kernel."""
    starts_E = np.cumsum(sizes_E) - sizes_E
    parts = [
        x_MD[start : start + size] @ kernel_EDF[e]
        for e, (start, size) in enumerate(zip(starts_E, sizes_E, strict=True))
    ]
    return jnp.concatenate(parts)


def kept(logits_V: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens top-k and then top-p keep, by sorting."""
    order = np.argsort(-logits_V, kind="stable")
    order = order[: top_k or len(order)]
    masses = np.exp(logits_V[order] - logits_V[order[0]])
    below = np.cumsum(masses) - masses
    found = np.zeros(len(logits_V), bool)
    found[order[below < top_p * masses.sum()]] = True
    return found


def drawn(logits_V: np.ndarray, kept_V: np.ndarray, uniforms_2: np.ndarray) -> int:
    """Draws a token: a block of the vocabulary by the first uniform, one in it by the second."""
    size = block_size(len(logits_V))
    masses_V = np.where(kept_V, np.exp(logits_V - logits_V.max()), 0.0)
    blocks_XY = np.pad(masses_V, (0, -len(masses_V) % size)).reshape(-1, size)
    block = _at(blocks_XY.sum(axis=1), uniforms_2[0])
    return block * size + _at(blocks_XY[block], uniforms_2[1])


def _at(masses, uniform):
    """The first index at which the running sum passes u times the total."""
    running = np.cumsum(masses)
    return int(np.argmax((running > uniform * running[-1]) & (masses > 0)))


def nearest(weights: np.ndarray, levels: Sequence[float], block: int) -> np.ndarray:
    """Each weight [in, out] as the nearest level times the largest |weight| of its block."""
    found = np.empty(weights.shape)
    for start in range(0, len(weights), block):
        part = np.asarray(weights[start : start + block], np.float64)
        largest = np.abs(part).max(axis=0)
        choice = np.abs(part[..., None] - largest[:, None] * np.asarray(levels)).argmin(axis=-1)
        found[start : start + block] = np.asarray(levels)[choice] * largest
    return found
