"""Memory of the head by chunk and length: `python -m experiments.bench.head_memory --out=DIR`.

For log-probs, entropies and their gradients of T tokens over a vocabulary of V: temporary bytes as
planned by XLA, for the chunked head and for a plain log-softmax. Nothing is run.
"""

import json
import pathlib
import sys

from absl import flags

from experiments import command
from experiments.drawing import benches
from luspo_jax.hosts import figure_style, files

_OUT = flags.DEFINE_string("out", None, "Folder for the table and the figure.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier one in --out.")
_LENGTHS = flags.DEFINE_list("lengths", ["4096", "16384", "65536"], "T.")
_CHUNKS = flags.DEFINE_list("chunks", ["512", "2048", "8192"], "Tokens whose logits exist at once.")
_VOCAB = flags.DEFINE_integer("vocab", 151_936, "V; the default is Qwen's.")
_EMBED = flags.DEFINE_integer("embed", 1024, "D.")


def main() -> None:
    """Compiles every case, prints the table and draws the figure."""
    out = pathlib.Path(_OUT.value)
    files.check_folder(out, overwrite=_OVERWRITE.value)
    rows = []
    for length in map(int, _LENGTHS.value):
        row = {"tokens": length, "plain": temporary_bytes(length, None)}
        row |= {chunk: temporary_bytes(length, int(chunk)) for chunk in _CHUNKS.value}
        rows.append(row)
        print(json.dumps(row), flush=True)
    with files.new_folder(out, overwrite=_OVERWRITE.value) as folder:
        found = {"vocab": _VOCAB.value, "embed": _EMBED.value, "rows": rows}
        files.write_text(folder / "head_memory.json", json.dumps(found, indent=2) + "\n")
        figure_style.save(benches.head_memory(found), folder / "head_memory.png")


def temporary_bytes(length: int, chunk_tokens: int | None) -> int:
    """Counts bytes for Σ log p + Σ H of a row and its gradient; `None`: a plain log-softmax."""
    import jax
    import jax.numpy as jnp

    from luspo_jax.ops.head_logprobs import head_logprobs

    def total(hidden_BTD, kernel_VD, targets_BT, mask_BT):
        if chunk_tokens is not None:
            logprobs_BT, entropy_BT = head_logprobs(
                hidden_BTD,
                kernel_VD,
                targets_BT,
                mask_BT,
                temperature=1.0,
                chunk_tokens=chunk_tokens,
            )
        else:
            logp_BTV = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden_BTD, kernel_VD))
            logprobs_BT = jnp.take_along_axis(logp_BTV, targets_BT[..., None], -1)[..., 0]
            entropy_BT = -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)
        return jnp.sum(jnp.where(mask_BT, logprobs_BT + entropy_BT, 0.0))

    shapes = (
        jax.ShapeDtypeStruct((1, length, _EMBED.value), jnp.float32),
        jax.ShapeDtypeStruct((_VOCAB.value, _EMBED.value), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        jax.ShapeDtypeStruct((1, length), jnp.bool_),
    )
    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    sys.exit(command.call(main, required=("out",)))
