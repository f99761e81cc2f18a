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
    parked,
    state_bytes,
    weights_bytes,
)
from experiments.rehearsal.rows import abstract_rows
from luspo_jax import config as configuration
from luspo_jax import update
from luspo_jax.length import laboratory
from luspo_jax.models import decoder
from luspo_jax.rollout import handover, slots
from luspo_jax.rollout.sampling import rollout_key
from luspo_jax.run import param_bytes
from luspo_jax.sharding import MESH_AXES, Layout, same_order
from luspo_jax.types import TokenBatch, TrainBatch


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
        leaves, treedef = jax.tree.flatten(case.state.params)
        axes = jax.tree.leaves(
            decoder.param_axes(case.model), is_leaf=lambda node: isinstance(node, tuple)
        )
        kinds = jax.tree.leaves(decoder.abstract_params(case.model, dtype))
        made = [
            jax.ShapeDtypeStruct(x.shape, kind.dtype, sharding=again.sharding(names))
            for x, kind, names in zip(leaves, kinds, axes, strict=True)
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
    static = {"config": case.model, "dtype": engine.dtype, "layout": engine.layout}

    def prefill():
        a = arrays(room)
        return slots.prefill.lower(
            a["params"],
            a["tokens"],
            a["lengths"],
            a["images"],
            attention=engine.attention,
            experts=engine.experts,
            record=engine.record_experts,
            vision_attention=engine.vision_attention,
            **static,
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
            a["params"], a["slots"], jnp.int32(1), jnp.int32(1), sampling=engine.sampling,
            chunk_length=engine.chunk_length, experts=engine.experts,
            record=engine.record_experts, **static,
        )  # fmt: skip

    steps = decoding(case, engine, prompts, group_size)
    one_step = costs.decode_step(case.model, count, room, part, width)
    chunk = engine.chunk_length
    prefills = -(-prompts // P)
    prefilling = costs.prefill(case.model, P, T, part, width)
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
    """Returns abstract inputs of the rollout's programs."""
    model, dtype, layout = case.model, engine.dtype, engine.layout
    key = jax.eval_shape(functools.partial(rollout_key, 0, 0))
    params = case.on_host(decoder.abstract_params(model, dtype), decoder.param_axes(model))
    static = {"config": model, "dtype": dtype, "layout": layout}
    held = jax.eval_shape(
        functools.partial(slots.empty_slots, num_slots=count, length=room, **static), key
    )
    tokens = jax.ShapeDtypeStruct((prompts, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((prompts,), jnp.int32)
    pool, _ = jax.eval_shape(
        functools.partial(
            slots.prefill, attention=engine.attention, experts=engine.experts, **static
        ),
        params, tokens, lengths,
    )  # fmt: skip
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
    sizes, objective = case.sizes, case.rule.objective
    found = []
    if scores_old(case):
        rows, parts, work = scored_rows(case)
        # With images, minibatch by minibatch.
        times = case.config.train.num_minibatches if case.lengths.images else 1
        found.append(
            Program(
                "log-probs",
                lambda: update.score_rows.lower(
                    case.state.params,
                    rows,
                    scoring=case.rule.scoring,
                    num_microbatches=parts,
                    record_experts=case.model.num_experts > 0,
                ),
                work,
                times * (1 + bool(objective.kl_coef)),
                state_bytes(case, "opt_state", "ref_params", "marked_params"),
                lambda: device_bytes((case.state.params, rows)),
            )
        )
    batch, work = train_batch(case)
    number = case.on(jax.ShapeDtypeStruct((), jnp.float32))
    found.append(
        Program(
            "update",
            lambda: update.update_step.lower(case.state, batch, number, number, rule=case.rule),
            work,
            sizes.updates_per_step,
            {},
            lambda: device_bytes((case.state, batch)),
        )
    )
    return found


def scores_old(case: Case) -> bool:
    """Whether a step computes old log-probs before it updates."""
    objective = case.rule.objective
    return (
        case.sizes.updates_per_step > 1
        or objective.top_entropy_quantile < 1
        or objective.kl_coef > 0
    )


def scored_rows(case: Case) -> tuple[TokenBatch, int, Work]:
    """Returns (rows, num_microbatches, work) of the pass that computes log-probs of a step.

    With images it covers one minibatch.
    """
    sizes = case.sizes
    images, responses = case.lengths.images, sizes.responses_per_step
    responses = sizes.responses_per_minibatch if images else responses
    rows, used, micro = abstract_rows(case, responses, "sampler")
    parts = 1 if case.config.train.packing else responses // sizes.responses_per_microbatch
    part, width, scoring = case.train_parts, case.width, case.rule.scoring
    work = costs.forward(case.model, micro, part, width) + costs.scoring(
        case.model, micro, part, width, scoring.head_chunk_tokens, gradient=False
    )
    work = (work + _tower(case, responses, gradient=False)) * used
    ids = costs.recorded_bytes(case.model) * micro.tokens
    # One micro-batch at a time, every device gets the expert ids of all rows, for its host.
    work += Work(0, 0, ids * used * (1 - 1 / part.batch))
    return update.abstract_rows(case.on(rows), scoring.layout), parts, work


def train_batch(case: Case) -> tuple[TrainBatch, Work]:
    """Returns (batch, work) of one optimizer step."""
    scoring, objective = case.rule.scoring, case.rule.objective
    several = case.sizes.updates_per_step > 1
    ranked = objective.top_entropy_quantile < 1
    recorded = ("sampler", "old") if scores_old(case) else ("sampler",)
    rows, used, micro = abstract_rows(case, case.sizes.responses_per_minibatch, *recorded)
    B, T = rows.tokens_BT.shape
    numbers_BT = jax.ShapeDtypeStruct((B, T), jnp.float32)
    batch = TrainBatch(
        rows=rows,
        advantages_B=jax.ShapeDtypeStruct((B,), jnp.float32),
        group_ids_B=jax.ShapeDtypeStruct((B,), jnp.int32),
        old_logprobs_BT=numbers_BT if several or ranked else None,
        old_entropy_BT=numbers_BT if ranked else None,
        ref_logprobs_BT=numbers_BT if objective.kl_coef else None,
        sampler_logprobs_BT=numbers_BT,
    )
    work = costs.training(
        case.model, micro, case.train_parts, case.width,
        remat=scoring.remat, kernel=scoring.attention, chunk=scoring.head_chunk_tokens,
    )  # fmt: skip
    work += _tower(case, case.sizes.responses_per_minibatch, gradient=True)
    work = work * used + costs.optimizer(param_bytes(case.model, case.layouts[0], jnp.float32))
    return update.abstract_rows(case.on(batch), scoring.layout), work


def _tower(case, responses, *, gradient):
    """Returns the vision tower's part of a micro-batch of the first `responses`."""
    pictures, scoring = case.lengths.images, case.rule.scoring
    if pictures is None:
        return Work()
    args = (case.model.vision, cases.images_at_once(case, responses), pictures.slots,
            case.train_parts, case.width)  # fmt: skip
    frozen = scoring.freeze_vision or not gradient
    return tower.training(
        *args, frozen=frozen, remat=scoring.remat, kernel=scoring.vision_attention
    )


# ---------------------------------------------------------------- length pressure


def _pressure(case):
    config, sizes = case.config, case.sizes
    settings = configuration.build_length(config)
    lab = laboratory.laboratory(
        settings,
        dataclasses.replace(
            case.rule.scoring,
            attention="reference",
            experts="reference",
            vision_attention="reference",
        ),
        case.rule.objective,
        max_response_length=config.rollout.max_response_length,
        rows_at_once=sizes.responses_per_microbatch,
    )
    groups = math.ceil(settings.share * sizes.prompts_per_step)
    B, T = groups * sizes.group_size, cases.row_length(case)
    zeros_BT = np.broadcast_to(np.int32(0), (B, T))  # of text: images are left out
    positions = np.broadcast_to(np.int32(0), (B, T, 3)) if case.model.vision else zeros_BT
    sampled = laboratory.Sampled(
        TokenBatch(zeros_BT, positions, zeros_BT, np.broadcast_to(False, (B, T))),
        np.zeros(B, np.float32), np.repeat(np.arange(groups), sizes.group_size),
        *[np.ones(B, bool)] * 3,
    )  # fmt: skip
    part, width = case.train_parts, case.width
    rows = Rows(B * T, B * T * T, B * T)  # the reference computes squares, or nearly
    chunk = case.rule.scoring.head_chunk_tokens
    args = (case.model, rows, part, width)
    # A gradient, a derivative along it (twice the forward), log-probs at the end: over both halves.
    work = costs.training(*args, remat=config.model.remat, kernel="reference", chunk=chunk)
    work += (costs.forward(*args) + costs.scoring(*args, chunk, gradient=False)) * 3
    beside = state_bytes(case, "opt_state", "ref_params")
    return Program(
        "pressure",
        lambda: laboratory.lower_measure(lab, case.state.params, sampled),
        work,
        1 / config.length.every,
        beside,
    )
