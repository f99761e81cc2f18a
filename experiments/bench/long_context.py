"""Cost of a token as responses get longer: `python -m experiments.bench.long_context --out=DIR`.

A small model takes one training step on one packed row of T tokens sharded over fake CPU devices
(context parallelism), for several T. For each it reports seconds of the step and per token,
temporary bytes per device as planned by XLA, and the largest array of the program. Attention's
share grows with T, everything else is flat; no array has T × T entries or a whole row of hidden
states.
"""

import json
import pathlib
import re
import sys
import time

from absl import flags

from experiments import command
from experiments.drawing import benches
from luspo_jax.hosts import figure_style, files

_OUT = flags.DEFINE_string("out", None, "Folder for the table and the figure.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier one in --out.")
_LENGTHS = flags.DEFINE_list("lengths", ["8192", "32768", "131072"], "Tokens of a row.")
_DEVICES = flags.DEFINE_integer("devices", 8, "Fake CPU devices that share a row.")

_SHAPE = re.compile(r"\b(?:f32|bf16|s32|pred|u32)\[([\d,]+)\]")


def main() -> None:
    """Measures every length, prints the table and draws the figure."""
    import jax

    jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    out = pathlib.Path(_OUT.value)
    files.check_folder(out, overwrite=_OVERWRITE.value)
    rows = []
    for length in map(int, _LENGTHS.value):
        rows.append(measured(length))
        print(json.dumps(rows[-1]), flush=True)
    with files.new_folder(out, overwrite=_OVERWRITE.value) as folder:
        files.write_text(folder / "long_context.json", json.dumps(rows, indent=2) + "\n")
        figure_style.save(benches.long_context(rows), folder / "long_context.png")


def measured(length: int) -> dict[str, float]:
    """Measures one step on one row of `length` tokens over all devices."""
    import jax
    import numpy as np

    from luspo_jax.learner.step import update_step

    state, batch, rule = case(length)
    compiled = update_step.lower(state, batch, np.float32(1e-6), rule=rule).compile()
    started = time.perf_counter()
    _, metrics = jax.block_until_ready(compiled(state, batch, np.float32(1e-6)))
    seconds = time.perf_counter() - started
    loss, _ = metrics["actor/pg_loss"]
    if not np.isfinite(loss) or metrics["actor/skipped_updates"][0]:
        raise FloatingPointError(f"the step at {length} tokens is not finite")
    shapes = [tuple(map(int, found.split(","))) for found in _SHAPE.findall(compiled.as_text())]
    return {
        "tokens": length,
        "devices": jax.device_count(),
        "seconds": seconds,
        "microseconds_a_token": 1e6 * seconds / length,
        "temporary_bytes_a_device": compiled.memory_analysis().temp_size_in_bytes,
        "largest_array": max(int(np.prod(shape)) for shape in shapes),
        "square": sum(shape.count(length) > 1 for shape in shapes),
        # Tokens, positions and log-probs may be unsharded on a device; hidden states may not.
        "whole_rows_of_states": sum(
            length in shape and int(np.prod(shape)) >= length * _EMBED for shape in shapes
        ),
    }


_EMBED = 32


def case(length: int):
    """Returns (state, batch, rule) of a small model; all but 64 tokens of its row are response."""
    import jax
    import numpy as np

    from luspo_jax import objectives, sharding
    from luspo_jax.learner import optimizer, rows
    from luspo_jax.learner.logprobs import LogprobRule
    from luspo_jax.learner.state import UpdateRule, initial_state
    from luspo_jax.models import decoder
    from luspo_jax.models.decoder_config import DecoderConfig
    from luspo_jax.models.forward import Forward
    from luspo_jax.types import ResponseRows, TokenRows, TrainBatch

    config = DecoderConfig(
        model_type="qwen3", vocab_size=256, num_layers=2, embed_dim=_EMBED, mlp_dim=96, num_heads=2,
        num_kv_heads=1, head_dim=16, rope_theta=1e6, rms_norm_eps=1e-6, qkv_bias=False,
        qk_norm=True, tie_embeddings=True, max_position=length,
    )  # fmt: skip
    layout = sharding.layout("train", {"context": -1}, jax.devices())
    rule = UpdateRule(
        logprobs=LogprobRule(Forward(config, remat="full", layout=layout), head_chunk_tokens=1024),
        objective=objectives.preset("luspo"),
        optimizer=optimizer.adamw(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0),
        max_grad_norm=1.0,
    )
    places = np.arange(length, dtype=np.int32)[None]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length)).astype(np.int32)
    batch = TrainBatch(
        rows=TokenRows(tokens, places, np.ones_like(places), places >= 64, rows_per_microbatch=1),
        responses=ResponseRows(
            starts_B=np.zeros(1, np.int32),
            response_mask_BT=places >= 64,
            advantages_B=np.ones(1, np.float32),
            group_ids_B=np.zeros(1, np.int32),
            sampler_logprobs_BT=np.zeros((1, length), np.float32),
        ),
    )
    params = decoder.init_params(jax.random.key(0), config, layout=layout)
    return initial_state(params, rule), rows.put(batch, layout), rule


if __name__ == "__main__":
    sys.exit(command.call(main, required=("out",)))
