"""Several slices: what is read from HLO against counting, and what may cross in a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.command import UsageError
from experiments.rehearsal import case as cases
from experiments.rehearsal import crossing, programs, report, slices, topologies
from luspo_jax import sharding
from luspo_jax.hosts.values import ConfigError
from luspo_jax.learner import copies
from tests.experiments.test_rehearse import FIELDS, machine, tiny, tiny_experts

# ---------------------------------------------------------------- machines


@pytest.mark.parametrize(
    ("text", "told"),
    [("x*v5p:4x4x4", "2*v5p:4x4x4"), ("0*v5p:4x4x4", "2*v5p:4x4x4"), ("*v5p:4x4x4", "2*v5p"),
     ("2*v5p:3x3x3", "v5p:4x4x4"), ("2*h100:1x8", "v5e, v5p, v6e"),
     ("2*v4:2x2x2", "write v4:2x2x2"), ("2*v9:2x2", "v5p")],
)  # fmt: skip
def test_slices_that_cannot_be_rehearsed_are_refused_with_what_can(text, told):
    with pytest.raises(UsageError) as refused:
        topologies.topology(text)
    assert text in str(refused.value)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_compiler_is_asked_for_slices(monkeypatch):
    from jax.experimental import topologies as described

    asked = []

    def found(name, **settings):
        asked.append((name, settings.get("num_slices")))
        return type("Described", (), {"devices": jax.devices("cpu")})

    monkeypatch.setattr(described, "get_topology_desc", found)
    for text in ("2*v5p:4x4x4", "4*v6e:4x4", "v6e:4x4", "1*v6e:4x4"):
        topologies.topology(text)
    slices_asked = [one for one in asked if one != ("v6e:2x2", None)]  # a host by itself
    assert slices_asked == [
        ("v5p:4x4x4", 2), ("v6e:4x4", 4), ("v6e:4x4", None), ("v6e:4x4", None)
    ]  # fmt: skip


# ---------------------------------------------------------------- reading HLO


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x={0}", [[0, 2], [1, 3]]),
        ("replica_groups={}, dimensions={1}", [[0, 1, 2, 3]]),
        ("dimensions={1}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
    ],
)
def test_groups_are_read_as_hlo_writes_them(text, expected):
    assert crossing.groups(f"%x = f32[2] all-reduce(%y), {text}", 4) == expected


def test_groups_of_more_axes_are_those_of_numpy():
    ids = np.arange(24).reshape(2, 3, 4)
    written = "replica_groups=[6,4]<=[2,3,4]T(1,0,2)"
    assert crossing.groups(written, 24) == ids.transpose(1, 0, 2).reshape(6, 4).tolist()
    written = "replica_groups=mesh['a'=2,'b'=3,'c'=4] {'c','a'}"
    assert crossing.groups(written, 24) == ids.transpose(1, 2, 0).reshape(3, 8).tolist()
    written = "replica_groups=mesh['a'=2,'b'=12] {'b':(3)2}"
    parts = np.arange(24).reshape(2, 3, 2, 2)
    assert crossing.groups(written, 24) == parts.transpose(0, 1, 3, 2).reshape(12, 2).tolist()


def test_groups_written_in_another_way_are_an_error():
    with pytest.raises(ValueError, match="not known here: magic"):
        crossing.groups("replica_groups=magic", 4)


def _hlo(line, turns="constant(5)"):
    return f"""
%cond (p: (s32[], f32[8])) -> pred[] {{
  %limit = s32[]{{:T(128)}} {turns}
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  {line}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  {line}
}}
"""


@pytest.mark.parametrize(
    ("line", "kind", "each"),
    [
        ("%a = f32[8,3]{1,0} all-reduce(%x), replica_groups={{0,2},{1,3}}, to_apply=%add",
         "all-reduce", 96),
        ("%a = (f32[8]{0}, bf16[4]{0}) all-reduce(%x, %y), replica_groups={{0,2},{1,3}}",
         "all-reduce", 40),
        ("%a = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}", "all-reduce", 16),
        ("%a = bf16[8]{0} all-gather(%x), replica_groups={{0,2},{1,3}}, dimensions={0}",
         "all-gather", 8),
        ("%a = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,2},{1,3}}",
         "all-gather", 16),
        ("%a = f32[8]{0} reduce-scatter(%x), replica_groups={{0,2},{1,3}}", "reduce-scatter", 32),
        ("%a = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2}}",
         "collective-permute", 32),
        ("%a = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, "
         'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
         '_xla_megascale_transfer_type="ALL_REDUCE"}', "all-reduce", 32),
        ("%a = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true, "
         'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
         '_xla_megascale_transfer_type="REDUCE_SCATTER"}', "reduce-scatter", 16),
    ],
)  # fmt: skip
def test_transfers_are_counted_in_and_out_of_loops(line, kind, each):
    inside, outside = crossing.transfers(_hlo(line), [0, 0, 1, 1])
    assert (inside.kind, inside.bytes, inside.times, inside.looped) == (kind, each, 5, True)
    assert (outside.kind, outside.bytes, outside.times, outside.looped) == (kind, each, 1, False)
    assert inside.total == 5 * each


@pytest.mark.parametrize(
    "line",
    [
        "%a = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}",
        "%a = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{3,2}}",
        "%a = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=1",
        "%a = f32[8]{0} add(%x, %y)",
    ],
)
def test_what_stays_in_a_slice_is_left_out(line):
    assert crossing.transfers(_hlo(line), [0, 0, 1, 1]) == []
    assert crossing.transfers(_hlo(line.replace("{{0,1},{2,3}}", "{}")), [0, 0, 0, 0]) == []


def test_collectives_of_a_slices_own_program_stay_in_it():
    text = "HloModule jit_f, num_partitions=4\n" + _hlo("%a = f32[8]{0} all-reduce(%x)")
    assert len(crossing.transfers(text, [0, 0, 1, 1])) == 2
    assert crossing.transfers(text, [0] * 4 + [1] * 4) == []


def test_transfers_are_found_behind_a_kernel_and_none_is_lost():
    """Attributes of a kernel are lines of their own, which look like a computation's end."""
    line = "%a = f32[8]{0} all-reduce(%x), replica_groups={{0,2},{1,3}}"
    kernel = '%k = f32[8]{0} custom-call(%x), frontend_attributes={x={\n"y"\n}}, metadata={}\n  '
    assert len(crossing.transfers(_hlo(kernel + line), [0, 0, 1, 1])) == 2
    lost = "\n%lost (p: f32[8]) -> f32[8] {\n  " + line + "\n}\n"
    with pytest.raises(ValueError, match="computations that nothing calls"):
        crossing.transfers(lost + _hlo(line), [0, 0, 1, 1])


def test_a_loop_without_a_known_number_of_turns_counts_once():
    line = "%a = f32[8]{0} all-reduce(%x), replica_groups={{0,2},{1,3}}"
    found = crossing.transfers(_hlo(line, "parameter(0)"), [0, 0, 1, 1])
    assert [(one.times, one.looped) for one in found] == [(1, False), (1, True)]


# What a device receives of each array, device by device, on a mesh of 2 × 4.
_GRID = np.arange(8).reshape(2, 4)
_SLICES = {"rows": [0] * 4 + [1] * 4, "turns": [0, 0, 1, 1] * 2, "four": [0, 0, 1, 1, 2, 2, 3, 3]}


def _group(device, axes):
    row, column = np.unravel_index(device, _GRID.shape)
    rows = range(2) if "data" in axes else [row]
    return [int(_GRID[i, j]) for i in rows for j in (range(4) if "fsdp" in axes else [column])]


def _received(kind, axes, of_slice, values):
    """The most float32 bytes that a device gets from other slices; `values` are its own input."""
    most = 0
    for device in range(8):
        group = _group(device, axes)
        away = [one for one in group if of_slice[one] != of_slice[device]]
        beside = len(group) - len(away)
        count = len({of_slice[one] for one in group})
        if kind in ("all-gather", "all-to-all"):
            piece = values if kind == "all-gather" else values / len(group)
            got = sum(piece for _ in away)
        else:  # a part of the sums within a slice; a share of it from each slice, and back
            part = values / beside
            got = sum(part / count for _ in range(count - 1)) * (2 if kind == "all-reduce" else 1)
        most = max(most, 4 * got)
    return most


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("data", "fsdp")], ids=str)
@pytest.mark.parametrize("of_slice", _SLICES)
@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all"])
def test_bytes_of_a_compiled_program_are_those_of_its_pairs(kind, of_slice, axes):
    mesh = Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("data", "fsdp"))
    run = {
        "all-reduce": lambda x: lax.psum(x, axes),
        "all-gather": lambda x: lax.all_gather(x, axes, tiled=True),
        "reduce-scatter": lambda x: lax.psum_scatter(x, axes, tiled=True),
        "all-to-all": lambda x: lax.all_to_all(x, axes, 0, 0, tiled=True),
    }[kind]
    every = PartitionSpec(("data", "fsdp"))
    own = jax.shard_map(run, mesh=mesh, in_specs=every, out_specs=every, check_vma=False)

    def twice(x):
        turned, _ = lax.scan(lambda carry, _: (carry + jnp.sum(own(x + carry)), None), 0.0, None, 6)
        return own(x), turned

    x = jax.ShapeDtypeStruct((8 * 24, 5), jnp.float32, sharding=NamedSharding(mesh, every))
    made = jax.jit(twice).lower(x).compile()
    found = crossing.transfers(made.as_text(), _SLICES[of_slice])
    found = [one for one in found if one.bytes > 8]  # the loop's scalar
    expected = _received(kind, axes, _SLICES[of_slice], 24 * 5)
    once = [one.bytes for one in found if not one.looped]
    assert sum(once) == pytest.approx(expected)
    assert sum(one.total for one in found if one.looped) == pytest.approx(6 * expected)
    assert {one.times for one in found if one.looped} <= {6}


# ---------------------------------------------------------------- what may cross

MESHES = {"dense": {"data": 2, "fsdp": 2, "context": 2}, "mixture": {"data": 2, "expert": 4}}


@pytest.fixture
def halves(monkeypatch):
    """Devices 0 to 3 in one slice, 4 to 7 in another."""
    monkeypatch.setattr(sharding, "slice_of", lambda device: device.id // 4)


def _case(kind, on=None, **leaves):
    make = tiny_experts if kind == "mixture" else tiny
    config = make(
        data__max_prompt_length=8, rollout__max_response_length=56,
        rollout__prompts_per_step=32, train__microbatch_tokens=8 * 64, train__num_minibatches=2,
        model__remat="full", model__expert_kernel="reference", **leaves,
    )  # fmt: skip
    config.mesh.update({"fsdp": 1, **MESHES[kind]})
    case = cases.build(config, on or machine(), mean_length=24)
    assert case.topology.slices == 2
    return case


def _crossing(case, names=None):
    found = {}
    for program in programs.programs(case):
        if names is None or program.name in names:
            found[program.name] = programs.compiled(program).crossing
    return found


def _is_gradient(one):
    return one.kind == "all-reduce" and all(shape.startswith("f32") for shape in one.shapes)


def _bound(case):
    """Bytes of what else may cross: of each token some numbers and the ids of its experts."""
    rows = programs.train_batch(case)[0].rows
    each = 32 + (4 * case.model.num_expert_layers * case.model.experts_per_token)
    return each * rows.tokens_RT.size / 2 + 4096


@pytest.mark.parametrize("kind", MESHES)
def test_only_gradients_cross_slices_once_an_update(kind, halves):
    case = _case(kind)
    _check(case, _crossing(case))


def _check(case, found):
    batch, _ = programs.train_batch(case)
    assert batch.rows.num_microbatches > 1
    sums = [one for one in found["update"] if _is_gradient(one) and one.bytes > 1024]
    assert sums
    assert not [one for one in sums if one.looped]
    expected = slices.gradient_bytes(case)
    small = sum(one.total for one in found["update"] if _is_gradient(one)) - expected
    assert 0 <= small <= 4096
    rest = sum(one.total for one in found["update"] if not _is_gradient(one))
    assert rest <= _bound(case)
    assert rest < expected
    responses = case.sizes.responses_per_step / case.sizes.responses_per_minibatch
    for name, ones in found.items():
        if name.startswith("log-probs"):
            assert sum(one.total for one in ones) <= _bound(case) * responses
        elif name != "update":  # the fake host of the rollout has devices of both slices
            assert sum(one.bytes for one in ones) <= 16, name


def test_a_gradient_of_every_micro_batch_would_be_noticed(halves, monkeypatch):
    monkeypatch.setattr(copies, "has_copies", lambda how: False)
    case = _case("dense", train__weight_decay=0.03)  # another rule: jax keeps no program of it
    (update,) = [p for p in programs.programs(case) if p.name == "update"]
    found = programs.compiled(update).crossing
    parts = programs.train_batch(case)[0].rows.num_microbatches
    looped = sum(one.total for one in found if _is_gradient(one) and one.looped)
    assert looped == pytest.approx(parts * slices.gradient_bytes(case), rel=0.05)


def test_a_mesh_that_would_cross_is_refused_with_what_to_set(halves):
    with pytest.raises(ConfigError, match=r"set mesh\.data=2 and leave the other axes to the 4"):
        cases.build(tiny(), machine(), mean_length=24)


def test_the_report_tells_what_crosses_and_its_time(halves):
    case = _case("dense")
    found = report.times(case, programs.programs(case))
    gradients, network = slices.gradient_bytes(case), case.topology.chip.network
    phase = found["step"]["phases"]["gradients across slices"]
    assert phase["roofline_s"] == pytest.approx(case.sizes.updates_per_step * gradients / network)
    assert phase["expected_s"] > phase["roofline_s"]
    text = report.text(found)
    assert "8 devices of 1 host(s) in 2 slices" in text
    assert "Across the 2 slices, by hand: gradients" in text
    (update,) = [p for p in programs.programs(case) if p.name == "update"]
    made = programs.compiled(update)
    one = report.record(case.topology, update, made)
    assert set(one) == FIELDS | {"across_slices_bytes", "across_slices"}
    assert one["across_slices_bytes"] >= gradients
    told = slices.lines({"across_slices": slices.crossed(case, {"update": one})})
    assert "As compiled, a call: update" in told[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # needs a device
@pytest.mark.parametrize("kind", MESHES)
def test_only_gradients_cross_between_tpu_slices(kind):
    """What the TPU compiler makes of the same: transfers through the runtime between slices."""
    pytest.importorskip("libtpu", reason="libtpu is needed to compile for a TPU topology")
    case = _case(kind, on=topologies.topology("2*v5p:2x2x1"))
    found = _crossing(case, ("hand-over", "log-probs", "update"))
    sums = [one for one in found["update"] if _is_gradient(one) and one.bytes > 1024]
    assert not [one for one in sums if one.looped]
    # Arrays as small as these are padded to tiles.
    assert 1 <= sum(one.total for one in sums) / slices.gradient_bytes(case) < 8
    assert sum(one.total for one in found["update"] if one not in sums) <= _bound(case)
    assert sum(one.total for one in found["log-probs"]) <= 4 * _bound(case)
    assert not found["hand-over"]
