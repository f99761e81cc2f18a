"""Tokens a second of the sampler, and what it reads: `python -m experiments.bench.rollout`.

Ours and others take turns on the same weights and prompts: generate of transformers and of
TRL in --torch_python, vLLM in --vllm_python, each in a process of its own. The side that goes first
in one round goes second in the next; ratios are formed inside a round. Workloads:

  smollm2  SmolLM2-135M-Instruct on GSM8K, stop tokens on
  bench    the shape of `experiments.bench.rl_step`, random weights; --lengths says how long
  skew     ours alone: one response of 4,096 tokens and 63 of 128 to 512, in turn with 64 equal ones
           of as many tokens in all
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import tempfile

from absl import flags

from experiments import command
from luspo_jax.hosts import files

ROOT = pathlib.Path(__file__).resolve().parents[2]

_WORKLOAD = flags.DEFINE_enum("workload", "bench", ["smollm2", "bench", "skew"], "What to sample.")
_LENGTHS = flags.DEFINE_enum(
    "lengths", "uniform", ["uniform", "lognormal"],
    "Of the bench's responses: all --response_length, or by prompt, of median a quarter of it.",
)  # fmt: skip
_SIGMA = flags.DEFINE_float("sigma", 0.8, "Of the logarithm of lognormal lengths.", 0.0)
_PEERS = flags.DEFINE_list("peers", ["transformers", "trl", "vllm"], "Whom to compare with.")
_TORCH = flags.DEFINE_string("torch_python", "", "Python with torch; empty: this one, if it has.")
_VLLM = flags.DEFINE_string("vllm_python", "", "Python with vLLM; empty: without it.")
_VLLM_SEQS = flags.DEFINE_list("vllm_seqs", ["64"], "vLLM's max_num_seqs; a side for each.")
_VLLM_CACHE = flags.DEFINE_integer("vllm_cache_gb", 4, "Memory of vLLM's cache on CPU.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds that count.", 1)
_WARMUP = flags.DEFINE_integer("warmup", 1, "Rounds before them; the first compiles.", 1)
_PROMPTS = flags.DEFINE_integer("prompts", 0, "Prompts; 0: 16 of smollm2, 8 of bench.", 0)
_GROUP = flags.DEFINE_integer("group", 8, "Responses to each.", 1)
_RESPONSE = flags.DEFINE_integer("response_length", 0, "Most tokens; 0: 256, 128, 4096.", 0)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of every side.")
_SET = flags.DEFINE_multi_string("set", [], "Field of our configuration: rollout.num_slots=64.")
_DATA = flags.DEFINE_string(
    "data", os.environ.get("LUSPO_TEST_DATA", str(ROOT.parent / "shared" / "data")),
    "Folder with math_eval/gsm8k/test.jsonl; without it, sums are asked.",
)  # fmt: skip
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, prompts, lengths and sampling.", 0)
_JSON = flags.DEFINE_string("json", None, "File for everything measured.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace that file if it exists.")


def works(folder: pathlib.Path) -> dict:
    """Returns what our sides sample, by side; the first is what peers sample too."""
    from experiments.bench import sampling_work as w
    from experiments.bench.workload import Workload

    seed, group = _SEED.value, _GROUP.value
    if _WORKLOAD.value == "smollm2":
        real = w.real(
            pathlib.Path(_DATA.value), prompts=_PROMPTS.value or 16, group=group,
            limit=_RESPONSE.value or 256,
        )  # fmt: skip
        return {"luspo_jax": real}
    if _WORKLOAD.value == "skew":
        lengths = w.skewed(64, _RESPONSE.value or 4096, low=128, high=512, seed=seed)
        sizes = Workload(prompts=64, response_length=max(lengths))
        skew = w.shaped(sizes, folder, limits=lengths, name="skewed lengths", seed=seed)
        skew = dataclasses.replace(skew, group=1)
        level = dataclasses.replace(
            skew, limits=tuple(w.levelled(lengths)), name=skew.name.replace("skewed", "equal")
        )
        return {"skew": skew, "level": level}
    count, longest = _PROMPTS.value or 8, _RESPONSE.value or 128
    limits = [longest] * count
    if _LENGTHS.value == "lognormal":
        limits = w.lognormal(count, longest, sigma=_SIGMA.value, seed=seed)
    sizes = Workload(prompts=count, group=max(2, group), response_length=longest)
    shaped = w.shaped(sizes, folder, limits=limits, name=f"{_LENGTHS.value} lengths", seed=seed)
    return {"luspo_jax": dataclasses.replace(shaped, group=group)}


def peers(work, folder: pathlib.Path, stack: contextlib.ExitStack, say) -> dict:
    """Starts the peers that were asked for and can be had; says which cannot."""
    from experiments.bench.sampling_sides import Peer

    pythons = {"vllm": _VLLM.value, "transformers": _TORCH.value, "trl": _TORCH.value}
    if not _TORCH.value:
        for kind, package in (("transformers", "torch"), ("trl", "trl")):
            pythons[kind] = sys.executable if importlib.util.find_spec(package) else ""
    spec = work.spec() | {"dtype": _DTYPE.value, "vllm_cache_gb": _VLLM_CACHE.value}
    found = {}
    for kind in _PEERS.value if _WORKLOAD.value != "skew" else ():
        if kind not in pythons:
            raise command.UsageError(f"--peers={kind}: known are {', '.join(sorted(pythons))}")
        if not pythons[kind]:
            flag = "--vllm_python" if kind == "vllm" else "--torch_python"
            say(f"without {kind}: {flag} names a python that has it")
            continue
        if kind == "trl" and len(set(work.limits)) > 1:
            say("without trl: it has one limit for all responses")
            continue
        for seqs in _VLLM_SEQS.value if kind == "vllm" else [""]:
            name = f"{kind}-{seqs}" if len(_VLLM_SEQS.value) > 1 and seqs else kind
            own = spec | {"vllm_seqs": int(seqs or 1)}
            say(f"loading {name} …")
            (folder / name).mkdir()
            found[name] = Peer(kind, pythons[kind], own, folder / name)
            stack.callback(found[name].close)
    return found


def measure(folder: pathlib.Path, say=print) -> dict:
    """Takes all turns; returns everything measured as JSON values."""
    from experiments.bench import report, turns
    from experiments.bench.sampling_sides import Engine, check_lengths, set_field

    environment = report.environment()
    say(report.environment_lines(environment))
    asked = works(folder)
    for work in asked.values():
        say(str(work))
    first = next(iter(asked.values()))
    fields = dict(set_field(text) for text in _SET.value)
    with contextlib.ExitStack() as stack:
        sides = {
            name: Engine(work, dtype=_DTYPE.value, fields_set=fields)
            for name, work in asked.items()
        }
        others = peers(first, folder, stack, say)
        versions = {name: peer.versions for name, peer in others.items()}
        sides |= others
        taken = {name: [] for name in sides}
        for turn in turns.order(list(sides), warmup=_WARMUP.value, steps=_ROUNDS.value):
            turns.rest()
            sampled = sides[turn.side].sample(_SEED.value + _WARMUP.value + turn.round)
            check_lengths(asked.get(turn.side, first), sampled, turn.side)
            kind = "warm-up" if turn.round < 0 else f"round {turn.round + 1}"
            say(
                f"{kind:9} {turn.side:13} {sampled.tokens:7,} tokens in {sampled.seconds:7.2f} s = "
                f"{sampled.rate:7.1f}/s ({sampled.cores:.2f} cores)"
            )
            if turn.round >= 0:
                taken[turn.side].append(sampled)
    return {
        "environment": environment,
        "peers": versions,
        "work": {name: work.spec() for name, work in asked.items()},
        **_told(asked, sides, taken, say),
    }


def _told(asked, sides, taken, say):
    """Prints tables and ratios; returns the record of them."""
    from experiments.bench import sampling_report as told

    say("")
    say(told.table(taken))
    # The rate of equal lengths over that of skewed ones is the time of a token of the latter over
    # that of the former.
    ours = list(asked)[-1]
    ratios = {}
    for side in taken:
        if side != ours:
            line, ratios[side] = told.ratio(taken, ours, side)
            say(line)
    caches = {}
    for name, work in asked.items():
        lines, caches[name] = told.cache(work, sides[name], taken[name][-1])
        say(f"{name}: the last round's cache\n{lines}")
    return {"turns": told.record(taken), "ratios": ratios, "cache": caches}


def main() -> None:
    """Measures what the flags select."""
    if _JSON.value:
        files.check_file(_JSON.value, flag="--json", overwrite=_OVERWRITE.value)
    with tempfile.TemporaryDirectory(prefix="luspo_rollout_") as folder:
        found = measure(pathlib.Path(folder))
    if _JSON.value:
        text = json.dumps(found, indent=2) + "\n"
        files.write_new(_JSON.value, text, flag="--json", overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    sys.exit(command.call(main))
