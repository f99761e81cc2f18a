"""Times an optimizer step of random weights, and sets it beside what the rehearsal predicts."""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.machine import shapes
from experiments.machine.rates import PRODUCT
from experiments.machine.records import Check, Predicted, Record, Training
from experiments.machine.running import Known
from experiments.machine.shapes import Shape, Sizes
from experiments.rehearsal import case as cases
from experiments.rehearsal import costs, counted, programs, report
from experiments.rehearsal.case import Case
from experiments.rehearsal.rows import microbatch, taken
from luspo_jax.learner.rows import token_rows
from luspo_jax.types import ResponseRows, TrainBatch

_REPEATS, _LEAST_S = 2, 1.0  # of timed updates: so many, and more until they took as long


def checks(device: jax.Device) -> Iterator[Check]:
    """Yields a check for each shape."""
    if device.platform == "cpu":
        yield Check("training", "the largest shape that fits in the time", 20.0, on_cpu)
        return
    for shape in (shapes.SMALL, shapes.LARGE):
        run = functools.partial(on_accelerator, shape)
        yield Check("training", f"{shape} or as many layers as fit", 60.0, run)


def on_cpu(known: Known) -> list[Record]:
    """Measures two rows of 256 tokens, or of what the shape holds."""
    shape = shapes.chosen(known, tokens=512)
    half = 8 if known.tiny else 128 if shape.large else 64
    return measured(known, shapes.case(known, shape, Sizes(2, half, half)), str(shape))


def on_accelerator(shape: Shape, known: Known) -> list[Record]:
    """Measures four rows of 2,048 tokens, recomputed layer by layer."""
    shape = shapes.fitted(known, shape, beside=0.2)
    made = shapes.case(known, shape, Sizes(4, 512, 1536), model__remat="full")
    return measured(known, made, str(shape))


def measured(known: Known, made: Case, name: str) -> list[Record]:
    """Measures a case's update; returns it, and predictions beside it."""
    before = _memory(known.device, "bytes_in_use")
    peak_before = _memory(known.device, "peak_bytes_in_use")
    seconds, compiled = timed(made)
    peak = _memory(known.device, "peak_bytes_in_use")
    found = _record(known, made, name, seconds)
    return [found, *_predicted(made, found, compiled, _grown(before, peak_before, peak))]


def timed(made: Case) -> tuple[float, Any]:
    """Returns (least seconds of a case's update, the compiled update)."""
    batch, rate = batch_of(made), jnp.float32(1e-6)
    state = shapes.random_state(made)
    compiled = made.programs.lower_update(state, batch, rate).compile()
    seconds = []
    state, _ = jax.block_until_ready(compiled(state, batch, rate, rate))
    while len(seconds) < _REPEATS or sum(seconds) < _LEAST_S:
        started = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch, rate, rate))
        seconds.append(time.perf_counter() - started)
    return min(seconds), compiled


def needed_bytes(compiled: Any) -> int:
    """Returns the bytes of a compiled program's arguments, results and temporaries, as a rehearsal
    counts them."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _memory(device, name):
    return (device.memory_stats() or {}).get(name)


def _grown(before, peak_before, peak):
    """(bytes that the step took at most; whether an earlier program took as many or more)."""
    if None in (before, peak):
        return None, False
    return peak - before, peak <= peak_before


def _record(known, made, name, seconds):
    plan = cases.plan(made, made.sizes.responses_per_minibatch)
    rows, used = microbatch(made, plan)
    args = (made.model, rows, made.train_parts, made.width)
    chunk = made.rule.logprobs.head_chunk_tokens
    once = costs.forward(*args) + costs.scoring(*args, chunk, gradient=False)
    how = made.rule.logprobs.how
    return Training(
        model=name,
        dtype=how.dtype,
        how=f"{how.attention}, remat {how.remat}",
        rows=plan.num_responses,
        length=plan.row_length,
        microbatches=used,
        seconds=seconds,
        flops=3 * once.flops * used,
        computed_flops=programs.train_batch(made)[1].flops,
        peak_rate=known.rate(PRODUCT, how.dtype),
    )


def _predicted(made, found, compiled, measured_bytes):
    work = programs.train_batch(made)[1]
    data = taken(made, cases.plan(made, made.sizes.responses_per_minibatch))
    by = counted.speeds(made.topology)
    expected = counted.count(compiled.as_text(), by, data, kernel_flops=work.flops).seconds
    least = report.rates(made.topology).roofline(work)
    size, hidden = measured_bytes
    note = "an earlier program took as much: at most this" if hidden else ""
    if size is None:
        note = "this platform does not tell its peak"
    what = f"update of {found.model}"
    return [
        Predicted(
            f"{what}, expected time", "s", expected, found.seconds,
            f"by the compiled instructions at the measured rates; at least {least:.3g} s",
        ),
        Predicted(f"{what}, peak memory", "bytes", needed_bytes(compiled), size, note),
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Prompt:
    tokens: np.ndarray
    images: tuple[Any, ...] = ()


def batch_of(made: Case) -> TrainBatch:
    """Returns random responses of the assumed lengths, laid out as the case's updates are."""
    count, lengths = made.sizes.responses_per_minibatch, made.lengths
    plan, rng = cases.plan(made, count), np.random.default_rng(0)
    abstract = programs.train_batch(made)[0].responses
    sizes = made.response_lengths[:count]
    vocabulary = made.model.vocab_size
    prompts = [_Prompt(x) for x in rng.integers(1, vocabulary, (count, lengths.prompt))]
    responses = [rng.integers(1, vocabulary, n) for n in sizes]
    masks = [np.ones(n, bool) for n in sizes]
    logprobs_BT = plan.place([np.full(n, -np.log(vocabulary), np.float32) for n in sizes])
    known = {
        "starts_B": plan.place_one(plan.firsts_B),
        "response_mask_BT": plan.place(masks),
        "advantages_B": plan.place_one(rng.normal(size=count).astype(np.float32)),
        "group_ids_B": plan.place_one(np.arange(count, dtype=np.int32) // made.sizes.group_size),
    }
    for field in dataclasses.fields(ResponseRows):
        like = getattr(abstract, field.name)
        if like is not None and field.name not in known:
            of_tokens = field.name.endswith("_logprobs_BT")
            known[field.name] = logprobs_BT if of_tokens else np.zeros(like.shape, like.dtype)
    batch = TrainBatch(
        rows=token_rows(made.planner, plan, prompts, responses, masks),
        responses=ResponseRows(**known),
    )
    return jax.tree.map(jnp.asarray, batch)
