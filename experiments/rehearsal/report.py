"""Checks every program against the chip's memory; estimates step time and live sequences."""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.rehearsal import case as cases
from experiments.rehearsal import costs, counted, programs, resident, slices, topologies, tower
from experiments.rehearsal.case import Case
from experiments.rehearsal.programs import Compiled, Program
from experiments.rehearsal.topologies import Topology
from luspo_jax.learner.state import OFFLOADS
from luspo_jax.run import adapters

# Shares of the peak that a run is expected to reach, for the estimate beside the roofline of what
# is not compiled, and of the sampler's programs, whose kernels read what pages hold: MaxText
# publishes 45 % of a v5p's compute for pre-training, verl 31 to 40 % of an H100's for RL updates;
# decoding libraries reach 60 to 80 % of the memory bandwidth. What a training step's compiled
# programs are expected to reach is counted (`counted`).
EXPECTED = {"compute": 0.4, "memory": 0.65, "interconnect": 0.65}
_HOST_LINK = 25e9  # bytes per second between a device and its host's memory, for offloading


def rehearse(
    case: Case, *, pressure: bool = True, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Compiles every program and reports JSON values.

    Args:
      case: the case to rehearse.
      pressure: whether to compile the program of length pressure too, if the run measures it.
      say: called when each program starts and ends.
    """
    started = time.perf_counter()
    found, records = programs.programs(case, pressure=pressure), {}
    for number, program in enumerate(found, 1):
        say(f"[{number}/{len(found)}] {program.name} …")
        made = programs.compiled(program)
        records[program.name] = record(case.topology, program, made)
        say(f"    {line(records[program.name])}")
    left_out = bool(case.config.length.every) and not pressure
    told = times(case, found, records)
    if case.topology.slices > 1:
        told["across_slices"] = slices.crossed(case, records)
    return told | {
        "programs": records,
        "not_rehearsed": ["pressure"] if left_out else [],
        "capacity": capacity(case, records),
        "fits": all(one["fits"] for one in records.values()),
        "seconds": time.perf_counter() - started,
        "host_peak_bytes": _peak_bytes(),
    }


def times(
    case: Case, found: list[Program], records: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Reports what no compiler is asked for, as JSON values; `found` are the case's programs, and
    `records` what is known of those that were compiled."""
    return {
        "topology": _machine(case.topology),
        "meshes": cases.whole_host(case),
        "attention": _attention(case),
        "parameters": case.num_params,
        "adapter": _adapter(case),
        "checkpoint_bytes": case.checkpoint_bytes,
        "lengths": {"prompt": case.lengths.prompt, "mean": case.lengths.mean,
                    "longest": case.lengths.longest, **tower.described(case.lengths.images)},
        "batch": str(case.sizes),
        "pace": {"overlap": case.config.rollout.overlap, "max_age": case.config.rollout.max_age,
                 "apart": case.apart},
        "step": step(case, found, records or {}),
        **({"across_slices": slices.crossed(case, {})} if case.topology.slices > 1 else {}),
    }  # fmt: skip


def _adapter(case):
    """What is trained in place of the weights; None where they are."""
    made = case.adapter
    if made is None:
        return None
    return {
        "rank": made.rank, "numbers": adapters.num_trained(case.model, made), "base": made.base,
        "state_bytes": resident.state_bytes(case, "base", "params", "opt_state"),
        "rollout": case.config.rollout.lora,
    }  # fmt: skip


def _attention(case):
    """Implementations by what they work on."""
    sampling = case.engine.how
    found = {"training": case.rule.logprobs.how.attention, "prefill": sampling.attention,
             "decoding": sampling.paged_attention}  # fmt: skip
    return found | ({"images": sampling.vision_attention} if case.model.vision else {})


def record(topology: Topology, program: Program, made: Compiled) -> dict[str, Any]:
    """Returns a program's bytes on a device against the chip's, and its roofline."""
    resident = dict(program.resident)
    unread = program.given() - made.arguments if program.given and not made.error else 0
    if unread > 0:
        resident["inputs that it does not read"] = unread
    peak = made.bytes + sum(resident.values())
    over = max(0.0, peak - topology.chip.usable, made.over_by)
    taken = rates(topology).seconds(program.work)
    bound = max(taken, key=taken.get)
    expected = _counted(topology, program, made)
    return {
        "fits": over == 0,
        "bytes": {"arguments": made.arguments, "outputs": made.outputs, "aliased": made.aliased,
                  "temporaries": made.temporaries, "beside": resident},
        "peak_bytes": peak,
        "usable_bytes": topology.chip.usable,
        "over_bytes": over,
        "compiler_error": made.error,
        "flops": program.work.flops,
        "memory_bytes": program.work.memory,
        "link_bytes": program.work.links,
        **(slices.record(made.crossing) if topology.slices > 1 else {}),
        "seconds": taken,
        "roofline_s": taken[bound],
        "counted": expected,
        # Of programs that only move, the compiler may move less than was counted by hand.
        "share": min(1.0, taken[bound] / expected["seconds"]) if expected else None,
        "bound": bound,
        "calls_a_step": program.calls,
        "lower_s": made.lower_seconds,
        "compile_s": made.compile_seconds,
    }  # fmt: skip


def _counted(topology, program, made):
    """Returns what a compiled program's instructions tell; None if they are not counted."""
    if program.taken is None or not made.text:
        return None
    by = counted.speeds(topology)
    found = counted.count(made.text, by, program.taken, kernel_flops=program.work.flops)
    return counted.described(found, program.updates)


def rates(topology: Topology, share: dict[str, float] | None = None) -> costs.Rates:
    """Returns peak rates of a device, or shares of them."""
    share = share or dict.fromkeys(EXPECTED, 1.0)
    chip = topology.chip
    return costs.Rates(
        chip.flops * share["compute"],
        chip.bandwidth * share["memory"],
        topology.links * share["interconnect"],
    )


def step(case: Case, found: list[Program], records: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the seconds of a rollout step by phase, at the roofline and as expected.

    Expected is the roofline over the share that a compiled program's instructions tell, where they
    were counted; else `EXPECTED`. Rewards, host work and waiting for the slowest host are left out.
    """
    peak, expected = rates(case.topology), rates(case.topology, EXPECTED)
    phases: dict[str, list[float]] = {}
    held_out = [0.0, 0.0]
    shares = {name: one["share"] for name, one in (records or {}).items() if one["share"]}
    for program in found:
        both = [seconds(case, program, by) for by in (peak, expected)]
        if program.name in shares:
            both[1] = both[0] / shares[program.name]
        if program.name.endswith(programs.HELD_OUT):
            held_out = [a + b for a, b in zip(held_out, both, strict=True)]
        else:
            phases[program.name] = both
    moved = sum(resident.state_bytes(case, *OFFLOADS[case.config.train.offload]).values())
    if moved:
        phases["offload and back"] = [2 * moved / _HOST_LINK] * 2
    if case.topology.slices > 1:
        phases["gradients across slices"] = [
            slices.gradient_seconds(case),
            slices.gradient_seconds(case, EXPECTED["interconnect"]),
        ]
    total = [_total(case, {name: both[i] for name, both in phases.items()}) for i in (0, 1)]
    play, tokens = case.sampled, sum(case.response_lengths)
    return {
        "phases": {name: {"roofline_s": a, "expected_s": b} for name, (a, b) in phases.items()},
        "roofline_s": total[0],
        "expected_s": total[1],
        "held_out_evaluation": {"roofline_s": held_out[0], "expected_s": held_out[1]},
        "expected_shares_of_peak": EXPECTED,
        "counted_shares": shares,
        "response_tokens": tokens,
        "expected_tokens_a_second": tokens / total[1],
        "decode_steps": play.steps,
        "slot_utilisation": play.utilisation,
        "preemptions": play.preemptions,
        "recomputed_tokens": play.recomputed,
        "continued_tokens": play.continued,
        "rollouts_played": play.rollouts,
        "age": play.age,
    }


_SAMPLING = ("prefill", "copy pages", "decode chunk")


def _total(case, phases):
    """Seconds of a step; where other devices sample, of the longer of rollout and training."""
    if not case.apart:
        return sum(phases.values())
    sampling = sum(phases[name] for name in _SAMPLING)
    between = sum(s for name, s in phases.items() if name.startswith(("hand-over", "offload")))
    return between + max(sampling, sum(phases.values()) - sampling - between)


def seconds(case: Case, program: Program, by: costs.Rates) -> float:
    """Returns seconds of all calls in a step: prefills and decode steps as they were played.

    Where hosts wait for each other, the slowest decides.
    """
    kind = program.name.removesuffix(programs.HELD_OUT)
    held_out = kind != program.name
    engine, play = (case.held_out, case.tested) if held_out else (case.engine, case.sampled)

    def decoding(part):
        return sum(by.roofline(programs.chunk_work(case, engine, chunk)) for chunk in part.chunks)

    def reading(part):
        return sum(
            one.calls
            * by.roofline(
                programs.prefill_work(case, engine, costs.Runs(one.rows, one.length, one.before))
            )
            for one in part.prefills
        )

    taken = {"decode chunk": decoding, "prefill": reading}.get(kind)
    if taken is None:
        return program.calls * by.roofline(program.work)
    return sum(max(map(taken, hosts)) for hosts in play.stretches) / play.rollouts


def capacity(case: Case, records: dict[str, Any]) -> dict[str, Any]:
    """Returns what the pool of pages holds, and how much memory is left beside it while decoding.

    Tokens are of one device along "batch", in the pages of all that share its positions.
    """
    engine, play, parts = case.engine, case.sampled, case.engine.row_multiple
    tokens = (play.pages - 1) * engine.page_tokens
    longest = case.config.data.max_prompt_length + case.lengths.longest
    decode = records["decode chunk"]
    return {
        "pages_a_device": play.pages,
        "page_tokens": engine.page_tokens,
        "pool_bytes": resident.pool_bytes(case),
        "pool_tokens": tokens,
        "token_bytes": engine.page_bytes / engine.page_size,
        "rows_a_host": play.chunks[0].rows,
        "full_length_responses_a_host": tokens // longest * parts,
        "peak_share": play.peak / (parts * (play.pages - 1)),
        "free_bytes_a_device": decode["usable_bytes"] - decode["peak_bytes"],
    }


def _machine(topology):
    chip = topology.chip
    return {
        "name": topology.name, "devices": len(topology.devices), "hosts": topology.hosts,
        "slices": topology.slices,
        "memory_bytes": chip.memory, "reserve_bytes": chip.reserve, "flops": chip.flops,
        "memory_bandwidth": chip.bandwidth, "link_bandwidth": topology.links,
        "source": chip.source,
    }  # fmt: skip


def _peak_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# ---------------------------------------------------------------- as text


def line(one: dict[str, Any]) -> str:
    """Formats a program's verdict in a line."""
    verdict = "fits" if one["fits"] else f"DOES NOT FIT, {_gb(one['over_bytes'])} GB over"
    return (
        f"{_gb(one['peak_bytes'])} of {_gb(one['usable_bytes'])} GB: {verdict}; "
        f"{_time(one['roofline_s'])} by {one['bound']}; compiled in {one['compile_s']:.1f} s"
    )


def table(report: dict[str, Any]) -> str:
    """Formats the programs as a Markdown table: bytes of one device, and one call."""
    rows = [
        "| program | arguments | temporaries | results | beside it | peak GB | fits "
        "| TFLOP | memory GB | links GB | roofline | bound | calls a step | compile s |",
        "|---|" + "---:|" * 5 + "---|" + "---:|" * 4 + "---|" + "---:|" * 2,
    ]
    for name, one in report["programs"].items():
        size = one["bytes"]
        new = max(0, size["outputs"] - size["aliased"])
        beside = sum(size["beside"].values())
        numbers = (size["arguments"], size["temporaries"], new, beside, one["peak_bytes"])
        verdict = "yes" if one["fits"] else f"NO: {_gb(one['over_bytes'])} over"
        rows.append(
            f"| {name} | "
            + " | ".join(map(_gb, numbers))
            + f" | {verdict} | {one['flops'] / 1e12:.3g} | {one['memory_bytes'] / 1e9:.4g} | "
            f"{one['link_bytes'] / 1e9:.3g} | {_time(one['roofline_s'])} | {one['bound']} | "
            f"{one['calls_a_step']:.4g} | {one['compile_s']:.1f} |"
        )
    return "\n".join(rows)


_SIZES = ("devices", "hosts", "slices")


def text(report: dict[str, Any]) -> str:
    """Formats the whole report in Markdown; without programs, if none was compiled."""
    compiled = "programs" in report
    usable = report["topology"]["memory_bytes"] - report["topology"]["reserve_bytes"]
    return "\n".join(
        [
            f"**{report['topology']['name']}**, "
            f"{topologies.machine(*(report['topology'][n] for n in _SIZES))}; "
            f"{report['meshes']}; attention "
            f"{report['attention']['training']} (training), {report['attention']['prefill']} "
            f"(prompts{_of_images(report)}), {report['attention']['decoding']} (decoding).",
            "",
            f"{report['parameters']:,} parameters; {report['batch']}. Assumed: prompts of "
            f"{report['lengths']['prompt']:,} tokens, responses of "
            f"{report['lengths']['mean']:,.0f} on average"
            f" and up to {report['lengths']['longest']:,}{_pictures(report)}. A device has "
            f"{usable / 1e9:.2f} GB to use.",
            "",
            *_trained(report),
            *([table(report), ""] if compiled else []),
            *_times(report["step"]),
            "",
            *slices.lines(report),
            *_pace(report),
            *(_memory(report) if compiled else ["No program was compiled."]),
        ]
    )


def _trained(report):
    """Describes an adapter, and what a checkpoint holds."""
    one = report["adapter"]
    if one is None:
        return []
    sizes = {name: _gb(size) for name, size in one["state_bytes"].items()}
    reads = "them as they are" if one["rollout"] == "apart" else "a merged copy"
    return [
        f"An adapter of rank {one['rank']}, {one['numbers']:,} numbers, is trained beside frozen "
        f"weights in {one['base']}: a device holds {sizes['base']} GB of these, and "
        f"{sizes['params']} GB of the adapter with {sizes['opt_state']} GB of moments; the sampler "
        f"reads {reads}. A checkpoint has {_gb(report['checkpoint_bytes'])} GB.",
        "",
    ]


def instructions(report: dict[str, Any]) -> str:
    """Formats where the bytes and the time of the counted programs go, in Markdown."""
    found = [
        line
        for name, one in report["programs"].items()
        if one["counted"]
        for line in counted.lines(name, one["counted"])
    ]
    return "\n".join(found)


def _times(taken):
    """Describes the phases of a step."""
    phases = [
        f"| {name} | {_time(both['roofline_s'])} | {_time(both['expected_s'])} |"
        for name, both in taken["phases"].items()
    ]
    return [
        "| phase of a step | roofline | expected |",
        "|---|---:|---:|",
        *phases,
        f"| **step** | **{_time(taken['roofline_s'])}** | **{_time(taken['expected_s'])}** |",
        "",
        *_shares(taken),
        f"Decoding takes {taken['decode_steps']:,.0f} steps at {taken['slot_utilisation']:.0%} of "
        f"the rows; a step makes {taken['response_tokens']:,} tokens, "
        f"{taken['expected_tokens_a_second']:,.0f} a second as expected. A held-out evaluation "
        f"takes {_time(taken['held_out_evaluation']['expected_s'])} more.",
    ]


def _shares(taken):
    """Says which expectations are counted from instructions, and which are assumed."""
    counted_ones = ", ".join(f"{name} {x:.0%}" for name, x in taken["counted_shares"].items())
    assumed = taken["expected_shares_of_peak"]
    rest = (
        f"{assumed['compute']:.0%} of the compute and {assumed['memory']:.0%} of the bandwidths "
        "are assumed"
    )
    if not counted_ones:
        return [f"Expected: {rest}.", ""]
    return [
        f"Expected: a share of the roofline counted from the compiled instructions for "
        f"{counted_ones}; for the others {rest}.",
        "",
    ]


def _memory(report):
    """Describes the pool of pages, and what the rehearsal took."""
    live, taken = report["capacity"], report["step"]
    return [
        f"The pool of a device has {live['pages_a_device']:,} pages of "
        f"{live['page_tokens']} tokens, {_gb(live['pool_bytes'])} GB: "
        f"{live['pool_tokens']:,} tokens, or {live['full_length_responses_a_host']:,} of the "
        f"longest responses on a host, which decodes up to {live['rows_a_host']:,} responses "
        f"at a time. At most {live['peak_share']:.0%} of the pages are in use; "
        f"{taken['preemptions']:,.0f} responses are preempted and "
        f"{taken['recomputed_tokens']:,.0f} tokens read again.",
        "",
        f"Rehearsed in {report['seconds']:.0f} s, with at most "
        f"{report['host_peak_bytes'] / 1e9:.1f} GB of host memory.",
        *[f"Not rehearsed: {name}." for name in report["not_rehearsed"]],
    ]


def _pace(report):
    """Describes partial rollouts, and devices that only sample."""
    taken, pace, lines = report["step"], report["pace"], []
    if pace["overlap"]:
        lines += [
            f"Partial rollouts, {pace['overlap']:,} prompts in flight beyond those of a step, "
            f"{pace['max_age']} steps at most: the mean of {taken['rollouts_played']:.1f} steps "
            "like any other, of all hosts, which wait for the slowest at every look. A host reads "
            f"{taken['continued_tokens']:,.0f} tokens of earlier steps again; groups are "
            f"{taken['age']:.2f} steps old on average when they are trained on.",
            "",
        ]
    if pace["apart"]:
        lines += [
            f"{pace['apart']} device(s) only sample, beside training: of rollout and training, a "
            "step takes the longer.",
            "",
        ]
    return lines


def _of_images(report):
    return f"), {report['attention']['images']} (images" if "images" in report["attention"] else ""


def _pictures(report):
    """Describes the assumed images."""
    if "images" not in report["lengths"]:
        return ""
    one = report["lengths"]["images"]
    return (
        f"; a prompt's tokens hold {one['a_prompt']} image(s) of {one['height']} × {one['width']} "
        f"pixels, {one['tokens']:,} tokens each, in {one['slots']:,} slots of the tower"
    )


def _gb(size):
    return f"{size / 1e9:.2f}" if size >= 1e8 else f"{size / 1e9:.3g}"


def _time(seconds):
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"
