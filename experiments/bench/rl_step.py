"""Times one RL step of ours, TRL and Tunix in turn: `python -m experiments.bench.rl_step`.

All start from the same weights, sample the same numbers of tokens to the same prompts, and take one
AdamW step on the LUSPO loss; the side that goes first in one round goes last in the next. Peers
run in processes of their own, in the python that --trl_python or --tunix_python names, and each
side first looks for its fastest settings. Workloads:

  synthetic  a random Qwen3 of the sizes below; every response has --response_length tokens
  smollm2    SmolLM2-135M-Instruct on GSM8K; each response has the length at which the model ended
             it in a rollout beforehand, at most --response_length
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile

from absl import flags

from experiments import command
from luspo_jax.hosts import files

ROOT = pathlib.Path(__file__).resolve().parents[2]
_REAL = {"prompts": 2, "group": 4, "response_length": 256}

_WORKLOAD = flags.DEFINE_enum("workload", "synthetic", ["synthetic", "smollm2"], "What a step is.")
_STEPS = flags.DEFINE_integer("steps", 5, "Rounds that count.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 1, "Rounds before them; the first compiles.", 1)
_PEERS = flags.DEFINE_list("peers", ["trl", "tunix"], "Whom to compare with; none: ours alone.")
_TRL = flags.DEFINE_string("trl_python", "", "Python with TRL; empty: this one, if it has.")
_TUNIX = flags.DEFINE_string("tunix_python", "", "Python with Tunix; empty: this one, if it has.")
_SEARCH = flags.DEFINE_bool("search", True, "Find each side's fastest settings first.")
_SETTINGS = flags.DEFINE_string(
    "settings", None, "File that --json wrote, whose settings hold; nothing is searched."
)
_DOUBLE = flags.DEFINE_bool("double", False, "Measure responses of twice the tokens, too.")
_SET = flags.DEFINE_multi_string("set", [], "Field of our configuration: train.packing=True.")
_DATA = flags.DEFINE_string(
    "data", os.environ.get("LUSPO_TEST_DATA", str(ROOT.parent / "shared" / "data")),
    "Folder with math_eval/gsm8k/test.jsonl; without it, sums are asked.",
)  # fmt: skip
_JSON = flags.DEFINE_string("json", None, "File for everything measured.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace that file if it exists.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, prompts, lengths and sampling.", 0)
_MICROBATCHES = flags.DEFINE_integer("microbatches", 1, "Without search: parts of our update.", 1)
_TRL_MICROBATCHES = flags.DEFINE_integer("trl_microbatches", 1, "Likewise, of TRL's.", 1)
_TRL_COMPILE = flags.DEFINE_bool("trl_compile", False, "Without search: torch.compile.")
_TUNIX_MICROBATCHES = flags.DEFINE_integer("tunix_microbatches", 1, "Likewise, of Tunix's.", 1)
flags.DEFINE_integer("prompts", None, "Prompts a step; unset: 8, of smollm2 2.")
flags.DEFINE_integer("group", None, "Responses to each; unset: 8, of smollm2 4.")
flags.DEFINE_integer("prompt_length", 64, "Tokens of a synthetic prompt.")
flags.DEFINE_integer("response_length", None, "Tokens of a response; unset: 128, 256.")
flags.DEFINE_integer("embed_dim", 256, "D of the synthetic model, as are the next.")
flags.DEFINE_integer("layers", 4, "L.")
flags.DEFINE_integer("heads", 8, "N.")
flags.DEFINE_integer("kv_heads", 4, "K.")
flags.DEFINE_integer("head_dim", 32, "H.")
flags.DEFINE_integer("mlp_dim", 768, "F.")
flags.DEFINE_integer("vocab", 4096, "V.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type; masters: float32.")


def task(folder: pathlib.Path):
    """Returns the Task that the flags select; files are written to `folder`."""
    from experiments.bench import step_task
    from experiments.bench.workload import Workload

    given = {name: flags.FLAGS[name].value for name in flags.FLAGS if name in _fields(Workload)}
    given = {name: value for name, value in given.items() if value is not None}
    if _WORKLOAD.value == "smollm2":
        return step_task.real(
            Workload(**{**_REAL, **given}), pathlib.Path(_DATA.value), seed=_SEED.value
        )
    return step_task.synthetic(Workload(**given), folder, seed=_SEED.value)


def plan(say=print):
    """Returns the Plan that the flags select; says which peers cannot be had."""
    from experiments.bench import compare
    from experiments.bench.sampling_sides import set_field

    pythons = {}
    named = {compare.TRL: _TRL.value, compare.TUNIX: _TUNIX.value}
    for name in [] if _PEERS.value == ["none"] else _PEERS.value:
        if name not in named:
            raise command.UsageError(f"--peers={name}: known are {', '.join(named)} and none")
        python = named[name] or compare.this_python(name)
        if not python:
            say(f"without {name}: --{name}_python names a python that has it")
        elif name == compare.TUNIX and flags.FLAGS.dtype != "float32":
            say(f"without {name}: it is compared in float32")
        else:
            pythons[name] = python
    return compare.Plan(
        steps=_STEPS.value,
        warmup=_WARMUP.value,
        pythons=pythons,
        search=_SEARCH.value and not _SETTINGS.value,
        settings=_settings(),
        fields=dict(set_field(text) for text in _SET.value),
        seed=_SEED.value,
    )


def _settings():
    """Returns the settings of each side where nothing is searched."""
    from experiments.bench import compare

    given = {
        compare.OURS: {"train.num_microbatches": _MICROBATCHES.value},
        compare.TRL: {"microbatches": _TRL_MICROBATCHES.value, "compile": _TRL_COMPILE.value},
        compare.TUNIX: {"microbatches": _TUNIX_MICROBATCHES.value},
    }
    if _SETTINGS.value:
        found = json.loads(pathlib.Path(_SETTINGS.value).read_text(encoding="utf-8"))
        given |= {side: values["settings"] for side, values in found["settings"].items()}
    return given


def _fields(kind):
    return {field.name for field in dataclasses.fields(kind)}


def main() -> None:
    """Runs the benchmark that the flags select."""
    if _JSON.value:
        files.check_file(_JSON.value, flag="--json", overwrite=_OVERWRITE.value)
    from experiments.bench import compare  # After flags are parsed: a typo fails at once.

    chosen = plan()
    with tempfile.TemporaryDirectory(prefix="luspo_bench_") as folder:
        asked = task(pathlib.Path(folder))
        record = compare.measure(asked, chosen)
        if _DOUBLE.value:
            record["doubled"] = compare.doubled(asked, chosen, record)
    if _JSON.value:
        text = json.dumps(record, indent=2) + "\n"
        files.write_new(_JSON.value, text, flag="--json", overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    sys.exit(command.call(main))
