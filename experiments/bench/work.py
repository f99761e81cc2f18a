"""Floating-point operations of an RL step, counted by hand, and the machine's rate.

Only products count, two operations each: x·W of every projection, q·k and weights·v over the keys
that a causal query sees. Norms, rotations, softmaxes, sampling and the optimizer are left out, and
so is everything that an implementation computes twice.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

from experiments.bench.workload import Workload


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


def step_work(w: Workload, *, prompts_once: bool) -> Work:
    """Counts the operations that one RL step needs.

    Args:
      w: the sizes.
      prompts_once: whether the training pass computes a prompt once for its whole group, and the
        head on response tokens only: the mathematical minimum. Otherwise every row includes its own
        prompt and the head covers every token, as padded rows are mostly computed.
    """
    P, B, S, R = w.prompts, w.responses, w.prompt_length, w.response_length
    matrices = 2 * w.layers * layer_parameters(w)
    head = 2 * w.embed_dim * w.vocab
    pair = 4 * w.layers * w.heads * w.head_dim  # one query with one key, all layers
    prompt_pairs = S * (S + 1) / 2
    response_pairs = R * S + R * (R + 1) / 2
    prefill = P * (S * matrices + prompt_pairs * pair + head)
    # The last response token is sampled but never read; the first comes from the prefill.
    decode = B * ((R - 1) * (matrices + head) + (response_pairs - S - R) * pair)
    rows = P if prompts_once else B
    scored = B * R + (0 if prompts_once else B * S)
    forward = (rows * S + B * R) * matrices + scored * head
    forward += (rows * prompt_pairs + B * response_pairs) * pair
    return Work(prefill, decode, 3 * forward)  # backward: twice the forward


def layer_parameters(w: Workload) -> int:
    """Counts the entries of a layer's matrices."""
    attention = w.embed_dim * w.head_dim * (2 * w.heads + 2 * w.kv_heads)
    return attention + 3 * w.embed_dim * w.mlp_dim


def matmul_rates(dtype: str, *, size: int | None = None, repeats: int = 5) -> dict[str, float]:
    """Measures operations per second of a large square product: the best of `repeats`, by library.

    Torch is measured if it has been imported, on the CPU.
    """
    import sys

    on_cpu = jax.devices()[0].platform == "cpu"
    size = size or (2048 if on_cpu else 8192)
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(jnp.matmul)
    rates = {"jax": _rate(lambda: product(x, x).block_until_ready(), size, repeats)}
    if "torch" in sys.modules and on_cpu:
        torch = sys.modules["torch"]
        y = torch.randn(size, size, dtype=getattr(torch, dtype))
        rates["torch"] = _rate(lambda: y @ y, size, repeats)
    return rates


def _rate(product, size, repeats):
    product()  # compiles, and starts the threads
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
