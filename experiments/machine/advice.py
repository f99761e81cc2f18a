"""What to set for a configuration on this machine, each with the measurement it rests on."""

import functools
import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command import UsageError
from experiments.machine import decoding, shapes, training
from experiments.machine.rates import PRODUCT, READING, best
from experiments.machine.records import Advised, Check, Predicted, Skipped
from experiments.machine.running import Known, out_of_memory
from experiments.machine.units import shown_bytes, shown_time
from experiments.rehearsal import case as cases
from experiments.rehearsal import costs, programs
from experiments.rehearsal.case import Case
from experiments.rehearsal.search import changed
from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import decoder
from luspo_jax.models.safetensors_folder import WeightsError
from luspo_jax.ops import attention
from luspo_jax.run.memory import state_memory
from luspo_jax.sharding import MeshError

_NEAR = 0.1  # a setting that much faster is no reason to change it: others' load makes as much
_SHARE = 1 / 3  # of the measured rates that a program is expected to reach
_REMAT = ("none", "dots", "attention", "full")  # the more it recomputes, the later


def checks(device: jax.Device) -> Iterator[Check]:
    """Yields the checks behind each advice."""
    del device
    yield Check("advice", "whether the run fits", 3.0, whole)
    yield Check("advice", "attention", 10.0, attentions)
    yield Check("advice", "micro-batches", 20.0, microbatches)
    yield Check("advice", "recomputation", 15.0, recomputation)
    yield Check("advice", "sequences and pages", 20.0, slots)


def built(known: Known) -> Case:
    """Returns the configuration on the measured device, or on as many as its mesh takes.

    Raises:
      Skipped: its meshes do not fit the devices that there are.
    """
    one = shapes.topology(known)
    try:
        return cases.build(known.config, one)
    except MeshError:
        raise Skipped(
            f"{known.config_name} takes more devices than the one that is measured: "
            "experiments.rehearse tells of those"
        ) from None
    except (ConfigError, UsageError, WeightsError, OSError) as error:
        raise Skipped(f"{known.config_name}: {' '.join(str(error).split())}") from None


def _state_bytes(made):
    found = state_memory(made.model, made.layouts[0], made.adapter)
    return sum(found.values())


def _room(made):
    return made.topology.chip.usable


def whole(known: Known) -> list[Advised]:
    """Tells whether weights, moments and gradients fit on a device at all."""
    made = built(known)
    needed, room = _state_bytes(made), _room(made)
    parts = state_memory(made.model, made.layouts[0], made.adapter)
    told = ", ".join(f"{name} {shown_bytes(size)}" for name, size in parts.items())
    reason = f"{told}: {shown_bytes(needed)} of {shown_bytes(room)}, counted"
    if needed <= room:
        return [Advised("model.path", made.config.model.path, made.config.model.path, reason)]
    reason += (
        ": take more devices, an adapter (lora.rank) or a smaller model; experiments.rehearse "
        "finds machines that it fits"
    )
    return [Advised("model.path", made.config.model.path, None, reason)]


def _fitting(known):
    """The case, if its train state fits.

    Raises:
      Skipped: it does not.
    """
    made = built(known)
    if _state_bytes(made) > _room(made):
        raise Skipped("the train state does not fit on this device")
    return made


# ---------------------------------------------------------------- attention


def attentions(known: Known) -> list[Advised]:
    """Times one row through each implementation that fits, forward and backward."""
    made = built(known)
    how, packed = made.rule.logprobs.how, bool(made.config.train.packing)
    length = made.planner.pack_length or made.planner.longest
    # Squares of more positions than this take too long.
    pair = 3.5 * 4 * made.model.num_heads * made.model.head_dim
    most = math.sqrt(2 * known.rate(PRODUCT, how.dtype) * _SHARE / pair)
    measured = min(length, max(64, int(most) // 64 * 64))
    seconds = {}
    for name in attention.IMPLEMENTATIONS:
        try:
            attention.resolve(
                name, platform=known.device.platform, packed=packed, head_dim=made.model.head_dim,
                dtype=how.dtype,
                second_derivatives=False,
            )  # fmt: skip
        except ValueError:
            continue
        if known.left > 10 or not seconds:
            seconds[name] = _timed_attention(made, name, measured)
    fastest = min(seconds, key=seconds.get)
    now = made.config.model.attention
    value = now if how.attention == fastest else fastest
    told = ", ".join(f"{name} {shown_time(s)}" for name, s in seconds.items())
    short = "" if measured == length else f" of {length:,}"
    alone = ", the only one here" if len(seconds) == 1 else ""
    reason = f"a row of {measured:,}{short} tokens, forward and backward: {told}{alone}"
    reason += f"; {now!r} is {how.attention}" if now == "auto" else ""
    return [Advised("model.attention", now, value, f"{reason}; measured")]


def _timed_attention(made, name, length):
    how, model = made.rule.logprobs.how, made.model
    rng = np.random.default_rng(0)
    shapes_ = [(1, length, n, model.head_dim) for n in (model.num_heads, *[model.num_kv_heads] * 2)]
    arrays = [jnp.asarray(rng.normal(size=shape), how.dtype) for shape in shapes_]
    segments_BT = jnp.ones((1, length), jnp.int32)

    @jax.jit
    def step(*arrays):
        def total(*arrays):
            out = attention.attention(*arrays, segment_ids_BT=segments_BT, implementation=name)
            return jnp.sum(out.astype(jnp.float32))

        return jax.grad(total, argnums=(0, 1, 2))(*arrays)

    return best(step, *arrays, repeats=2)


# ---------------------------------------------------------------- training


def microbatches(known: Known) -> list[Advised | Predicted]:
    """Times the configuration's own update in micro-batches of several sizes."""
    made = _fitting(known)
    field, options = _options(made)
    now = functools.reduce(getattr, field.split("."), made.config)
    if known.tiny:
        options = options[:1]
    work = programs.train_batch(made)[1]
    about = work.flops / (_SHARE * made.topology.chip.flops)
    if made.lengths.images or made.model.num_experts:
        raise Skipped("images and experts are not timed here: experiments.rehearse --search")
    if 4 * about > known.left / 3:
        return [_largest_that_fits(known, made, field, now, options, about)]
    seconds, over, took = {}, [], 0.0
    for value in options:
        if seconds and known.left / 3 < took:
            break
        started = time.monotonic()
        other = changed(made, {field: value})
        if estimated_bytes(other) > _room(made):
            over.append(value)
            continue
        try:
            seconds[value] = training.timed(other)[0]
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            over.append(value)
        took = time.monotonic() - started
    if not seconds:
        return [_largest_that_fits(known, made, field, now, options, about)]
    fastest = min(seconds, key=seconds.get)
    if now in seconds and seconds[now] <= (1 + _NEAR) * seconds[fastest]:
        fastest = now
    told = ", ".join(f"{value:,}: {shown_time(s)}" for value, s in seconds.items())
    reason = f"an update of {made.sizes.responses_per_minibatch} responses by {field}: {told}"
    reason += f"; {', '.join(map(str, over))} would not fit" if over else ""
    found = [Advised(field, now, fastest, f"{reason}; measured")]
    if now in seconds:
        expected = costs_expected(made, work)
        found.append(
            Predicted(f"update of {known.config_name}, expected time", "s", expected, seconds[now])
        )
    return found


def costs_expected(made: Case, work: costs.Work) -> float:
    """Returns the seconds that a rehearsal expects of some work."""
    from experiments.rehearsal import report

    return report.rates(made.topology, report.EXPECTED).roofline(work)


def _options(made):
    """(field that sizes micro-batches, values to try, the present one first)."""
    train = made.config.train
    if train.packing:
        unit = made.planner.pack_length
        values = [train.microbatch_tokens, 2 * train.microbatch_tokens]
        if train.microbatch_tokens >= 2 * unit:
            values.append(train.microbatch_tokens // 2)
        return "train.microbatch_tokens", values
    rows = made.sizes.responses_per_minibatch
    tried = (train.num_microbatches, 1, 2, 4, 8)
    return "train.num_microbatches", [n for n in dict.fromkeys(tried) if rows % n == 0]


def estimated_bytes(made):
    """Returns the bytes of an update, by the run's own estimate."""
    from luspo_jax.run.memory import pass_memory

    tokens = made.sizes.rows_per_microbatch * made.sizes.row_length
    passing = pass_memory(made.config, made.model, made.layouts[0], tokens)
    return _state_bytes(made) + sum(passing.values())


def _largest_that_fits(known, made, field, now, options, about):
    """The advice on micro-batches that are not timed: the largest of which the estimate fits."""
    del known
    sizes = {value: estimated_bytes(changed(made, {field: value})) for value in options}
    fit = [value for value, size in sizes.items() if size <= _room(made)]
    order = max if made.config.train.packing else min
    told = ", ".join(f"{value:,}: {shown_bytes(size)}" for value, size in sizes.items())
    reason = (
        f"bytes by {field}: {told}; of {shown_bytes(_room(made))}; estimated, because an update "
        f"takes about {about:.0f} s here"
    )
    if not fit:
        return Advised(field, now, None, f"{reason}: rows must be shorter or more parts")
    return Advised(field, now, order(fit), reason)


def recomputation(known: Known) -> list[Advised]:
    """Compiles the update with more and more recomputation until it fits."""
    made = _fitting(known)
    now, told, value = made.config.model.remat, [], None
    for remat in _REMAT:
        if told and known.left < 15:
            raise Skipped(f"no time to compile with remat {remat}; {', '.join(told)}")
        other = changed(made, {"model.remat": remat})
        batch, _ = programs.train_batch(other)
        number = other.on(jax.ShapeDtypeStruct((), jnp.float32))
        lowered = other.programs.lower_update(other.state, batch, number)
        try:
            needed = training.needed_bytes(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            needed = math.inf
        told.append(f"{remat} {shown_bytes(needed) if math.isfinite(needed) else 'too much'}")
        if needed <= _room(made):
            value = remat
            break
    reason = f"an update takes {', '.join(told)} of {shown_bytes(_room(made))}; compiled, not run"
    if value is None:
        return [Advised("model.remat", now, None, f"{reason}: micro-batches must be smaller")]
    if _REMAT.index(now if now in _REMAT else "full") > _REMAT.index(value):
        reason += f"; {now!r} recomputes for nothing"
    return [Advised("model.remat", now, value, reason)]


# ---------------------------------------------------------------- rollout


def slots(known: Known) -> list[Advised]:
    """Times decode steps of the configuration's own model at several numbers of rows."""
    made = _fitting(known)
    engine, rollout = made.engine, made.config.rollout
    responses = made.responses()
    pages = engine.pages_of(engine.cache.gb * 1e9, responses)
    pool, longest = (pages - 1) * engine.page_tokens, engine.max_length
    mean = made.lengths.prompt + made.lengths.mean
    held = int(pool // mean)
    rates, how = {}, "estimated at the bound of bandwidth or products"
    tried = (8,) if known.tiny else (1, 8, 32, 128, 512, responses)
    counts = sorted({n for n in tried if n <= responses} or {responses})
    sampled = decoder.abstract_params(made.model, jnp.dtype(made.config.model.rollout_dtype))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sampled))
    context = min(int(mean), longest - engine.chunk_length - 1)
    adapted = made.adapter is not None and rollout.lora == "apart"
    few_bits = made.config.model.rollout_dtype == "int8"
    affordable = 40 * weights / known.rate(READING) < known.left / 8
    if affordable and weights < shapes.usable(known) / 2 and not (adapted or few_bits):
        how = "measured"
        params = shapes.random_tree(sampled)
        for rows in counts:
            if known.left < 5 and rates:
                break
            if rows * (context + 2 * engine.chunk_length) > pool:
                break
            one = decoding.of_case(
                known, made, params, known.config_name, rows=rows, context=max(1, context)
            )
            rates[rows] = one.tokens_per_second
    if not rates:
        rates = {n: n / _bound(made, known, n, context) for n in counts if n <= max(1, held)}
        how = "estimated at the bound of bandwidth or products"
    fastest = max(rates.values())
    enough = min(n for n, rate in rates.items() if rate >= 0.9 * fastest)
    told = ", ".join(f"{n:,}: {rate:,.0f}" for n, rate in rates.items())
    reason = f"tokens a second by rows of {context:,} tokens: {told}; {how}"
    value = rollout.num_slots if rollout.num_slots >= enough else enough
    use = f"{pool:,} tokens a device in pages of {engine.page_tokens}"
    return [
        Advised("rollout.num_slots", rollout.num_slots, value, reason),
        Advised(
            "rollout.cache_gb", rollout.cache_gb, rollout.cache_gb,
            f"{use}, {shown_bytes(pages * engine.page_bytes)}: {held:,} responses of "
            f"{mean:,.0f} tokens or {int(pool // longest):,} of the longest, {longest:,}; a step "
            f"has {responses:,}"
            + ("" if held >= min(responses, value) else ": FEWER THAN num_slots, others wait"),
        ),
    ]  # fmt: skip


def _bound(made, known, rows, context):
    """Seconds of a decode step at its bound."""
    kernels = costs.Kernels(jnp.dtype(made.config.model.rollout_dtype).itemsize)
    work = costs.decode_step(
        made.model, costs.Step(rows, rows, rows * context), costs.Parts(),
        made.engine.dtype.itemsize, kernels,
    )  # fmt: skip
    return max(work.memory / known.rate(READING), work.flops / made.topology.chip.flops)
