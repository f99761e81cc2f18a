"""Samplers of the benchmark of partial rollouts: slots without a model, and an engine with one."""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.pace_work import PROMPT_LENGTH, Law, Sizes
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.rollout import Cache, Engine, Response, RolloutStats, Sampling

_STOP = 0
# Rows that must be free before others take them, as a share: as the engine's loop has it.
_REFILL = 1 / 16
_PREFILL = 1_024  # most tokens of a prefill: few programs to compile


class Slots:
    """In place of an engine: so many slots, in which responses grow a token a decode step.

    The oldest are admitted first. Nothing is computed, reading costs nothing, and it looks up when
    an engine does: when enough slots are free, or after a chunk.
    """

    def __init__(self, length: Callable[[int, int, int], int], sizes: Sizes, *, longest: int):
        """
        Args:
          length: (step that began it, prompt_id, sample_id) → length of a response.
          sizes: slots and chunk.
          longest: bound on lengths.
        """
        self.sampling = types.SimpleNamespace(max_response_length=longest)
        self._length, self._sizes = length, sizes

    def generate(self, params, requests, *, group_size, seed, step, until=None):
        """As `Engine.generate`; lengths alone are meant, the tokens are all 0."""
        keys = [(request, sample) for request in requests for sample in range(group_size)]
        began = np.array([request.step for request, _ in keys])
        wanted = np.array([self._length(r.step, r.prompt_id, sample) for r, sample in keys])
        had = np.array([len(r.begun[sample].tokens) for r, sample in keys])
        grown, decode_steps = self._grow(had, wanted, began, until)
        responses = [
            _response(request.begun[sample], int(count), bool(count == want))
            for (request, sample), count, want in zip(keys, grown, wanted, strict=True)
        ]
        generated = int((grown - had).sum())
        return responses, RolloutStats(
            decode_steps=decode_steps,
            prefill_tokens=0,
            prefill_calls=0,
            generated_tokens=generated,
            slot_utilisation=generated / max(1, decode_steps * self._sizes.slots),
            compilations=0,
            compile_seconds=0.0,
            seconds=0.0,
            continued_tokens=int(had[(had < wanted) & (grown > had)].sum()),
        )

    def _grow(self, had, wanted, began, until):
        """Returns the lengths reached, and the decode steps."""
        slots, chunk = self._sizes.slots, self._sizes.chunk
        queue = [i for i in np.argsort(began, kind="stable") if had[i] < wanted[i]]
        growing, count, look, now = [], had.copy(), chunk, 0
        while until is not None or queue or growing:
            growing, queue = growing + queue[: slots - len(growing)], queue[slots - len(growing) :]
            if growing:
                rows = np.array(growing)
                left = np.sort(wanted[rows] - count[rows])
                leaving = max(1, int(_REFILL * slots)) if queue else len(rows)
                steps = min(chunk, int(left[min(leaving, len(rows)) - 1]))
                count[rows] = np.minimum(count[rows] + steps, wanted[rows])
                now += steps
                growing = rows[count[rows] < wanted[rows]].tolist()
            whole = not (queue or growing)
            if until is not None and (whole or now >= look):
                if until((count == wanted).tolist()):
                    break
                look = chunk * (now // chunk + 1)
        return count, now


def _response(begun, length, ended):
    more = length - len(begun.tokens)
    return Response(
        begun.prompt_id,
        begun.sample_id,
        np.zeros(length, np.int32),
        np.zeros(length, np.float32),
        stopped=ended,
        step=begun.step,
        ended=ended,
        versions=np.concatenate([begun.versions, np.zeros(more, np.uint32)]),
    )


def drawn(law: Law, group: int, seed: int) -> Callable[[int, int, int], int]:
    """Returns (step, prompt_id, sample_id) → length by the law; the step has no part in it."""
    sums_KN = np.cumsum(law.table_KN, axis=1)

    @functools.cache
    def lengths(prompt_id):
        uniforms = np.random.default_rng((seed, prompt_id, group)).random(group)
        found = np.searchsorted(sums_KN[law.kind(prompt_id, seed)], uniforms, side="right")
        return 1 + np.minimum(found, law.longest - 1)

    return lambda step, prompt_id, sample_id: lengths(prompt_id)[sample_id]


def model_of(law: Law, *, layers: int, mlp_dim: int) -> tuple[DecoderConfig, Any]:
    """Returns (config, params) of a decoder whose responses have lengths by the law.

    After a prompt of kind k it draws n − 1 with probability P(n | k), after n it says n − 1, and 0
    is its stop token. Layers cost what layers of their size cost, and add nothing.

    Args:
      law: of lengths.
      layers: number of layers.
      mlp_dim: width inside each.
    """
    kinds, longest = law.table_KN.shape
    size = longest + kinds
    model = DecoderConfig(
        model_type="qwen3",
        vocab_size=size,
        num_layers=layers,
        embed_dim=size,
        mlp_dim=mlp_dim,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=False,
        max_position=PROMPT_LENGTH + longest,
    )
    params = jax.tree.map(jnp.zeros_like, decoder.init_params(jax.random.key(0), model))
    params["embedding"] = jnp.eye(size)
    params["final_norm"] = jax.tree.map(jnp.ones_like, params["final_norm"])
    head_VD = np.full((size, size), -1e3, np.float32)
    head_VD[np.arange(longest - 1), np.arange(1, longest)] = 0  # n → n − 1
    with np.errstate(divide="ignore"):
        head_VD[:longest, longest:] = np.maximum(np.log(law.table_KN.T), -1e3)
    # The last norm makes a unit vector √D long, but for its ε.
    scale = np.sqrt(1 / size + model.rms_norm_eps)
    params["head"] = jnp.asarray(head_VD * scale)
    return model, params


def engine_of(law: Law, sizes: Sizes, model: DecoderConfig) -> Engine:
    """Returns an engine of the model, with pages for all its slots."""
    return Engine(
        Forward(model),
        Sampling(law.longest, (_STOP,)),
        num_slots=sizes.slots,
        max_prompt_length=PROMPT_LENGTH,
        chunk_length=sizes.chunk,
        max_prefill_tokens=_PREFILL,
        cache=Cache(gb=8.0),
    )
