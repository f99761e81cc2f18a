"""A run's own model and prompts: reading, speed, and a bfloat16 sampler against the trainer.

`python -m experiments.bench.real_model --config=configs/smollm2_135m_chain_sum.py` reads the
weights, takes rollout steps with a sampler in each type, and prints seconds, tokens per second,
matrix arithmetic, peak memory and |sampler − trainer| of the tokens that were sampled. The first
step of each compiles and is not timed.
"""

import contextlib
import json
import statistics
import sys
import time

from absl import flags

from experiments import command
from luspo_jax.hosts import files

_CONFIG = flags.DEFINE_string("config", "configs/smollm2_135m_chain_sum.py", "The run's file.")
_STEPS = flags.DEFINE_integer("steps", 3, "Steps of each type that are timed.", 1)
_TYPES = flags.DEFINE_list("types", ["float32", "bfloat16"], "Types of the sampler.")
_JSON = flags.DEFINE_string("json", None, "File for everything measured.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace that file if it exists.")

_MISMATCH = ("max_abs_diff", "log_ppl_abs_diff", "kl", "k3_kl")


def measure(base: str, kinds: list[str], steps: int) -> dict:
    """Returns what was measured: reading once, and the steps of each type of the sampler."""
    return {"reading": reading(base), **{kind: stepping(base, kind, steps) for kind in kinds}}


def reading(base: str) -> dict[str, float]:
    """Reads the weights: seconds, bytes of the parameters, peak memory of the process before and
    after."""
    import jax

    from experiments.sweeps import spec
    from luspo_jax.run.build import build
    from luspo_jax.run.memory import peak_memory

    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        run = build(spec.base_config(base))
        stack.enter_context(run.scorer)
        built, before = time.perf_counter(), peak_memory() / 1e9
        params = jax.block_until_ready(run.initial_params())
        loaded = time.perf_counter()
    return {
        "build_s": built - started,
        "load_s": loaded - built,
        "float32_gb": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "peak_before_gb": before,
        "peak_after_gb": peak_memory() / 1e9,
    }


def stepping(base: str, kind: str, steps: int) -> dict[str, float]:
    """Takes rollout steps with a sampler of this type; returns medians of their metrics.

    The first step's mismatch is that of untouched weights on the model's own text.
    """
    from experiments.sweeps import spec
    from luspo_jax import train
    from luspo_jax.metrics import StepMetrics
    from luspo_jax.run import beginning, fields
    from luspo_jax.run.build import build

    config = spec.base_config(base)
    fields.assign(config, {"model.rollout_dtype": kind, "rollout.mismatch_limit": 1e3})
    taken = []
    with contextlib.ExitStack() as stack:
        run = build(config)
        stack.enter_context(run.scorer)
        state, carried = beginning.begin_state(run), beginning.Carried()
        for step in range(steps + 1):
            metrics = StepMetrics()
            state, carried, rollouts = train.rollout_step(
                run, state, carried, step, metrics=metrics, check_mismatch=step == 0
            )
            taken.append(metrics.result() | {"tokens": int(rollouts.lengths_B.sum())})
    first, timed = taken[0], taken[1:]
    found = {f"mismatch/{name}": first[f"rollout_corr/{name}"] for name in _MISMATCH}
    phases = [name for name in timed[0] if name.startswith("timing_s/")]
    found |= {name: statistics.median(t[name] for t in timed) for name in phases}
    found["response_tokens_per_s"] = statistics.median(
        t["tokens"] / t["timing_s/gen"] for t in timed
    )
    return found


def main() -> None:
    """Measures and prints."""
    if _JSON.value:
        files.check_file(_JSON.value, flag="--json", overwrite=_OVERWRITE.value)
    found = measure(_CONFIG.value, _TYPES.value, _STEPS.value)
    for part, values in found.items():
        print(part)
        for name, value in values.items():
            print(f"  {name:32} {value:.6g}")
    if _JSON.value:
        text = json.dumps(found, indent=2) + "\n"
        files.write_new(_JSON.value, text, flag="--json", overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    sys.exit(command.call(main))
