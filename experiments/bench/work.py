"""Floating-point operations of an RL step, counted by hand, and the machine's rate.

Only products count, two operations each: x·W of every projection, q·k and weights·v over the keys
that a causal query sees. Norms, rotations, softmaxes, sampling and the optimizer are left out, and
so is everything that an implementation computes twice.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from luspo_jax.models.decoder_config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of one step by phase."""

    prefill: float
    decode: float
    update: float

    @property
    def total(self) -> float:
        """Returns the operations of the whole step."""
        return self.prefill + self.decode + self.update


def step_work(
    model: DecoderConfig,
    prompts: Sequence[int],
    lengths: Sequence[Sequence[int]],
    *,
    prompts_once: bool,
) -> Work:
    """Counts the operations that one RL step needs.

    Args:
      model: a dense decoder.
      prompts: tokens of each.
      lengths: tokens of every response, by prompt.
      prompts_once: whether the training pass computes a prompt once for its whole group, and the
        head on response tokens only: the mathematical minimum. Otherwise every row includes its own
        prompt, is padded to the longest prompt and the longest response, and the head covers every
        token, as padded rows are mostly computed; sampling is the same.
    """
    matrices = 2 * model.num_layers * layer_parameters(model)
    head = 2 * model.embed_dim * model.vocab_size
    pair = 4 * model.num_layers * model.num_heads * model.head_dim  # a query and a key, all layers
    rows = [(S, R) for S, group in zip(prompts, lengths, strict=True) for R in group]
    prefill = sum(S * matrices + _pairs(0, S) * pair + head for S in prompts)
    # The last response token is sampled but never read; the first comes from the prefill.
    decode = sum((R - 1) * (matrices + head) + _pairs(S, R - 1) * pair for S, R in rows)
    if prompts_once:
        forward = sum(S * matrices + _pairs(0, S) * pair for S in prompts)
        forward += sum(R * (matrices + head) + _pairs(S, R) * pair for S, R in rows)
    else:
        T = max(prompts) + max(R for _, R in rows)
        forward = len(rows) * (T * (matrices + head) + _pairs(0, T) * pair)
    return Work(prefill, decode, 3 * forward)  # backward: twice the forward


def _pairs(before: int, count: int) -> int:
    """Queries with the keys that they see: `count` tokens after `before` others."""
    return count * before + count * (count + 1) // 2


def layer_parameters(model: DecoderConfig) -> int:
    """Counts the entries of a layer's matrices."""
    attention = model.embed_dim * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    return attention + 3 * model.embed_dim * model.mlp_dim


def matmul_rates(dtype: str, *, size: int | None = None, repeats: int = 5) -> dict[str, float]:
    """Measures operations per second of a large square product: of each library the best."""
    on_cpu = jax.devices()[0].platform == "cpu"
    size = size or (2048 if on_cpu else 8192)
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(jnp.matmul)
    rates = {"jax": _rate(lambda: product(x, x).block_until_ready(), size, repeats)}
    return rates


def _rate(product, size, repeats):
    product()  # compiles, and starts the threads
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
