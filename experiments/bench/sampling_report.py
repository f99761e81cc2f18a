"""Tables of the sampler's benchmark: rates, paired ratios, and what the cache held and was read."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench import cache_traffic
from experiments.bench.report import paired
from experiments.bench.sampling_sides import Engine, Sampled
from experiments.bench.sampling_work import Work


def table(taken: Mapping[str, Sequence[Sampled]]) -> str:
    """Formats the medians of every side, one line each."""
    lines = [f"{'median':13}{'tokens':>10}{'seconds':>10}{'tokens/s':>10}{'cores':>8}"]
    for side, turns in taken.items():
        tokens, seconds, rate, cores = (
            statistics.median(getattr(turn, name) for turn in turns)
            for name in ("tokens", "seconds", "rate", "cores")
        )
        lines.append(f"{side:13}{tokens:10,.0f}{seconds:10.2f}{rate:10.1f}{cores:8.2f}")
    return "\n".join(lines)


def ratio(
    taken: Mapping[str, Sequence[Sampled]], ours: str, other: str
) -> tuple[str, dict[str, Any]]:
    """Returns tokens a second of `ours` over those of `other`, in words and as numbers."""
    numbers = paired([turn.rate for turn in taken[ours]], [turn.rate for turn in taken[other]])
    line = (
        f"tokens/s of {ours} over {other} (time per token of {other} over {ours}): median "
        f"{numbers['median']:.3f} (min {numbers['min']:.3f}, max {numbers['max']:.3f})"
    )
    if numbers["ci95_low"] is not None:
        line += (
            f", geometric mean {numbers['geometric_mean']:.3f}, 95 % interval "
            f"[{numbers['ci95_low']:.3f}, {numbers['ci95_high']:.3f}]"
        )
    return line, numbers


def cache(work: Work, side: Engine, sampled: Sampled) -> tuple[str, dict[str, Any]]:
    """Returns what a rollout of ours held and read, in words and as numbers."""
    stats = sampled.stats
    entry = cache_traffic.entry_bytes(side.model, side.engine.dtype.itemsize)
    page = stats.page_size
    prompts = [len(tokens) for tokens in work.prompts]
    read = cache_traffic.traffic(
        prompts, sampled.lengths, page=page, steps=stats.decode_steps, entry=entry
    )
    lines = [
        f"  {stats.decode_steps:,} decode steps, {sampled.tokens / stats.decode_steps:.1f} tokens "
        f"each; {stats.prefill_tokens:,} prompt tokens in {stats.prefill_calls} prefills",
        f"  a step: {read.live / 1e6:.3f} MB live ({read.live_once / 1e6:.3f} with prompts once)",
        *_pages(work, stats, sampled, read, entry, prompts),
    ]
    return "\n".join(lines), {
        "bytes_a_step": dataclasses.asdict(read),
        "entry_bytes": entry,
        "stats": dataclasses.asdict(stats),
    }


def _pages(work, stats, sampled, read, entry, prompts):
    held = stats.pages_peak * stats.page_size * entry
    lines = [
        f"  in whole pages of {stats.page_size}: {read.pages / 1e6:.3f} MB = "
        f"{read.pages / read.live:.3f} × live; a prompt's full pages once: "
        f"{read.pages_once / 1e6:.3f} MB = {read.pages_once / read.live_once:.3f} × live once",
        f"  pages in use: {cache_traffic.timeline(stats.pages_in_use)}; peak {stats.pages_peak} of "
        f"{stats.pages_total} = {held / 1e6:.1f} MB; {stats.preemptions} preemptions",
    ]
    if not stats.preemptions and sampled.lengths and work.responses == len(sampled.lengths):
        peak = cache_traffic.live_peak(prompts, sampled.lengths) * entry
        pages = cache_traffic.live_pages_peak(prompts, sampled.lengths, stats.page_size)
        lines.append(
            f"  peak if all responses begin together: {peak / 1e6:.1f} MB live in {pages} pages; "
            f"in use {held / peak:.3f} × the live bytes, {stats.pages_peak / pages:.3f} × the pages"
        )
    return lines


def record(taken: Mapping[str, Sequence[Sampled]]) -> dict[str, list[dict[str, Any]]]:
    """Returns all turns as JSON values."""
    return {
        side: [
            {
                "seconds": turn.seconds,
                "tokens": turn.tokens,
                "tokens_per_s": turn.rate,
                "cores": turn.cores,
                "lengths": turn.lengths,
            }
            for turn in turns
        ]
        for side, turns in taken.items()
    }
