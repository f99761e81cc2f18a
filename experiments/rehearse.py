"""Rehearses a run without its hardware:

`python -m experiments.rehearse --config=configs/FILE.py --topology=v5p:2x2x4 --json=FILE`

It compiles every program of the run for the named machine, at the configuration's real sizes,
checks it against the machine's memory, and reports operations, bytes, a lower bound on step time,
and how many sequences fit. It reads no weights, data or tokenizer and needs no accelerator: a TPU
slice (v4, v5e, v5p, v6e, tpu7x) needs `pip install "jax[tpu]"`, GPUs (h100:1x8, h200:1x8,
a100-80g:4x8, rtx4090:1x1: hosts × cards) need `pip install "jax[cuda13]"`; `local` is the local
devices. Several slices joined by the network are `--topology=2*v5p:4x4x4 --config.mesh.data=2`
(v5e, v5p, v6e); what crosses between them is read from the compiled programs.

A rollout is played at assumed lengths; with `rollout.overlap`, step after step until steps are
alike. `--nocompile` tells the times alone, which are counted by hand.

Exits with 1 if something does not fit, naming the program, the bytes and a change that helps;
`--search` finds the fastest settings that fit. `--hlo` tells, for the programs of training, which
copies and transpositions the compiler made and for which line, which collectives are exposed, and
what the optimiser moves.
"""

import json
import os
import sys

from absl import flags
from ml_collections import config_flags

from experiments import command
from luspo_jax.hosts import files

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Machine: v5p:2x2x4, 2*v5p:4x4x4, h100:1x8, local."
)
_JSON = flags.DEFINE_string("json", "", "File for the report as JSON.")
_MARKDOWN = flags.DEFINE_string("markdown", "", "File for the report as Markdown.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace these files if they exist.")
_MEAN = flags.DEFINE_float("mean_length", None, "Assumed mean response length; unset = longest/4.")
_LONGEST = flags.DEFINE_integer("max_length", None, "Assumed longest response; unset = the limit.")
_LIVE = flags.DEFINE_integer("live", 0, "Sequences a host decodes, for rollout.num_slots.", 0)
_IMAGES = flags.DEFINE_integer("images", None, "Assumed images of a prompt; unset = 1.", 0)
_IMAGE_SIZE = flags.DEFINE_string(
    "image_size", "", "Assumed HEIGHTxWIDTH of each in pixels; empty = the largest square allowed."
)
_PRESSURE = flags.DEFINE_bool("pressure", True, "Rehearse length pressure where the run has it.")
_COMPILE = flags.DEFINE_bool("compile", True, "Compile the programs; else only times are told.")
_HLO = flags.DEFINE_bool("hlo", False, "Tell where the instructions' bytes and time go.")
_SEARCH = flags.DEFINE_bool("search", False, "Look for the fastest settings that fit.")


def main() -> None:
    """Rehearses, prints, writes, and exits with an error if something does not fit."""
    if _SEARCH.value and not _COMPILE.value:
        raise command.UsageError("--search compiles what it finds: leave out --nocompile")
    for flag in (_JSON, _MARKDOWN):
        if flag.value:
            files.check_file(flag.value, flag=f"--{flag.name}", overwrite=_OVERWRITE.value)
    if _TOPOLOGY.value != "local":
        # Nothing runs here: programs are compiled for absent devices.
        os.environ["JAX_PLATFORMS"] = "cpu"
        if _TOPOLOGY.value.split(":")[0] in ("h100", "h200", "a100-80g", "rtx4090"):
            os.environ["JAX_PLATFORMS"] = "cpu,cuda"
            os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
            os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    from experiments.rehearsal import case as cases
    from experiments.rehearsal import programs, search, topologies, tower
    from experiments.rehearsal import report as reports

    config = command.config_value(_CONFIG)
    topology = topologies.topology(_TOPOLOGY.value)
    print(topologies.shown(topology), flush=True)
    case = cases.build(
        config,
        topology,
        mean_length=_MEAN.value,
        max_length=_LONGEST.value,
        live=_LIVE.value,
        images=_IMAGES.value,
        image_size=tower.image_size(_IMAGE_SIZE.value),
    )
    print(f"{cases.whole_host(case)}; attention {case.rule.logprobs.how.attention}", flush=True)

    def say(line):
        print(line, flush=True)

    if _COMPILE.value:
        report = reports.rehearse(case, pressure=_PRESSURE.value, say=say)
        report["advice"] = search.advice(case, report)
    else:
        report = reports.times(case, programs.programs(case, pressure=_PRESSURE.value))
    if _SEARCH.value:
        report["search"] = search.search(case, report, say=say)
    print(reports.text(report))
    if _HLO.value and _COMPILE.value:
        print(reports.instructions(report))
    for flag, content in (  # A flag cannot be the key of a dict.
        (_JSON, json.dumps(report, indent=2, allow_nan=False) + "\n"),
        (_MARKDOWN, reports.text(report) + "\n"),
    ):
        if flag.value:
            files.write_new(flag.value, content, flag=f"--{flag.name}", overwrite=_OVERWRITE.value)
    if _SEARCH.value:
        print(search.text(report["search"]))
    if not report.get("fits", True):
        raise SystemExit(search.refusal(report))


if __name__ == "__main__":
    sys.exit(command.call(main, required=("config", "topology")))
