"""Times one RL step, ours and TRL's in turn: `python -m experiments.bench.rl_step`.

Both start from the same random weights, sample the same number of responses of the same length to
the same prompts, and take one AdamW step on the LUSPO loss; the side that goes first in one round
goes second in the next. TRL needs `pip install -e '.[parity]'`; without it, or with --peers=none,
only ours is timed, at any sizes.
"""

import dataclasses
import json
import sys

from absl import flags

from experiments import command
from luspo_jax.hosts import files

_STEPS = flags.DEFINE_integer("steps", 5, "Rounds that count.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 2, "Rounds before them; the first compiles.", 1)
_PEERS = flags.DEFINE_enum("peers", "trl", ["trl", "none"], "Whom to compare with.")
_JSON = flags.DEFINE_string("json", None, "File for everything measured.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace that file if it exists.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, prompts and sampling.", 0)
_TRL_MICROBATCHES = flags.DEFINE_integer(
    "trl_microbatches", 1, "Parts of TRL's update (gradient accumulation).", 1
)
flags.DEFINE_integer("prompts", 8, "Prompts a step.")
flags.DEFINE_integer("group", 8, "Responses to each.")
flags.DEFINE_integer("prompt_length", 64, "Tokens of a prompt.")
flags.DEFINE_integer("response_length", 128, "Tokens of a response.")
flags.DEFINE_integer("embed_dim", 256, "D.")
flags.DEFINE_integer("layers", 4, "L.")
flags.DEFINE_integer("heads", 8, "N.")
flags.DEFINE_integer("kv_heads", 4, "K.")
flags.DEFINE_integer("head_dim", 32, "H.")
flags.DEFINE_integer("mlp_dim", 768, "F.")
flags.DEFINE_integer("vocab", 4096, "V.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type; masters: float32.")
flags.DEFINE_integer("microbatches", 1, "Parts of our update.")


def main() -> None:
    """Runs the benchmark that the flags select."""
    if _JSON.value:
        files.check_file(_JSON.value, flag="--json", overwrite=_OVERWRITE.value)
    from experiments.bench import compare  # After flags are parsed: a typo fails at once.
    from experiments.bench.workload import Workload

    fields = [field.name for field in dataclasses.fields(Workload)]
    peers = [] if _PEERS.value == "none" else [_PEERS.value]
    if peers and not compare.trl_installed():
        print("TRL is not installed, so ours is timed alone; to add it: pip install -e '.[parity]'")
        peers = []
    record = compare.measure(
        Workload(**{name: getattr(flags.FLAGS, name) for name in fields}),
        peers=peers,
        steps=_STEPS.value,
        warmup=_WARMUP.value,
        seed=_SEED.value,
        trl_microbatches=_TRL_MICROBATCHES.value,
    )
    if _JSON.value:
        text = json.dumps(record, indent=2) + "\n"
        files.write_new(_JSON.value, text, flag="--json", overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    sys.exit(command.call(main))
