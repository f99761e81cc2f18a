"""Every program of a run, at the shapes of a case, ready to lower and compile."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.rehearsal import case as cases
from experiments.rehearsal import costs, tower
from experiments.rehearsal.case import Case
from experiments.rehearsal.costs import Rows, Work
from experiments.rehearsal.resident import (
    cache_bytes,
    device_bytes,
    kernels,
    parked,
    state_bytes,
    weights_bytes,
)
from experiments.rehearsal.rows import images, microbatch
from luspo_jax.learner import rows as training_rows
from luspo_jax.learner.rows import abstract_token_rows
from luspo_jax.length import laboratory
from luspo_jax.models import decoder
from luspo_jax.rollout import handover, slots
from luspo_jax.rollout.sampling import rollout_key
from luspo_jax.run.memory import param_bytes
from luspo_jax.run.settings import section
from luspo_jax.sharding import MESH_AXES, Layout, same_order
from luspo_jax.types import TokenRows, TrainBatch


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
      name: in reports.
      lower: returns the lowered program; allocates nothing.
      work: of one device in one call.
      calls: in one rollout step.
      resident: bytes on a device while it runs that are not its arguments, by name.
      given: bytes on a device of all its arguments, read or not; None if it reads all.
    """

    name: str
    lower: Callable[[], Any]
    work: Work
    calls: float
    resident: Mapping[str, float]
    given: Callable[[], float] | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Compiler output for a program; bytes are per device.

    Attributes:
      over_by: bytes by which the compiler refused it; 0 if it did not.
      error: its message in that case.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    on_host: int
    lower_seconds: float
    compile_seconds: float
    over_by: float = 0.0
    error: str = ""

    @property
    def bytes(self) -> int:
        """Returns the most that arguments, results and temporaries take together."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def compiled(program: Program) -> Compiled:
    """Lowers and compiles; an oversized program is reported, not raised."""
    started = time.perf_counter()
    lowered = program.lower()
    lowered_at = time.perf_counter()
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, there = memory_named(str(error))
        return Compiled(
            0, 0, 0, int(needed), 0, lowered_at - started, time.perf_counter() - lowered_at,
            over_by=max(1.0, needed - there), error=str(error).splitlines()[0][:300],
        )  # fmt: skip
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        on_host=memory.host_temp_size_in_bytes,
        lower_seconds=lowered_at - started,
        compile_seconds=time.perf_counter() - lowered_at,
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_named(message: str) -> tuple[float, float]:
    """Returns (bytes needed, bytes available) of an out-of-memory message; (1, 0) if not named."""
    found = re.findall(r"([\d.]+)([KMGT])i?B?\b", message)
    sizes = [float(number) * _UNITS[unit] for number, unit in found[:2]]
    return tuple(sizes) if len(sizes) == 2 else (1.0, 0.0)


def programs(case: Case, *, pressure: bool = True) -> list[Program]:
    """Lists the programs of a run in the order of a step; `pressure` if the run measures it."""
    found = [*_hand_over(case), *_rollout(case), *_training(case)]
    if case.config.length.every and pressure:
        found.append(_pressure(case))
    return found


# ---------------------------------------------------------------- hand-over


def _hand_over(case):
    train, rollout = case.layouts
    dtype = jnp.dtype(case.config.model.rollout_dtype)
    if train is None and dtype == jnp.float32:
        return []  # the sampler reads the master weights
    args = {"config": case.model, "layout": rollout, "dtype": dtype}
    beside = parked(case, "params")
    own, cast = (param_bytes(case.model, train, kind) for kind in (jnp.float32, dtype))
    work = costs.hand_over(own, cast, weights_bytes(case))

    def lower():
        return handover.lower_rollout_params(case.state.params, **args)

    if train is None or same_order(train.sharding(()), rollout):
        return [Program("hand-over", lower, work, 1, beside)]
    # Two programs: the cast, and jax's own move to devices in another order.

    def move():
        grid = rollout.mesh.devices.reshape(train.mesh.devices.shape)
        again = Layout(Mesh(grid, MESH_AXES), "train")
        leaves, treedef = jax.tree.flatten(decoder.abstract_params(case.model, dtype))
        axes = jax.tree.leaves(
            decoder.param_axes(case.model, dtype), is_leaf=lambda node: isinstance(node, tuple)
        )
        made = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=again.sharding(names))
            for x, names in zip(leaves, axes, strict=True)
        ]
        return handover.lower_rollout_params(jax.tree.unflatten(treedef, made), **args)

    only_cast = Work(0, own + cast, 0)
    beside_cast = {**beside, **state_bytes(case, "params")}
    return [
        Program("hand-over cast", lower, only_cast, 1, beside),
        Program("hand-over", move, work, 1, beside_cast),
    ]


# ---------------------------------------------------------------- rollout


def _rollout(case):
    config = case.config
    sampled = _sampler(
        case,
        case.engine,
        case.share(config.rollout.prompts_per_step),
        config.rollout.group_size,
        "",
    )
    tested = _sampler(
        case, case.held_out, case.share(config.eval.num_problems), config.eval.num_samples,
        " (held out)",
    )  # fmt: skip
    return [*sampled, *[p for p in tested if not p.name.startswith(("prefill", "fill"))]]


def _sampler(case, engine, prompts, group_size, suffix):
    """Returns prefill, fill, grow and decode of one host."""
    count = case.slots(engine, prompts * group_size)
    rooms = case.rooms(engine)
    room, before = rooms[-1], rooms[-2] if len(rooms) > 1 else rooms[-1]
    P, T = case.prompt_batch(engine, prompts, group_size)
    width = engine.dtype.itemsize
    part = case.rollout_parts
    kept, on_rollout = parked(case), weights_bytes(case)
    pool = P * T * costs.kv_bytes(case.model, width) / (part.batch * part.tensor)
    held = {**kept, "pool of prompts": pool}
    cache = cache_bytes(case, count, room, width)
    arrays = functools.cache(functools.partial(rollout_arrays, case, engine, count, P, T))

    def prefill():
        a = arrays(room)
        return slots.prefill.lower(
            a["params"],
            a["tokens"],
            a["lengths"],
            a["images"],
            how=engine.how,
            record=engine.record_experts,
        )

    def fill():
        a = arrays(room)
        return slots.fill.lower(a["slots"], a["pool"], a["refill"], a["key"], layout=engine.layout)

    def grow():
        keys = arrays(before)["slots"].cache.keys_LBKSH
        return slots.grow_array.lower(keys, length=room, layout=engine.layout)

    def decode():
        a = arrays(room)
        return slots.decode_chunk.lower(
            a["params"], a["slots"], jnp.int32(1), jnp.int32(1), how=engine.how,
            sampling=engine.sampling, chunk_length=engine.chunk_length,
            record=engine.record_experts,
        )  # fmt: skip

    steps = decoding(case, engine, prompts, group_size)
    one_step = costs.decode_step(case.model, count, room, part, width, kernels(case))
    chunk = engine.chunk_length
    prefills = -(-prompts // P)
    prefilling = costs.prefill(case.model, P, T, part, width, kernels(case))
    if pictures := case.lengths.images:
        images = case.prefilled_images(P, engine.row_multiple)
        whole = dataclasses.replace(part, length=1)
        prefilling += tower.forward(case.model.vision, images, pictures.slots, whole, width)
    beside_fill = {**kept, "rollout weights": on_rollout}
    found = [
        Program(
            f"prefill{suffix}", prefill, prefilling, prefills,
            {**held, "KV cache": cache},
        ),
        Program(
            f"fill{suffix}", fill, costs.fill(case.model, P, T, count, part, width),
            max(1, math.ceil(prompts * group_size / count)), beside_fill,
        ),
    ]  # fmt: skip
    if before < room:
        # Keys, and then values; beside the values lie the keys that have grown.
        growth = Work(0, (cache + cache_bytes(case, count, before, width)) / 2, 0)
        beside = {**held, "rollout weights": on_rollout, "keys": cache / 2}
        found.append(Program(f"grow{suffix}", grow, growth, 2, beside))
    found.append(
        Program(
            f"decode chunk{suffix}",
            decode,
            one_step * chunk,
            steps.steps / chunk,
            held,
        )
    )
    return found


def decoding(case: Case, engine: Any, prompts: int, group_size: int) -> costs.Decoding:
    """Simulates the decode steps of one host for its share of the responses."""
    wanted = prompts * group_size
    lengths = costs.power_lengths(case.lengths.mean, case.lengths.longest, wanted)
    order = np.random.default_rng(0).permutation(lengths).tolist()
    return costs.decoding(
        order, case.lengths.prompt, case.slots(engine, wanted), case.rooms(engine)
    )


def rollout_arrays(
    case: Case, engine: Any, count: int, prompts: int, length: int, room: int
) -> dict[str, Any]:
    """Abstract inputs of the rollout's programs."""
    model, how = case.model, engine.how
    key = jax.eval_shape(functools.partial(rollout_key, 0, 0))
    dtype = jnp.dtype(case.config.model.rollout_dtype)
    axes = decoder.param_axes(model, dtype)
    params = case.on_host(decoder.abstract_params(model, dtype), axes)
    held = jax.eval_shape(
        functools.partial(slots.empty_slots, num_slots=count, length=room, how=how), key
    )
    tokens = jax.ShapeDtypeStruct((prompts, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((prompts,), jnp.int32)
    pool, _ = jax.eval_shape(functools.partial(slots.prefill, how=how), params, tokens, lengths)
    signed, unsigned = (jax.ShapeDtypeStruct((count,), kind) for kind in (jnp.int32, jnp.uint32))
    return {
        "params": params,
        "slots": case.on_host(held, slots.SLOTS_AXES),
        "pool": case.on_host(pool, slots.POOL_AXES),
        "refill": slots.Refill(*[signed] * 5, *[unsigned] * 2),
        "key": key,
        "tokens": tokens,
        "lengths": lengths,
        "images": _prompt_images(case, engine, prompts, length),
    }


def _prompt_images(case, engine, prompts, length):
    """Returns the images of a prefill and their positions; None without images."""
    pictures = case.lengths.images
    if pictures is None:
        return None
    images = case.prefilled_images(prompts, engine.row_multiple)
    return slots.PromptImages(
        tower.shapes(images, pictures, case.model.vision),
        jax.ShapeDtypeStruct((prompts, length), jnp.int32),
        jax.ShapeDtypeStruct((prompts, length, 3), jnp.int32),
    )


# ---------------------------------------------------------------- training


def _training(case):
    found, programs, state = [], case.programs, case.state
    for number, (name, one) in enumerate(programs.passes().items()):
        rows, times, work = pass_rows(case, one.record_experts)
        gone = {"params": "ref_params", "ref_params": "params"}[one.policy]
        found.append(
            Program(
                "log-probs" if number == 0 else f"log-probs ({name})",
                functools.partial(one.lower, state, rows),
                work,
                times,
                state_bytes(case, "opt_state", gone, "marked_params"),
                functools.partial(device_bytes, (getattr(state, one.policy), rows)),
            )
        )
    batch, work = train_batch(case)
    number = case.on(jax.ShapeDtypeStruct((), jnp.float32))
    found.append(
        Program(
            "update",
            lambda: programs.lower_update(state, batch, number),
            work,
            case.sizes.updates_per_step,
            {},
            lambda: device_bytes((state, batch)),
        )
    )
    return found


def pass_rows(case: Case, record_experts: bool) -> tuple[TokenRows, int, Work]:
    """(rows, calls, work of one) of a pass over the responses of a step.

    With images, a call reads the responses of a minibatch.
    """
    sizes, pictured = case.sizes, case.lengths.images is not None
    responses = sizes.responses_per_minibatch if pictured else sizes.responses_per_step
    plan = cases.plan(case, responses)
    micro, used = microbatch(case, plan)
    part, width, rule = case.train_parts, case.width, case.rule.logprobs
    work = costs.forward(case.model, micro, part, width) + costs.scoring(
        case.model, micro, part, width, rule.head_chunk_tokens, gradient=False
    )
    work = (work + _tower(case, responses, gradient=False)) * used
    if record_experts:
        # Micro-batch by micro-batch every device gets the experts of all rows, for its host.
        ids = costs.recorded_bytes(case.model) * micro.tokens
        work += Work(0, 0, ids * used * (1 - 1 / part.batch))
    rows = abstract_token_rows(case.planner, plan, ("sampler",), images(case, plan))
    times = case.config.train.num_minibatches if pictured else 1
    return training_rows.abstract(case.on(rows), rule.how.layout), times, work


def train_batch(case: Case) -> tuple[TrainBatch, Work]:
    """(batch, work) of one optimizer step."""
    rule, responses = case.rule.logprobs, case.sizes.responses_per_minibatch
    plan = cases.plan(case, responses)
    micro, used = microbatch(case, plan)
    batch = case.programs.abstract_batch(case.planner, plan, images(case, plan))
    work = costs.training(
        case.model, micro, case.train_parts, case.width,
        remat=rule.how.remat, kernel=rule.how.attention, chunk=rule.head_chunk_tokens,
    )  # fmt: skip
    work += _tower(case, responses, gradient=True)
    work = work * used + costs.optimizer(param_bytes(case.model, case.layouts[0], jnp.float32))
    return training_rows.abstract(case.on(batch), rule.how.layout), work


def _tower(case, responses, *, gradient):
    """The vision tower's part of a micro-batch of the first `responses`."""
    pictures, rule = case.lengths.images, case.rule.logprobs
    if pictures is None:
        return Work()
    args = (case.model.vision, cases.images_at_once(case, responses), pictures.slots,
            case.train_parts, case.width)  # fmt: skip
    frozen, how = rule.freeze_vision or not gradient, rule.how
    return tower.training(*args, frozen=frozen, remat=how.remat, kernel=how.vision_attention)


# ---------------------------------------------------------------- length pressure


def _pressure(case):
    config, sizes = case.config, case.sizes
    settings, rule = section(config, "length"), case.rule.logprobs
    lab = laboratory.laboratory(
        settings,
        dataclasses.replace(rule, how=rule.how.with_reference_kernels()),
        case.rule.objective,
        max_response_length=config.rollout.max_response_length,
        rows_at_once=sizes.responses_per_microbatch,
    )
    groups = math.ceil(settings.share * sizes.prompts_per_step)
    B, T = groups * sizes.group_size, cases.row_length(case)
    half = laboratory.abstract_half(lab, groups * (sizes.group_size // 2), T)  # images left out
    part, width = case.train_parts, case.width
    rows = Rows(B * T, B * T * T, B * T)  # the reference computes squares, or nearly
    chunk = rule.head_chunk_tokens
    args = (case.model, rows, part, width)
    # A gradient, a derivative along it (twice the forward), log-probs at the end: over both halves.
    work = costs.training(*args, remat=config.model.remat, kernel="reference", chunk=chunk)
    work += (costs.forward(*args) + costs.scoring(*args, chunk, gradient=False)) * 3
    beside = state_bytes(case, "opt_state", "ref_params")
    return Program(
        "pressure",
        lambda: laboratory.lower_measure(lab, case.state.params, case.on(half)),
        work,
        1 / config.length.every,
        beside,
    )
