"""Times a decode step of the sampler's own program against the bytes that it must move."""

import functools
import time
from collections.abc import Iterator

import jax
import numpy as np

from experiments.machine import shapes
from experiments.machine.rates import PRODUCT, READING
from experiments.machine.records import Check, Decoding, Skipped
from experiments.machine.running import Known
from experiments.machine.shapes import Shape, Sizes
from experiments.rehearsal import costs
from experiments.rehearsal.case import Case
from luspo_jax.models import decoder
from luspo_jax.ops.paged_attention import Places
from luspo_jax.rollout import programs
from luspo_jax.rollout.sampling import seed_key

_REPEATS = 3


def checks(device: jax.Device) -> Iterator[Check]:
    """Yields a check for each shape and number of rows."""
    if device.platform == "cpu":
        for rows in (1, 4, 16, 64):
            run = functools.partial(on_cpu, rows)
            yield Check("decoding", f"{rows} rows of 256 tokens", 12.0, run)
        return
    for shape in (shapes.SMALL, shapes.LARGE):
        for rows in (1, 8, 64, 256):
            run = functools.partial(on_accelerator, shape, rows)
            yield Check("decoding", f"{shape}, {rows} rows of 2048 tokens", 15.0, run)


def on_cpu(rows: int, known: Known) -> list[Decoding]:
    """Measures the largest shape that is trained on a CPU in time."""
    shape = shapes.chosen(known, tokens=512)
    if known.tiny and rows > 1:
        raise Skipped("of tiny sizes one number of rows is enough")
    return [measured(known, shape, rows, 16 if known.tiny else 256 if shape.large else 64)]


def on_accelerator(shape: Shape, rows: int, known: Known) -> list[Decoding]:
    """Measures a shape, if its weights and pages fit."""
    model = shapes.model(shape)
    needed = 2 * shapes.parameters(shape) + rows * 2200 * costs.kv_bytes(model, 2)
    if needed > shapes.usable(known):
        raise Skipped(
            f"weights and pages take {needed / 1e9:.1f} GB, and {shapes.usable(known) / 1e9:.1f} "
            "are free"
        )
    return [measured(known, shape, rows, 2048)]


def measured(known: Known, shape: Shape, rows: int, context: int) -> Decoding:
    """Measures a step of so many rows with so many tokens each."""
    made = shapes.case(known, shape, Sizes(max(2, rows), context, 48))
    params = shapes.random_tree(
        decoder.abstract_params(made.model, made.config.model.rollout_dtype)
    )
    return of_case(known, made, params, str(shape), rows=rows, context=context)


def of_case(
    known: Known, made: Case, params: object, name: str, *, rows: int, context: int
) -> Decoding:
    """Measures a step of a case's engine.

    Args:
      known: has the rates.
      made: the case.
      params: the sampler's weights.
      name: of the model.
      rows: that are decoded together.
      context: tokens that each has; with a chunk more it must not pass the engine's longest.
    """
    engine = made.engine
    steps = min(engine.chunk_length, engine.max_length - context - 1)
    each = -(-(context + steps + 1) // engine.page_size)
    pages = programs.empty_pages(
        num_pages=1 + rows * each,
        page_size=engine.page_size,
        how=engine.how,
        dtype=engine.cache_dtype.name,
    )
    inputs = _rows(engine, rows, each, context, steps)
    how = {
        "how": engine.how,
        "sampling": engine.sampling,
        "chunk_length": engine.chunk_length,
        "record": engine.record_experts,
    }
    seconds = []
    for turn in range(_REPEATS + 1):  # the first compiles
        started = time.perf_counter()
        pages, chunk = jax.block_until_ready(programs.decode_chunk(params, pages, inputs, **how))
        if turn:
            seconds.append((time.perf_counter() - started) / int(chunk.steps))
    dtype = str(made.config.model.rollout_dtype)
    needed = costs.decode_step(
        made.model,
        costs.Step(rows, rows, rows * (context + steps / 2)),
        costs.Parts(),
        engine.dtype.itemsize,
        costs.Kernels(np.dtype(jax.numpy.dtype(dtype)).itemsize),
    )
    return Decoding(
        model=name,
        dtype=dtype,
        rows=rows,
        context=context,
        seconds=min(seconds),
        bytes=needed.memory,
        bandwidth_s=needed.memory / known.rate(READING),
        compute_s=needed.flops / known.rate(PRODUCT, engine.dtype.name),
    )


def _rows(engine, rows, each, context, steps):
    """Rows whose pages are their own, as those of different prompts are."""
    tables_BM = np.zeros((rows, engine.table_width), np.int32)
    tables_BM[:, :each] = 1 + np.arange(rows * each).reshape(rows, each)
    ids_B, zeros_B = np.arange(rows, dtype=np.uint32), np.zeros(rows, np.int32)
    return programs.Rows(
        tokens_B=zeros_B + 1,
        places=Places(tables_BM, zeros_B + context - 1, np.ones(rows, bool)),
        offsets_B=zeros_B,
        limits_B=zeros_B + engine.max_length,
        drawn_B=np.zeros(rows, bool),
        steps_B=ids_B * 0,
        prompt_ids_B=ids_B,
        sample_ids_B=ids_B * 0,
        key=seed_key(0),
        max_steps=np.int32(steps),
        leave_at=np.int32(rows),
    )
