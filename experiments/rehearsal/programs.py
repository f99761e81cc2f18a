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
from jax.sharding import Mesh

from experiments.rehearsal import adapted, costs, counted, crossing, tower
from experiments.rehearsal import case as cases
from experiments.rehearsal.case import Case
from experiments.rehearsal.costs import Rows, Work
from experiments.rehearsal.crossing import Transfer
from experiments.rehearsal.playing import Played
from experiments.rehearsal.resident import (
    device_bytes,
    kept,
    kernels,
    parked,
    state_bytes,
    weights_bytes,
)
from experiments.rehearsal.rows import images, microbatch, taken
from luspo_jax.learner import rows as training_rows
from luspo_jax.learner.programs import LogprobPass
from luspo_jax.learner.rows import abstract_token_rows
from luspo_jax.length import laboratory
from luspo_jax.models import decoder
from luspo_jax.ops.pages import pages_axes
from luspo_jax.rollout import handover
from luspo_jax.rollout import programs as rollout_programs
from luspo_jax.rollout.sampling import seed_key
from luspo_jax.run.build import rescorer
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
      taken: what its data decide; None: its time is not counted from its instructions.
      updates: bytes on a device of what it updates as an optimiser.
    """

    name: str
    lower: Callable[[], Any]
    work: Work
    calls: float
    resident: Mapping[str, float]
    given: Callable[[], float] | None = None
    taken: counted.Taken | None = None
    updates: float = 0.0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Compiler output for a program; bytes are per device.

    Attributes:
      crossing: what it sends between slices, the largest first.
      over_by: bytes by which the compiler refused it; 0 if it did not.
      error: its message in that case.
      text: its optimised HLO.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    on_host: int
    lower_seconds: float
    compile_seconds: float
    crossing: tuple[Transfer, ...] = ()
    over_by: float = 0.0
    error: str = ""
    text: str = dataclasses.field(default="", repr=False)

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
        made = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, there = memory_named(str(error))
        return Compiled(
            0, 0, 0, int(needed), 0, lowered_at - started, time.perf_counter() - lowered_at,
            over_by=max(1.0, needed - there), error=str(error).splitlines()[0][:300],
        )  # fmt: skip
    memory, compiled_at = made.memory_analysis(), time.perf_counter()
    slices, text = crossing.slices_of(made), made.as_text()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        on_host=memory.host_temp_size_in_bytes,
        lower_seconds=lowered_at - started,
        compile_seconds=compiled_at - lowered_at,
        crossing=tuple(crossing.transfers(text, slices)) if len(set(slices)) > 1 else (),
        text=text,
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
    there = cases.device_of(case.topology)
    return [dataclasses.replace(one, lower=there(one.lower)) for one in found]


# ---------------------------------------------------------------- hand-over


def _hand_over(case):
    train, rollout = case.layouts
    dtype = jnp.dtype(case.config.model.rollout_dtype)
    if case.apart:
        return [_hand_over_apart(case, dtype)]
    if not case.hands_over:
        return []
    args = {"config": case.model, "layout": rollout, "dtype": dtype}
    beside = parked(case, "params", "base")
    own, cast = _handed_bytes(case, dtype)
    work = costs.hand_over(own, cast, weights_bytes(case))

    def lower():
        return handover.lower_rollout_params(case.policy(), **args)

    if train is None or same_order(train.sharding(()), rollout):
        return [Program("hand-over", lower, work, 1, beside, taken=counted.Taken())]
    # Two programs: the cast, and jax's own move to devices in another order.

    def move():
        grid = rollout.mesh.devices.reshape(train.mesh.devices.shape)
        again = Layout(Mesh(grid, MESH_AXES), "train")
        leaves, treedef = jax.tree.flatten(decoder.abstract_params(case.model, dtype))
        axes = jax.tree.leaves(
            decoder.param_axes(case.model, dtype), is_leaf=lambda node: type(node) is tuple
        )
        made = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=again.sharding(names))
            for x, names in zip(leaves, axes, strict=True)
        ]
        return handover.lower_rollout_params(jax.tree.unflatten(treedef, made), **args)

    only_cast = Work(0, own + cast, 0)
    beside_cast = {**beside, **state_bytes(case, "params", "base")}
    return [
        Program("hand-over cast", lower, only_cast, 1, beside),
        Program("hand-over", move, work, 1, beside_cast),
    ]


def _hand_over_apart(case, dtype):
    """Returns the cast, made where the weights lie; jax then moves each part to other devices."""
    own, cast = _handed_bytes(case, dtype)
    wanted = weights_bytes(case)
    return Program(
        "hand-over",
        lambda: handover.lower_rollout_params(
            case.policy(), config=case.model, layout=None, dtype=dtype
        ),
        Work(0, own + cast + wanted, wanted),
        1,
        kept(case, "params", "base"),
    )


def _handed_bytes(case, dtype):
    """(bytes on a device of the trainer's weights, adapter included; of the same cast to dtype)."""
    own = sum(state_bytes(case, "params", "base").values())
    return own, param_bytes(case.model, case.layouts[0], dtype)


# ---------------------------------------------------------------- rollout


def _rollout(case):
    tested = _sampler(case, case.held_out, case.tested, HELD_OUT)
    return [
        *_sampler(case, case.engine, case.sampled, ""),
        *[p for p in tested if p.name.startswith("decode chunk")],
    ]


HELD_OUT = " (held out)"


def _sampler(case, engine, play, suffix):
    """Returns prefill, copy pages and decode of one host."""
    # What the sampler reads of the trainer's is among its arguments.
    read = () if case.hands_over else ("params", "base")
    beside = parked(case, *read)
    copying = {**parked(case), "rollout weights": weights_bytes(case)}
    arrays = functools.cache(functools.partial(rollout_arrays, case, engine, play))

    def prefill():
        a = arrays()
        return rollout_programs.prefill.lower(
            a["params"],
            a["pages"],
            *a["prefill"],
            a["images"],
            how=engine.how,
            record=engine.record_experts,
        )

    def copy_pages():
        a = arrays()
        return rollout_programs.copy_pages.lower(a["pages"], *a["copy pages"], layout=engine.layout)

    def decode():
        a = arrays()
        return rollout_programs.decode_chunk.lower(
            a["params"], a["pages"], a["decode chunk"], how=engine.how, sampling=engine.sampling,
            chunk_length=engine.chunk_length, record=engine.record_experts,
        )  # fmt: skip

    R, T = play.inputs["prefill"][1][0].shape
    copied = play.inputs["copy pages"][0].shape[0] // engine.row_multiple
    one_step = sum((chunk_work(case, engine, one) for one in play.chunks), Work()) * (
        1 / sum(one.steps for one in play.chunks)
    )
    return [
        Program(
            f"prefill{suffix}",
            prefill,
            prefill_work(case, engine, costs.Runs(R, T)),
            sum(one.calls for one in play.prefills) / play.shares,
            beside,
        ),
        Program(
            f"copy pages{suffix}",
            copy_pages,
            costs.copy_pages(copied, engine.page_bytes),
            play.copies / copied,
            copying,
        ),
        Program(
            f"decode chunk{suffix}",
            decode,
            one_step * engine.chunk_length,
            play.steps / engine.chunk_length,
            beside,
        ),
    ]


def prefill_work(case: Case, engine: Any, runs: costs.Runs) -> Work:
    """Returns the work of one prefill; with images, one prompt a row."""
    part, width = case.rollout_parts, engine.dtype.itemsize
    work = costs.prefill(case.model, runs, part, width, kernels(case))
    work += _apart(case, engine, runs.rows * runs.length / part.batch)
    if pictures := case.lengths.images:
        images = case.prefilled_images(runs.rows, engine.row_multiple)
        whole = dataclasses.replace(part, length=1)
        work += tower.forward(case.model.vision, images, pictures.slots, whole, width)
    return work


def chunk_work(case: Case, engine: Any, chunk: Any) -> Work:
    """Returns the work of the decode steps of a chunk."""
    step = costs.Step(chunk.rows, chunk.live, chunk.entries / chunk.steps)
    one = costs.decode_step(
        case.model, step, case.rollout_parts, engine.dtype.itemsize, kernels(case)
    )
    return (one + _apart(case, engine, chunk.rows / case.rollout_parts.batch)) * chunk.steps


def _apart(case, engine, tokens):
    """Work of a sampler that reads an adapter beside the frozen weights, over so many tokens."""
    made = engine.how.adapter
    if made is None:
        return Work()
    return adapted.forward(case.model, made, tokens, case.rollout_parts, engine.dtype.itemsize)


def rollout_arrays(case: Case, engine: Any, play: Played) -> dict[str, Any]:
    """Abstract inputs of the rollout's programs."""
    model, how = case.model, engine.how
    dtype = jnp.dtype(case.config.model.rollout_dtype)
    axes = decoder.param_axes(model, dtype)
    if case.hands_over:
        params = case.on_host(decoder.abstract_params(model, dtype), axes)
    else:
        params = case.policy()
    pages = jax.eval_shape(
        functools.partial(
            decoder.empty_pages,
            how,
            play.pages * engine.pools,
            engine.page_size,
            engine.cache_dtype,
        )
    )
    _, tokens = play.inputs["prefill"]
    key = jax.eval_shape(functools.partial(seed_key, 0))
    return {
        **play.inputs,
        "params": params,
        "pages": case.on_host(pages, pages_axes(engine.cache_dtype)),
        "decode chunk": dataclasses.replace(play.inputs["decode chunk"], key=key),
        "images": _prompt_images(case, engine, *tokens[0].shape),
    }


def _prompt_images(case, engine, prompts, length):
    """Returns the images of a prefill and their positions; None without images."""
    pictures = case.lengths.images
    if pictures is None:
        return None
    images = case.prefilled_images(prompts, engine.row_multiple)
    return rollout_programs.PromptImages(
        tower.shapes(images, pictures, case.model.vision),
        jax.ShapeDtypeStruct((prompts, length), jnp.int32),
        jax.ShapeDtypeStruct((prompts, length, 3), jnp.int32),
    )


# ---------------------------------------------------------------- training


def _training(case):
    found, programs, state = [], case.programs, case.state
    for number, (name, one) in enumerate(programs.passes(stale=case.stale).items()):
        rows, times, work, how = pass_rows(case, one)
        # With an adapter, a reference that is not copied is the frozen weights alone.
        gone = {"params": "ref_params", "ref_params": "params"}[one.policy]
        found.append(
            Program(
                "log-probs" if number == 0 else f"log-probs ({name})",
                functools.partial(one.lower, state, rows),
                work,
                times,
                state_bytes(case, "opt_state", gone, "marked_params"),
                functools.partial(device_bytes, (case.policy(one.policy), rows)),
                how,
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
            taken(case, cases.plan(case, case.sizes.responses_per_minibatch)),
            case.trained_bytes,
        )
    )
    return found


def pass_rows(case: Case, one: LogprobPass) -> tuple[TokenRows, int, Work, counted.Taken]:
    """(rows, calls, work of one, what its data decide) of a pass over the responses of a step.

    With images, a call reads the responses of a minibatch.
    """
    sizes, pictured = case.sizes, case.lengths.images is not None
    spared = one.policy == "params" and case.programs.spares_first(stale=case.stale)
    start = sizes.responses_per_minibatch if spared else 0
    left = sizes.responses_per_step - start
    responses = sizes.responses_per_minibatch if pictured else left
    plan = cases.plan(case, responses, start)
    work = _pass_work(case, plan)
    if one.record_experts:
        # Micro-batch by micro-batch every device gets the experts of all rows, for its host.
        micro, used = microbatch(case, plan)
        ids = costs.recorded_bytes(case.model) * micro.tokens
        work += Work(0, 0, ids * used * (1 - 1 / case.train_parts.batch))
    rows = abstract_token_rows(case.planner, plan, ("sampler",), images(case, plan))
    rows = training_rows.abstract(case.on(rows), one.logprobs.how.layout)
    return rows, left // responses, work, taken(case, plan)


def _pass_work(case, plan):
    """The work of a pass without gradients over the rows of a plan."""
    micro, used = microbatch(case, plan)
    part, width, chunk = case.train_parts, case.width, case.rule.logprobs.head_chunk_tokens
    work = costs.forward(case.model, micro, part, width)
    work += costs.scoring(case.model, micro, part, width, chunk, gradient=False)
    if made := case.adapter:
        work += adapted.forward(case.model, made, micro.tokens / part.tokens, part, width)
    return (work + _tower(case, len(plan.lengths_B), gradient=False)) * used


def train_batch(case: Case) -> tuple[TrainBatch, Work]:
    """(batch, work) of one optimizer step."""
    rule, responses = case.rule.logprobs, case.sizes.responses_per_minibatch
    plan = cases.plan(case, responses)
    micro, used = microbatch(case, plan)
    batch = case.programs.abstract_batch(case.planner, plan, images(case, plan), stale=case.stale)
    work = costs.training(
        case.model, micro, case.train_parts, case.width,
        remat=rule.how.remat, kernel=rule.how.attention, chunk=rule.head_chunk_tokens,
        frozen=case.adapter is not None,
    )  # fmt: skip
    if made := case.adapter:
        part, remat = case.train_parts, rule.how.remat
        work += adapted.training(case.model, made, micro, part, case.width, remat=remat)
    work += _tower(case, responses, gradient=True)
    refers = case.rule.objective.kl_coef > 0 and batch.responses.ref_logprobs_BT is None
    referred = _pass_work(case, plan) if refers else Work()
    own = case.trained_bytes
    # Micro-batches add up on each copy; copies are summed at the end, slices apart (`slices`).
    copies = case.train_parts.copies // case.topology.slices
    work = work * used + referred + costs.summed(own, copies) + costs.optimizer(own)
    return training_rows.abstract(case.on(batch), rule.how.layout), work


def _tower(case, responses, *, gradient):
    """The vision tower's part of a micro-batch of the first `responses`."""
    pictures, rule = case.lengths.images, case.rule.logprobs
    if pictures is None:
        return Work()
    args = (case.model.vision, cases.images_at_once(case, responses), pictures.slots,
            case.train_parts, case.width)  # fmt: skip
    how = rule.how
    frozen = rule.freeze_vision or not gradient or not (how.adapter is None or how.adapter.vision)
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
        rescorer=functools.partial(rescorer, config),
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
        lambda: laboratory.lower_measure(
            lab, case.state.params, case.on(half), getattr(case.state, "base", None)
        ),
        work,
        1 / config.length.every,
        beside,
    )
