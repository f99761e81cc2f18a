"""Rehearsals of runs that train an adapter: the state, what is counted, and what is compiled."""

import jax
import numpy as np
import pytest

from experiments.rehearsal import (
    adapted,
    costs,
    counted,
    programs,
    report,
    resident,
    topologies,
)
from experiments.rehearsal import case as cases
from experiments.rehearsal.costs import Parts, Rows
from luspo_jax.hosts.values import ConfigError
from luspo_jax.learner.state import initial_state, with_base, without_base
from luspo_jax.learner.step import update_step
from luspo_jax.models import decoder, low_rank, nf4
from tests.experiments.test_rehearse import (
    SMALL,
    WHOLE,
    gathered_rows,
    machine,
    tiny,
    tiny_experts,
)

LORA = {"lora__rank": 4, "model__remat": "full"}


def adapted_case(devices=1, **leaves):
    return cases.build(tiny(**SMALL, **LORA, **leaves), machine(devices), mean_length=12)


def real_state(case):
    """The train state of a run, as it begins."""
    how = case.rule.logprobs.how
    dtype = low_rank.float_type(how.adapter)
    weights = decoder.init_params(jax.random.key(0), case.model, dtype, layout=how.layout)
    axes = decoder.param_axes(case.model)
    base, trained = low_rank.begun(jax.random.key(1), weights, axes, how.adapter, how.layout)
    return with_base(initial_state(trained, case.rule), base)


@pytest.mark.parametrize(("base", "devices"), [("bfloat16", 1), ("int8", 1), ("nf4", 4)])
def test_the_state_is_that_of_a_run(base, devices):
    case = adapted_case(devices, lora__base=base)
    real = real_state(case)
    assert jax.tree.structure(case.state) == jax.tree.structure(real)
    for made, wanted in zip(jax.tree.leaves(case.state), jax.tree.leaves(real), strict=True):
        assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype)
        # Counts of steps lie where jax puts them.
        assert made.sharding.is_equivalent_to(wanted.sharding, made.ndim) or made.ndim == 0
    held = sum(resident.kept(case).values())
    bits = [
        (4 if x.dtype == "uint4" else 8 * x.dtype.itemsize) * x.addressable_shards[0].data.size
        for x in jax.tree.leaves(real)
        if x.ndim
    ]
    assert held == sum(bits) / 8
    assert resident.device_bytes(case.state) == pytest.approx(held, abs=16)


def test_a_checkpoint_leaves_the_frozen_weights_out():
    for leaves in ({}, {"length__every": 1}):
        case = adapted_case(**leaves)
        stored = without_base(real_state(case))
        size = sum(x.nbytes for x in jax.tree.leaves(stored) if x.ndim)
        marked = case.trained_bytes if leaves else 0  # made at the first measurement
        assert case.checkpoint_bytes == size + marked
        assert case.checkpoint_bytes < resident.state_bytes(case, "base")["base"]


def compiled_update(case):
    """(products of a micro-batch in the compiled update, Rows that the reference computes)."""
    batch, _ = programs.train_batch(case)
    number = jax.ShapeDtypeStruct((), np.float32)
    text = update_step.lower(case.state, batch, number, number, rule=case.rule).compile().as_text()
    rows, sums = gathered_rows(batch.rows, case.model)
    found = counted.count(text, counted.Speeds(1.0, 1.0, 1.0, 1.0)).total("flops")
    return found / batch.rows.num_microbatches - sums, rows


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_operations_of_an_update_leave_out_gradients_of_frozen_weights(remat, targets):
    case = cases.build(
        tiny(**WHOLE, lora__rank=4, lora__targets=targets, model__remat=remat), machine(1),
        mean_length=12,
    )  # fmt: skip
    found, rows = compiled_update(case)
    settings = {"remat": remat, "kernel": "reference", "chunk": 128}
    wanted = costs.training(case.model, rows, Parts(), 4, **settings, frozen=True)
    wanted += adapted.training(case.model, case.adapter, rows, Parts(), 4, remat=remat)
    # XLA drops recomputed products of the adapter that nothing reads.
    assert 0.99 * wanted.flops < found < 1.001 * wanted.flops
    low = 6 * rows.tokens * adapted.beside(case.model, case.adapter).entries
    whole = costs.training(case.model, rows, Parts(), 4, **settings)
    assert found - low < 0.85 * whole.flops


@pytest.mark.parametrize(
    "leaves", [{"lora__base": "int8"}, {"lora__experts": True, "lora__targets": "q_proj,up_proj"}]
)
def test_operations_of_an_update_with_experts_leave_them_out_too(leaves):
    config = tiny_experts(
        **WHOLE, **LORA | {"lora__targets": "q_proj,o_proj"} | leaves,
        model__expert_kernel="reference",
    )  # fmt: skip
    case = cases.build(config, machine(1), mean_length=12)
    found, rows = compiled_update(case)
    settings = {"remat": "full", "kernel": "reference", "chunk": 128}
    wanted = costs.training(case.model, rows, Parts(), 4, **settings, frozen=True)
    wanted += adapted.training(case.model, case.adapter, rows, Parts(), 4, remat="full")
    # The reference multiplies every row with every kernel: 8 times as many products.
    pass_of_one = costs.expert_pass(case.model, rows, Parts(), 4, gradient=False).flops / 3
    taken = 8 + (leaves.get("lora__experts", False))
    assert found == pytest.approx(wanted.flops + 7 * taken * pass_of_one, rel=1e-3)


def test_entries_of_an_adapter_are_those_that_are_trained():
    for targets in ("all-linear", "k_proj,o_proj"):
        case = adapted_case(lora__targets=targets)
        entries = sum(x.size for x in jax.tree.leaves(case.state.params))
        assert adapted.beside(case.model, case.adapter).entries == entries


def test_few_bits_are_read_as_they_are_stored():
    model = adapted_case().model
    M = costs.matrices(model)

    def memory(base, **training):
        made = low_rank.Adapter(4, 8.0, base=base)
        if training:
            rows = Rows(64, 0, 0)
            return adapted.training(model, made, rows, Parts(), 2, **training).memory
        return adapted.forward(model, made, 64, Parts(), 2).memory

    assert memory("nf4") - memory("bfloat16") == pytest.approx(M * (0.5625 + 2))
    assert memory("int8") - memory("bfloat16") == pytest.approx(-M)
    # Forward, again, and backward.
    nf4 = memory("nf4", remat="full") - memory("bfloat16", remat="full")
    assert nf4 == pytest.approx(3 * M * (0.5625 + 2))
    int8 = memory("int8", remat="none") - memory("bfloat16", remat="none")
    assert int8 == pytest.approx(M * (-1 + 1 + 2))


def compiled_records(case, *names):
    found = {p.name: p for p in programs.programs(case)}
    return {
        name: report.record(case.topology, found[name], programs.compiled(found[name]))
        for name in names
    }


def test_an_update_takes_less_memory_than_that_of_all_weights():
    sizes = {}
    for name, rank in (("whole", 0), ("adapter", 4)):
        config = tiny(**SMALL, **LORA | {"lora__rank": rank})
        config.model.overrides.intermediate_size = 2048
        config.train.microbatch_tokens = 32
        case = cases.build(config, machine(1), mean_length=12)
        one = compiled_records(case, "update")["update"]
        sizes[name] = one["bytes"]
        held = resident.device_bytes((case.state, programs.train_batch(case)[0]))
        given = one["bytes"]["arguments"] + sum(one["bytes"]["beside"].values())
        assert given == pytest.approx(held, rel=0.01)
    assert sizes["adapter"]["temporaries"] < 0.8 * sizes["whole"]["temporaries"]
    assert sizes["adapter"]["arguments"] < 0.4 * sizes["whole"]["arguments"]


@pytest.mark.parametrize("devices", [1, 4])
def test_apart_the_sampler_reads_the_trainers_weights(devices):
    leaves = {"lora__base": "nf4", "model__rollout_dtype": "bfloat16", "model__dtype": "bfloat16"}
    leaves["rollout__mismatch_limit"] = 1.0
    apart = adapted_case(devices, **leaves, rollout__lora="apart")
    merged = adapted_case(devices, **leaves)
    assert "hand-over" in {p.name for p in programs.programs(merged)}
    assert "hand-over" not in {p.name for p in programs.programs(apart)}
    assert resident.weights_bytes(apart) == 0
    arrays = programs.rollout_arrays(apart, apart.engine, apart.sampled)
    real = real_state(apart)
    params = decoder.whole_params(real.base, real.params, apart.engine.how)
    assert jax.tree.structure(arrays["params"]) == jax.tree.structure(params)
    one = compiled_records(apart, "decode chunk")["decode chunk"]
    # All of the state is counted once: the frozen weights as arguments, the moments beside them.
    held = sum(resident.kept(apart).values()) + resident.pool_bytes(apart)
    counted = one["bytes"]["arguments"] + sum(one["bytes"]["beside"].values())
    assert counted == pytest.approx(held, rel=0.05)


def test_merged_weights_are_handed_over_on_a_mesh():
    case = adapted_case(4, model__rollout_dtype="bfloat16",
                        model__dtype="bfloat16", rollout__mismatch_limit=1.0)  # fmt: skip
    one = compiled_records(case, "hand-over")["hand-over"]
    assert one["bytes"]["outputs"] == pytest.approx(resident.weights_bytes(case), rel=0.01)
    read = sum(resident.state_bytes(case, "base", "params").values())
    assert one["bytes"]["arguments"] == pytest.approx(read, rel=0.01)


def test_the_report_says_what_is_trained():
    case = adapted_case(lora__base="int8")
    told = report.times(case, programs.programs(case))
    text = report.text(told)
    assert told["adapter"]["numbers"] == case.trained_bytes // 4
    assert f"rank 4, {case.trained_bytes // 4:,} numbers" in text
    assert "frozen weights in int8" in text


@pytest.mark.parametrize(
    ("devices", "leaves", "told"),
    [(1, {"lora__rank": 999}, "lora.rank=999"),
     (4, {"model__rollout_dtype": "int8", "rollout__lora": "apart"}, "lora.base"),
     (1, {"lora__experts": True}, "lora.experts")],
)  # fmt: skip
def test_what_a_run_refuses_is_refused(devices, leaves, told):
    with pytest.raises(ConfigError, match=told) as refused:
        cases.build(tiny(**SMALL | LORA | leaves), machine(devices), mean_length=12)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # needs a device
def test_a_tpus_compiler_packs_four_bits():
    pytest.importorskip("libtpu", reason="libtpu is needed to compile for a TPU topology")
    where = jax.sharding.SingleDeviceSharding(topologies.topology("v5e:1x1").devices[0])
    matrix = jax.ShapeDtypeStruct((512, 1024), np.float32)
    kernel = jax.eval_shape(lambda w: nf4.quantise(w, 1, 0), matrix)
    kernel = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), kernel)
    planned = jax.jit(nf4.dense).lower(kernel).compile().memory_analysis()
    assert planned.argument_size_in_bytes == resident.device_bytes(kernel)
    assert planned.argument_size_in_bytes == 512 * 1024 * (0.5 + 4 / 64)
