"""Instructions of compiled programs: read from texts written by hand, and from programs whose
content is known; their time against sums by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments.rehearsal import case as cases
from experiments.rehearsal import counted, hlo, programs, report, topologies
from experiments.rehearsal.counted import Speeds, Taken
from tests.experiments.test_rehearse import SMALL, machine, tiny

# A second is 1,000 operations, 100 bytes of memory or 10 bytes from other devices.
DEVICES = machine(1).devices
BY = Speeds(flops=1e3, kernels=500.0, memory=100.0, links=10.0, devices=2)

FRAMES = """HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/luspo_jax/models/layers.py"
2 "/python/site-packages/jax/core.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=51 end_line=51 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

"""


def entry(*lines, before=""):
    """Returns the text of a program of these instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"{FRAMES}{before}ENTRY %main (a: f32[4,8]) -> f32[8,4] {{\n{body}\n}}\n"


def only(text, kind=None):
    """Returns the only entry of a program, or the only one of a kind."""
    found = counted.count(text, BY).entries
    (one,) = [x for x in found if kind in (None, x.kind)]
    return one


# ---------------------------------------------------------------- reading


def test_a_line_is_read_whole():
    module = hlo.Module(
        entry(
            "%a = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)",
            "ROOT %t = (bf16[8,4]{0,1:T(8,128)(2,1)}, /*index=1*/u32[]) custom-call(%a, %a), "
            'custom_call_target="x", metadata={op_name="jit(f)/dot" stack_frame_id=2}',
        )
    )
    a, t = module.computations[""].values()
    assert a.arrays == (hlo.Array("f32", (4, 8), "1,0", 1),)
    assert t.arrays == (hlo.Array("bf16", (8, 4), "0,1"), hlo.Array("u32", (), ""))
    assert (t.opcode, t.operands, t.target, t.operation) == (
        "custom-call", ("a", "a"), "x", "jit(f)/dot"
    )  # fmt: skip
    assert (
        module.source(t) == "luspo_jax/models/layers.py:51"
    )  # of the frame within jax, its parent
    assert module.root("") == t


def test_places_in_older_texts_are_read():
    line = '%a = f32[] add(%b, %c), metadata={source_file="/x/luspo_jax/ops/a.py" source_line=3}'
    assert only(entry(line)).source == "luspo_jax/ops/a.py:3"
    theirs = line.replace("luspo_jax/ops", "flax")
    assert only(entry(theirs)).source == ""


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("%c = f32[4,8]{0,1} copy(%a)", "layout"),
        ("%c = f32[4,8]{1,0} copy(%a)", "copy"),
        ("%c = f32[8,4]{1,0} transpose(%a), dimensions={1,0}", "transpose"),
        ("%c = f32[8,4]{1,0} fusion(%a), kind=kLoop, calls=%moving", "transpose"),
    ],
)
def test_moves_and_their_bytes(line, what):
    moving = (
        "%moving (p: f32[4,8]) -> f32[8,4] {\n  %p = f32[4,8]{1,0} parameter(0)\n"
        "  ROOT %t = f32[8,4]{1,0} transpose(%p), dimensions={1,0}\n}\n\n"
    )
    one = only(entry("%a = f32[4,8]{1,0} parameter(0)", line, before=moving))
    assert (one.kind, one.what, one.bytes) == ("move", what, 2 * 128)
    assert one.seconds == pytest.approx(2.56)


def test_a_fusion_that_computes_is_no_move_and_reads_what_it_slices():
    inner = """%inner (p: f32[9,8], q: f32[9,8], i: s32[]) -> f32[9,8] {
  %p = f32[9,8]{1,0} parameter(0)
  %q = f32[9,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
  %twice = f32[1,8]{1,0} add(%slice, %slice)
  ROOT %update = f32[9,8]{1,0} dynamic-update-slice(%q, %twice, %i, %zero)
}

"""
    one = only(
        entry(
            "%a = f32[9,8]{1,0} parameter(0)", "%b = f32[9,8]{1,0} parameter(1)",
            "%i = s32[] parameter(2)",
            "ROOT %f = f32[9,8]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%inner",
            before=inner,
        )
    )  # fmt: skip
    # A row of p is read and a row of q written, where it lies; i is read.
    assert (one.kind, one.bytes) == ("other", 32 + 32 + 4)


def test_what_lies_on_the_chip_is_not_moved():
    text = entry(
        "%a = f32[4,8]{1,0} parameter(0)",
        "%s = (f32[4,8]{1,0:S(1)}, f32[4,8]{1,0}, u32[]{:S(2)}) copy-start(%a)",
        "%d = f32[4,8]{1,0:S(1)} copy-done(%s)",
        "ROOT %n = f32[4,8]{1,0} negate(%d)",
    )
    assert only(text, "prefetch").bytes == 128
    assert only(text, "other").bytes == 128  # written, not read


# ---------------------------------------------------------------- products


def product_of(line, left, right):
    module = hlo.Module(entry(f"%l = {left} parameter(0)", f"%r = {right} parameter(1)", line))
    (found,) = module.products("", list(module.computations[""].values())[-1])
    return found


def test_a_dot_with_a_batch():
    one = product_of(
        "%d = f32[3,4,5]{2,1,0} dot(%l, %r), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
        "rhs_batch_dims={0}, rhs_contracting_dims={1}, operand_precision={highest,highest}",
        "bf16[3,4,7]{2,1,0}", "f32[3,7,5]{2,1,0}",
    )  # fmt: skip
    assert (one.rows, one.columns, one.depth, one.count) == (4, 5, 7, 3)
    assert (one.dtype, one.precision, one.flops) == ("f32", "highest", 2 * 3 * 4 * 5 * 7)


def test_convolutions_that_are_products():
    # [2, 6, 10] · [10, 8, 4] as a window of 8 over one position: each place sees one tap.
    spread = product_of(
        "%d = bf16[2,6,8,4]{3,2,1,0} convolution(%l, %r), window={size=1x8 pad=0_0x7_7 "
        "rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
        "bf16[2,6,10,1]{3,2,1,0}", "bf16[10,8,4,1]{3,2,1,0}",
    )  # fmt: skip
    assert spread.flops == 2 * 12 * 10 * 32
    assert (spread.rows, spread.columns, spread.depth) == (12, 32, 10)
    # [2, 6, 8, 4] · [8, 4, 10], summed over both of 8 and 4.
    summed = product_of(
        "%d = bf16[2,6,10,1]{3,2,1,0} convolution(%l, %r), window={size=1x8}, "
        "dim_labels=0b1f_1io0->0bf1",
        "bf16[2,6,8,4]{3,2,1,0}", "bf16[8,4,10,1]{3,2,1,0}",
    )  # fmt: skip
    assert (summed.rows, summed.columns, summed.depth, summed.count) == (12, 10, 32, 1)


def test_a_librarys_product():
    one = product_of(
        '%d = (f32[4,5]{1,0}, s8[99]) custom-call(%l, %r), custom_call_target="__cublas$gemm", '
        'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}',
        "bf16[4,7]{1,0}", "bf16[7,5]{1,0}",
    )  # fmt: skip
    assert one.flops == 2 * 4 * 5 * 7


def test_products_are_padded_to_the_unit_in_the_better_order():
    by = dataclasses.replace(BY, unit=(8, 128, 64), slower=(("f32", 2.0), ("f32 highest", 6.0)))
    flops = 2 * 128 * 8 * 32
    one = hlo.Product(128, 8, 32, 1, "bf16", "")  # 8 × 128 fills the unit, 32 of 64 deep
    assert by.product(one) == pytest.approx(2 * flops / 1e3)
    assert by.product(dataclasses.replace(one, dtype="f32")) == pytest.approx(4 * flops / 1e3)
    highest = dataclasses.replace(one, dtype="f32", precision="highest")
    assert by.product(highest) == pytest.approx(12 * flops / 1e3)


# ---------------------------------------------------------------- time

GATHER = (
    "%a = f32[4,8]{1,0} parameter(0)",
    "%s = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%a), replica_groups={{0,1}}, "
    "dimensions={0}",
    "%d = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}",
    "%g = f32[8,8]{1,0} all-gather-done(%s)",
    "ROOT %n = f32[4,4]{1,0} negate(%d)",
)


def test_a_collective_is_hidden_by_what_runs_between_its_start_and_its_end():
    found = counted.count(entry(*GATHER), BY)
    gather, dot, negate = found.entries
    # It receives half of 256 bytes, in 12.8 s; the dot reads 2 · 128 and writes 64 bytes.
    assert (gather.what, gather.begun, gather.bytes, gather.seconds) == (
        "all-gather", True, 128, 12.8
    )  # fmt: skip
    assert dot.waited == pytest.approx(3.2)
    assert gather.beside == pytest.approx(3.2)
    assert gather.waited == pytest.approx(12.8 - 3.2)
    assert found.seconds == pytest.approx(12.8 + negate.bytes / 100)
    told = counted.described(found, 0.0)
    assert told["hidden_share"] == pytest.approx(0.25)
    assert told["collectives"][0]["asynchronous"]
    assert "25% of their time is hidden" in "\n".join(counted.lines("p", told))


def test_a_collective_without_a_start_is_waited_for():
    line = "%g = f32[4,8]{1,0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add"
    one = only(entry("%a = f32[4,8]{1,0} parameter(0)", line))
    assert (one.what, one.begun, one.bytes, one.waited) == ("all-reduce", False, 128, 12.8)
    scattered = line.replace("f32[4,8]{1,0} all-reduce", "f32[2,8]{1,0} reduce-scatter")
    assert only(entry("%a = f32[4,8]{1,0} parameter(0)", scattered)).bytes == 64


FUSED = """%begin (p: f32[4,8]) -> (f32[4,8], f32[8,8]) {
  %p = f32[4,8]{1,0} parameter(0)
  %g = f32[8,8]{1,0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
  ROOT %c = (f32[4,8]{1,0}, f32[8,8]{1,0}) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: f32[4,8], q: f32[8,8], x: f32[4,8]) -> (f32[4,4], f32[8,8]) {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  %x = f32[4,8]{1,0} parameter(2)
  %g = f32[8,8]{1,0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
  %d = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t = (f32[4,4]{1,0}, f32[8,8]{1,0}) tuple(%d, %q)
}

%finish (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %c = f32[8,8]{1,0} custom-call(%q), custom_call_target="AsyncCollectiveDone"
}

"""


def test_a_tpus_collective_in_fusions_is_followed_to_its_end():
    text = entry(
        "%a = f32[4,8]{1,0} parameter(0)",
        "%s = (f32[4,8]{1,0}, f32[8,8]{1,0}) fusion(%a), kind=kCustom, calls=%begin",
        "%s0 = f32[4,8]{1,0} get-tuple-element(%s), index=0",
        "%s1 = f32[8,8]{1,0} get-tuple-element(%s), index=1",
        "%m = (f32[4,4]{1,0}, f32[8,8]{1,0}) fusion(%s0, %s1, %a), kind=kOutput, "
        "calls=%async_collective_fusion.1",
        "%m1 = f32[8,8]{1,0} get-tuple-element(%m), index=1",
        "ROOT %e = f32[8,8]{1,0} fusion(%m1), kind=kCustom, calls=%finish",
        before=FUSED,
    )
    found = counted.count(text, BY)
    gather, product = found.entries
    assert (gather.kind, gather.what, gather.begun) == ("collective", "all-gather", True)
    # The product reads x and writes d; the gathered array is passed on.
    assert (product.kind, product.flops, product.bytes) == ("product", 2 * 4 * 4 * 8, 128 + 64)
    assert gather.waited == pytest.approx(12.8 - product.waited)
    assert found.seconds == pytest.approx(12.8)


LOOP = """%body (x: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %x = (s32[], f32[4,8]{{1,0}}) parameter(0)
  %v = f32[4,8]{{1,0}} get-tuple-element(%x), index=1
  %n = f32[4,8]{{1,0}} negate(%v)
  ROOT %t = (s32[], f32[4,8]{{1,0}}) tuple(%i, %n)
}}

%condition (x: (s32[], f32[4,8])) -> pred[] {{
  %x = (s32[], f32[4,8]{{1,0}}) parameter(0)
  {limit}
}}

"""


@pytest.mark.parametrize(
    ("limit", "known", "turns"),
    [("%c = s32[] constant(6)", "", 6), ("%c = s32[] constant(6)", "5", 5),
     ("%c = pred[] parameter(1)", "", 3)],
)  # fmt: skip
def test_loops_count_their_turns_and_those_of_the_data_what_is_told(limit, known, turns):
    config = f', backend_config={{"known_trip_count":{{"n":"{known}"}}}}' if known else ""
    text = entry(
        "%a = (s32[], f32[4,8]{1,0}) parameter(0)",
        f"%w = (s32[], f32[4,8]{{1,0}}) while(%a), condition=%condition, body=%body{config}",
        before=LOOP.format(limit=limit),
    )
    found = counted.count(text, BY, Taken(turns=(3.0,)))
    assert [one.times for one in found.entries] == [turns]
    assert found.seconds == pytest.approx(2.56 * turns)


def test_a_conditional_counts_its_longest_branch_as_often_as_it_is_taken():
    branches = "".join(
        f"%{name} (x: f32[4,8]) -> f32[] {{\n  %x = f32[4,8]{{1,0}} parameter(0)\n  {line}\n}}\n\n"
        for name, line in (("short", "ROOT %y = f32[] constant(0)"),
                           ("long", "ROOT %y = f32[4,8]{1,0} negate(%x)"))
    )  # fmt: skip
    text = entry(
        "%a = f32[4,8]{1,0} parameter(0)",
        "ROOT %c = f32[4,8]{1,0} conditional(%p, %a, %a), branch_computations={%short, %long}",
        before=branches,
    )
    found = counted.count(text, BY, Taken(shares=(0.75,)))
    assert found.seconds == pytest.approx(0.75 * 2.56)
    assert found.total("bytes") == pytest.approx(0.75 * 256)


def test_operations_that_no_product_has_are_those_of_kernels():
    kernel = 'custom-call(%a), custom_call_target="tpu_custom_call"'
    text = entry(
        "%a = f32[4,8]{1,0} parameter(0)",
        "%d = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}",
        f"%k = f32[4,8]{{1,0}} {kernel}",
        f"%m = f32[4,24]{{1,0}} {kernel}",
    )
    dot, small, large = counted.count(text, BY, kernel_flops=256 + 6144.0).entries
    assert (dot.flops, small.flops, large.flops) == (256, 2048, 4096)  # by their bytes, 1 : 2
    assert (small.seconds, large.seconds) == (2048 / 500, 4096 * 2 / 1e3)
    without = counted.count(text, BY)
    assert without.entries[2].seconds == pytest.approx(5.12)


def test_measured_rates_are_taken_whole_and_a_vendors_as_far_as_they_are_reached():
    chip = topologies.CHIPS["h100"]
    vendors = counted.speeds(topologies.Topology("h100:1x1", chip, DEVICES))
    assert vendors.flops == chip.flops * counted.REACHED["products"]
    assert vendors.kernels == pytest.approx(chip.flops * counted.KERNELS)
    assert vendors.memory == chip.bandwidth * counted.REACHED["memory"]
    known = dataclasses.replace(chip, platform="gpu", source="measured here")
    measured = counted.speeds(topologies.Topology("local", known, DEVICES))
    assert measured.flops == chip.flops
    assert measured.kernels / measured.flops == pytest.approx(vendors.kernels / vendors.flops)
    assert (measured.memory, measured.slower) == (chip.bandwidth, vendors.slower)
    cpu = counted.speeds(machine(1))
    assert cpu.flops == cpu.kernels == machine(1).chip.flops


# ---------------------------------------------------------------- compiled programs


def test_a_compiled_programs_products_are_its_own():
    def step(x, w):
        return jnp.tanh(x @ w), None

    def loss(w, x):
        return jnp.sum(lax.scan(step, x, w)[0])

    w, x = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32), jax.ShapeDtypeStruct((64, 32), "float32")
    text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
    found = counted.count(text, BY)
    forward = 2 * 64 * 32 * 32
    # The gradient of the first input of the chain is not wanted, but the loop computes it.
    assert found.total("flops") == 5 * 3 * forward
    moved = found.total("bytes")
    assert moved > 3 * 5 * 4 * (32 * 32 + 2 * 64 * 32) / 2


def test_an_update_of_adam_moves_little_more_than_the_least():
    config = tiny(model__remat="full", **SMALL)
    case = cases.build(config, machine(1), mean_length=12)
    program = next(p for p in programs.programs(case) if p.name == "update")
    made = programs.compiled(program)
    one = report.record(case.topology, program, made)
    assert one["share"] == pytest.approx(one["roofline_s"] / one["counted"]["seconds"])
    assert 0 < one["share"] < 1
    assert one["counted"]["optimizer"]["least_bytes"] == 8 * case.trained_bytes
    products = counted.count(made.text, counted.speeds(case.topology), program.taken)
    assert products.total("flops") == pytest.approx(program.work.flops, rel=0.35)
    step = report.step(case, [program], {"update": one})
    phase = step["phases"]["update"]
    assert phase["expected_s"] == pytest.approx(phase["roofline_s"] / one["share"])
    assert step["counted_shares"] == {"update": one["share"]}
    lines = report.instructions({"programs": {"update": one}})
    assert lines.startswith("**update**, ")
    assert "The optimiser moves" in lines
