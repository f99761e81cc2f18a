"""What partial rollouts save: `python -m experiments.bench.pace [--simulate]`.

Steps of P prompts are sampled as a run samples them, synchronously and with P/2, P or 2P more
prompts in flight, for which it waits or which it drops. Lengths are lognormal. An engine samples
them from a model made for it, the paces in turn, step by step. With --simulate only slots are
counted, in many repetitions, and intervals are 95 % over these.
"""

import json
import sys

from absl import flags

from experiments import command
from luspo_jax.hosts import files

_SIMULATE = flags.DEFINE_bool("simulate", False, "Count slots; compute nothing.")
_PROMPTS = flags.DEFINE_integer("prompts", 16, "Prompts of a step, P.", 2)
_GROUP = flags.DEFINE_integer("group", 8, "Responses to each.", 1)
_SLOTS = flags.DEFINE_list("slots", ["32", "64"], "Responses decoded at once; a table for each.")
_SIGMAS = flags.DEFINE_list("sigmas", ["0.8", "1.0"], "Of the logarithm of lengths; likewise.")
_MEDIAN = flags.DEFINE_float("median", 40.0, "Median length, tokens.", 1.0)
_LONGEST = flags.DEFINE_integer("longest", 480, "Longer responses are cut.", 2)
_SHARED = flags.DEFINE_float("shared", 0.5, "Share of the variance that is a prompt's.", 0.0, 1.0)
_CHUNK = flags.DEFINE_integer("chunk", 8, "Decode steps between two looks.", 1)
_STEPS = flags.DEFINE_integer("steps", 24, "Steps that count.", 1)
_WARMUP = flags.DEFINE_integer("warmup", 8, "Steps before them; some compile.", 0)
_REPEATS = flags.DEFINE_integer("repeats", 0, "Repetitions; 0: 20 if simulated, else 1.", 0)
_LAYERS = flags.DEFINE_integer("layers", 2, "Of the model.", 1)
_MLP = flags.DEFINE_integer("mlp_dim", 512, "Width inside a layer of the model.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "The first repetition's, of prompts and lengths.", 0)
_JSON = flags.DEFINE_string("json", None, "File for everything measured.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace that file if it exists.")


def main() -> None:
    """Measures what the flags select."""
    if _JSON.value:
        files.check_file(_JSON.value, flag="--json", overwrite=_OVERWRITE.value)
    from experiments.bench import pace_report, pace_sides, report
    from experiments.bench.pace_work import Law, Sizes

    environment, columns = report.environment(), pace_report.COLUMNS
    if not _SIMULATE.value:
        print(report.environment_lines(environment))
        columns += pace_report.MEASURED
    repeats = _REPEATS.value or (20 if _SIMULATE.value else 1)
    records = []
    for sigma in _numbers(_SIGMAS, float):
        law, model = Law(_MEDIAN.value, sigma, _LONGEST.value, _SHARED.value), None
        if not _SIMULATE.value:
            model = pace_sides.model_of(law, layers=_LAYERS.value, mlp_dim=_MLP.value)
        for slots in _numbers(_SLOTS, int):
            sizes = Sizes(
                _PROMPTS.value, _GROUP.value, slots, _CHUNK.value, _STEPS.value, _WARMUP.value
            )
            seeds = range(_SEED.value, _SEED.value + repeats)
            found = pace_report.measure(law, sizes, seeds=seeds, model=model)
            print(
                f"\nsigma {sigma:g}, mean length {law.mean:.1f}; {sizes.prompts} × {sizes.group} "
                f"responses a step, {slots} slots; {sizes.steps} steps × {repeats}\n\n"
                + pace_report.table(found, columns),
                flush=True,
            )
            records.append(pace_report.record(law, sizes, found))
    if _JSON.value:
        text = json.dumps({"environment": environment, "tables": records}, indent=2) + "\n"
        files.write_new(_JSON.value, text, flag="--json", overwrite=_OVERWRITE.value)


def _numbers(flag, kind):
    try:
        found = [kind(text) for text in flag.value]
    except ValueError as error:
        raise command.UsageError(f"--{flag.name}={','.join(flag.value)}: {error}") from error
    if not found or min(found) <= 0:
        raise command.UsageError(f"--{flag.name}={','.join(flag.value)} must be numbers above 0")
    return found


if __name__ == "__main__":
    sys.exit(command.call(main))
