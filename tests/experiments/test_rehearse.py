"""Rehearsals: machines by name, costs against counting, verdicts, and changes that help."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from configs import qwen3_30b_a3b_dapo17k
from experiments.command import UsageError
from experiments.rehearsal import case as cases
from experiments.rehearsal import costs, playing, programs, report, resident, search, topologies
from experiments.rehearsal.costs import Parts, Rows, Work
from luspo_jax.experience import stages
from luspo_jax.experience.groups import Group, Rollouts
from luspo_jax.hosts.values import ConfigError
from luspo_jax.learner.policies import PolicyLogprobs, laid_rows
from luspo_jax.learner.rows import put
from luspo_jax.learner.state import abstract_state
from luspo_jax.learner.step import update_step
from luspo_jax.metrics import StepMetrics
from luspo_jax.models import decoder
from luspo_jax.models.experts import id_type
from luspo_jax.models.forward import Forward
from luspo_jax.rollout import Cache, Engine, Request, Response, Sampling
from luspo_jax.rollout import programs as rollout_programs
from luspo_jax.rollout.cache import page_bytes
from luspo_jax.run.fields import default_config
from luspo_jax.run.memory import param_bytes
from luspo_jax.sharding import MESH_AXES, Layout, MeshError
from tests.row_cases import Prompt

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHIP = topologies.Chip("cpu", 1e9, 0.0, 1e11, 1e10, 1e9, 1e9, 8, (), "made up")


def tiny(**leaves):
    """A configuration small enough to be compiled in seconds, with every kind of program."""
    config = default_config()
    config.model.path = "embedded:label_sums"
    config.model.random_weights = True
    config.model.overrides = {"num_hidden_layers": 2}
    config.model.head_chunk_tokens = 64
    config.data.name = "label_sums"
    config.data.max_prompt_length = 16
    config.reward.parts = {"gsm8k": 1.0}
    config.rollout.prompts_per_step = 16
    config.rollout.max_response_length = 1008
    config.model.overrides.max_position_embeddings = 1024
    config.rollout.num_slots = 128
    config.eval.num_slots = 128
    config.train.num_minibatches = 2
    config.train.packing = True
    config.train.microbatch_tokens = 8 * 1024
    config.train.num_length_buckets = 1
    for name, value in leaves.items():
        section, field = name.split("__")
        config[section][field] = value
    return config


def machine(devices=8, memory=1e9):
    """The first fake devices, as a machine with this much memory each."""
    chip = dataclasses.replace(CHIP, memory=memory)
    return topologies.Topology("local", chip, tuple(jax.devices("cpu")[:devices]))


# ---------------------------------------------------------------- machines


@pytest.mark.parametrize(
    ("text", "valid"),
    [("v9:2x2", "v5p"), ("v5p:3x2x1", "v5p:2x2x4"), ("v5e:2x3", "v5e:16x16"),
     ("v5p", "v5p:4x4x4"), ("h100:1x3", "h100:4x8"), ("h100:8", "h100:1x8"), ("v5p:axb", "v5p:")],
)  # fmt: skip
def test_machines_that_do_not_exist_are_refused_with_those_that_do(text, valid):
    with pytest.raises(UsageError, match=text) as refused:
        topologies.topology(text)
    assert valid in str(refused.value)


@pytest.mark.parametrize(
    ("text", "command"), [("v5p:2x2x4", r"jax\[tpu\]"), ("h100:1x8", r"jax\[cuda13\]")]
)
def test_a_missing_compiler_is_told_with_what_installs_it(text, command, monkeypatch):
    from jax.experimental import topologies as described

    def absent(*_, **__):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(described, "get_topology_desc", absent)
    with pytest.raises(UsageError, match=f'pip install "{command}"') as refused:
        topologies.topology(text)
    assert "\n" not in str(refused.value)


def test_the_order_of_a_slice_does_not_matter(monkeypatch):
    from jax.experimental import topologies as described

    asked = []

    def found(name, **settings):
        asked.append((name, settings))
        return type("Described", (), {"devices": jax.devices("cpu")})

    monkeypatch.setattr(described, "get_topology_desc", found)
    assert len(topologies.topology("v5p:4x2x2").devices) == 8
    topologies.topology("v4:2x2x4")
    topologies.topology("v5e:2x4")
    assert [name for name, _ in asked] == ["v5p:4x2x2", "v4:2x2x4", "v5e:2x4"]
    assert asked[1][1]["chip_config_name"] == "megacore"
    assert asked[2][1]["chips_per_host_bounds"] == (2, 4, 1)


def test_cards_are_described_by_their_own_numbers():
    text = topologies.gpu_target("a100-80g")
    assert "core_count: 108" in text
    assert "memory_bandwidth: 2039000000000" in text
    assert "major: 8 feature_extension: NONE" in text


def test_a_mesh_or_a_size_that_does_not_fit_is_refused_before_anything_is_compiled():
    config = tiny()
    config.mesh.fsdp = 3
    with pytest.raises(MeshError, match="takes 3 devices and there are 8"):
        cases.build(config, machine())
    with pytest.raises(ConfigError, match="microbatch_tokens=512 holds no packed row"):
        cases.build(tiny(train__microbatch_tokens=512), machine())
    with pytest.raises(UsageError, match="--max_length=2000"):
        cases.build(tiny(), machine(), max_length=2000)
    with pytest.raises(UsageError, match="--mean_length=2000"):
        cases.build(tiny(), machine(), mean_length=2000)


def test_rows_and_programs_of_one_device_are_made_as_on_it(monkeypatch):
    """Not as on the device of this process, whose platform may want other rows and kernels."""
    device = jax.devices("cpu")[3]
    case = cases.build(tiny(**SMALL), topologies.Topology("h100:1x1", CHIP, (device,)))
    seen, planner = [], cases.planner

    def noted(*arguments):
        seen.append(jax.config.jax_default_device)
        return planner(*arguments)

    monkeypatch.setattr(cases, "planner", noted)
    update = next(one for one in programs.programs(case) if one.name == "update")
    monkeypatch.setattr(
        type(case.programs), "lower_update", lambda *_: seen.append(jax.config.jax_default_device)
    )
    update.lower()
    assert seen == [device, device]


# ---------------------------------------------------------------- costs


def products(jaxpr):
    """Operations of all products of a program, loops counted by their turns."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = int(np.prod([shape[axis] for axis in contracted]))
            total += 2 * int(np.prod(equation.outvars[0].aval.shape)) * inner
        elif name == "cond":
            total += max(products(branch.jaxpr) for branch in params["branches"])
        elif name == "while":
            total += products(params["body_jaxpr"].jaxpr)  # a single turn
        else:
            turns = params["length"] if name == "scan" else 1
            for value in params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += turns * products(inner)
    return total


SMALL = {"data__max_prompt_length": 8, "rollout__max_response_length": 24,
         "train__microbatch_tokens": 4 * 32, "train__num_minibatches": 4}  # fmt: skip
# Of the head's chunks the data decide how many are computed: here there is one.
WHOLE = SMALL | {"model__head_chunk_tokens": 4 * 32}


def gathered_rows(rows, model):
    """(Rows of a micro-batch whose sequences are gathered into squares, operations of the products
    that sum the gradients of the keys of shared prompts)."""
    found, parts = rows.sequences, rows.num_microbatches
    B, C = (len(x) // parts for x in (found.starts_B, found.trunk_starts_C))
    pairs = B * found.width * (found.width + found.trunk_width) + C * found.trunk_width**2
    tokens = rows.rows_per_microbatch * rows.tokens_RT.shape[1]
    of_keys = found.trunk_width * model.num_kv_heads * model.head_dim
    return Rows(tokens, pairs, tokens), 2 * 2 * B * C * of_keys * model.num_layers


@pytest.mark.parametrize("remat", ["none", "full", "attention"])
def test_operations_of_an_update_are_those_of_its_program(remat):
    case = cases.build(tiny(model__remat=remat, **WHOLE), machine(1), mean_length=12)
    batch, _ = programs.train_batch(case)
    number = jax.ShapeDtypeStruct((), np.float32)
    state = abstract_state(case.rule)
    traced = update_step.trace(state, batch, number, number, rule=case.rule)
    # At 32 tokens the reference attention computes whole squares, and the head every chunk.
    rows, sums = gathered_rows(batch.rows, case.model)
    counted = costs.training(
        case.model, rows, Parts(), 4, remat=remat, kernel="reference", chunk=128
    )
    # The recomputation still computes the last product in the trace; XLA drops it.
    last = 0
    if remat != "none":
        model = case.model
        last = 2 * rows.tokens * model.num_layers * model.embed_dim * model.mlp_dim
    found = products(traced.jaxpr.jaxpr) / batch.rows.num_microbatches - sums
    assert found == pytest.approx(counted.flops + last, rel=1e-3) or found == pytest.approx(
        counted.flops, rel=1e-3
    )


def traced_step(case):
    """(products of a decode step of the reference, which reads all that tables name; its Step)."""
    play, engine = case.sampled, case.engine
    arrays = programs.rollout_arrays(case, engine, play)
    rows = arrays["decode chunk"]
    rows = dataclasses.replace(rows, places=rows.places._replace(shared=None))
    traced = rollout_programs.decode_chunk.trace(
        arrays["params"], arrays["pages"], rows, sampling=engine.sampling, chunk_length=4,
        how=dataclasses.replace(engine.how, paged_attention="reference"),
    )  # fmt: skip
    count = len(rows.tokens_B)
    whole = count * engine.table_width * engine.page_tokens
    return products(traced.jaxpr.jaxpr), costs.Step(count, count, whole)


def test_operations_of_a_decode_step_are_those_of_its_program():
    case = cases.build(tiny(**SMALL), machine(1), mean_length=12)
    found, step = traced_step(case)
    assert found == pytest.approx(costs.decode_step(case.model, step, Parts(), 4).flops, rel=0.01)


def test_a_decode_program_does_the_work_of_the_steps_that_were_played():
    case = cases.build(tiny(**SMALL), machine(1), mean_length=12)
    program = next(p for p in programs.programs(case) if p.name == "decode chunk")
    width, page = costs.kv_bytes(case.model, 4), case.engine.page_size
    weights = 4 * (costs.matrices(case.model) + costs.head(case.model))
    logits = 16 * case.model.vocab_size
    entries = sum(8 * n + n * (n - 1) / 2 + n * page / 2 for n in case.response_lengths)
    rows = sum(chunk.steps * chunk.rows for chunk in case.sampled.chunks)
    wanted = case.sampled.steps * weights + entries * width + rows * logits
    assert program.work.memory * program.calls == pytest.approx(wanted)
    # A second of each resource is as long as the steps take one by one.
    rates = costs.Rates(1e30, 1.0, 1e30)
    assert report.seconds(case, program, rates) == pytest.approx(wanted)


def test_int8_weights_and_pages_are_read_with_their_scales():
    model, _, rollout = paper()
    part = costs.parts(rollout, length="cache_length")
    step = costs.Step(64, 16, 1e5)
    wide, narrow, copied, cached = (
        costs.decode_step(model, step, part, 2, kernels)
        for kernels in (
            None, costs.Kernels(1), costs.Kernels(1, copied=True),
            costs.Kernels(2, cached=1 + 4 / 128),
        )
    )  # fmt: skip
    experts = 48 * 32 * _EXPERT
    reached = costs.touched(16 * 8, 128) / 128 * experts
    scales = 48 * (128 * (32 + 2 * 4) + 2048) + 151_936
    saved = _ATTENTION + _ROUTERS + _HEAD + reached - 4 * scales
    assert wide.memory - narrow.memory == pytest.approx(saved)
    assert wide.flops == narrow.flops
    # Where a layer's experts are cast before their product, all are read, written and read.
    assert copied.memory - narrow.memory == pytest.approx(3 * experts + reached)
    assert wide.memory - cached.memory == pytest.approx(1e5 * 48 * 2 * 4 * (128 - 4))


EXPERTS = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8,
           "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
           "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip


def tiny_experts(**leaves):
    """`tiny` with a mixture of 8 experts in every layer."""
    config = tiny(**leaves)
    config.model.overrides.update(EXPERTS)
    return config


def paper(train=(1, 4, 8, 2, 1), rollout=(1, 1, 4, 1, 1)):
    """The 30B model, and its layouts of so many devices along each axis of the mesh."""
    model = cases.architecture(qwen3_30b_a3b_dapo17k.get_config())
    return (
        model,
        Layout(AbstractMesh(train, MESH_AXES), "train"),
        Layout(AbstractMesh(rollout, MESH_AXES), "rollout"),
    )


# By hand, from Qwen3-30B-A3B's published sizes.
_ATTENTION = 48 * 2048 * 128 * (2 * 32 + 2 * 4)
_EXPERT = 3 * 2048 * 768
_ROUTERS = 48 * 2048 * 128
_HEAD = 151_936 * 2048
_NORMS = 48 * (2 * 2048 + 2 * 128) + 2048


def test_bytes_of_experts_are_those_of_what_they_are_cut_over():
    model, train, rollout = paper()
    whole = _ATTENTION + 48 * 128 * _EXPERT + _ROUTERS + 2 * _HEAD + _NORMS
    assert whole == 30_532_122_624
    assert param_bytes(model, None, "float32") == 4 * whole
    # In training everything but the norms is cut over all 64 devices, experts or not.
    assert param_bytes(model, train, "float32") == 4 * ((whole - _NORMS) // 64 + _NORMS)
    # In the rollout experts alone, over 4; routers stay float32.
    rest = _ATTENTION + 2 * _HEAD + _NORMS
    own = 2 * (48 * 32 * _EXPERT + rest) + 4 * _ROUTERS
    assert param_bytes(model, rollout, "bfloat16") == own
    assert own == pytest.approx(17.6e9, rel=0.01)
    active = costs.matrices(model) + 48 * 8 * _EXPERT + 2 * _HEAD
    assert costs.matrices(model) == _ATTENTION + _ROUTERS
    assert active == pytest.approx(3.35e9, rel=0.01)  # its "A3B"


def test_bytes_of_int8_weights_count_their_scales():
    model, train, rollout = paper()
    scales = 48 * ((32 + 2 * 4) * 128 + 2048 + 128 * (2 * 768 + 2048)) + 151_936
    matrices = _ATTENTION + 48 * 128 * _EXPERT + _HEAD
    rest = 2 * (_HEAD + _NORMS) + 4 * _ROUTERS
    assert param_bytes(model, None, "int8") == matrices + 4 * scales + rest
    spread = 48 * 128 * (_EXPERT + 4 * (2 * 768 + 2048))  # over four devices' experts
    own = matrices + 4 * scales + rest - spread * 3 // 4
    assert param_bytes(model, rollout, "int8") == own
    # Rows of the embedding travel with all axes but tensor; scales along it alone.
    assert param_bytes(model, train, "int8") < param_bytes(model, train, "bfloat16")


def test_the_programs_of_int8_weights_compile_on_a_mesh():
    config = tiny_experts(
        **SMALL, model__rollout_dtype="int8", mesh__expert=2, rollout_mesh__expert=2
    )
    case = cases.build(config, machine(4), mean_length=12)
    for program in programs.programs(case):
        if program.name.startswith(("hand-over", "prefill", "decode")):
            assert "s8[" in program.lower().compile().as_text()


def test_experts_over_devices_are_exchanged_and_others_gathered():
    model, together, _ = paper((1, 4, 8, 2, 1))
    _, alone, _ = paper((1, 32, 1, 2, 1))
    rows = Rows(32 * 34_816, 0, 0)
    tokens, kernels = 32 * 34_816 / 64, 48 * 128 * _EXPERT
    for layout, sent in ((together, 1.25 * 8 * 48 * tokens), (alone, 0)):
        part, X = costs.parts(layout), layout.size("experts")
        rest = 64 // X
        forward, backward = (
            costs.expert_pass(model, rows, part, 2, gradient=gradient) for gradient in (False, True)
        )
        gathered = kernels / X * (rest - 1) / rest
        assert forward.flops == pytest.approx(2 * 8 * _EXPERT * 48 * tokens)
        assert backward.flops == pytest.approx(8 / 3 * forward.flops)
        there = sent * (X - 1) / X
        assert forward.links == pytest.approx(2 * gathered + there * (2 * 4096 + 4))
        assert backward.links == pytest.approx((2 + 4) * gathered + there * (3 * 4096 + 12))


@pytest.mark.parametrize(("assignments", "num_experts"), [(1, 4), (3, 4), (4, 3)])
def test_experts_touched_are_those_of_all_ways_to_draw(assignments, num_experts):
    ways = list(itertools.product(range(num_experts), repeat=assignments))
    mean = sum(len(set(way)) for way in ways) / len(ways)
    assert costs.touched(assignments, num_experts) == pytest.approx(mean)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_operations_of_an_update_with_experts_are_those_of_its_program(remat):
    config = tiny_experts(model__remat=remat, model__expert_kernel="reference", **WHOLE)
    case = cases.build(config, machine(1), mean_length=12)
    batch, _ = programs.train_batch(case)
    number = jax.ShapeDtypeStruct((), np.float32)
    state = abstract_state(case.rule)
    traced = update_step.trace(state, batch, number, number, rule=case.rule)
    rows, sums = gathered_rows(batch.rows, case.model)
    counted = costs.training(
        case.model, rows, Parts(), 4, remat=remat, kernel="reference", chunk=128
    )
    # The reference multiplies every row with every kernel.
    products_of_experts = sum(
        costs.expert_pass(case.model, rows, Parts(), 4, gradient=gradient).flops
        for gradient in (False, True)
    )
    found = products(traced.jaxpr.jaxpr) / batch.rows.num_microbatches - sums
    assert found == pytest.approx(counted.flops + 7 * products_of_experts, rel=1e-3)


@pytest.mark.parametrize("slots", [2, 8])
def test_operations_of_a_decode_step_with_experts_are_those_of_its_program(slots):
    """Of few rows the experts are picked out, of more they are sorted."""
    config = tiny_experts(rollout__num_slots=slots, model__expert_kernel="reference", **SMALL)
    case = cases.build(config, machine(1), mean_length=12)
    found, step = traced_step(case)
    assert step.rows == slots
    extra = 0
    if slots == 8:
        extra = 7 * 2 * slots * 2 * 3 * 64 * 32 * case.model.num_layers
    counted = costs.decode_step(case.model, step, Parts(), 4).flops
    assert found == pytest.approx(counted + extra, rel=0.01)


def test_mesh_sizes_divide_the_work():
    case = cases.build(tiny(), machine(1))
    rows = Rows(8 * 1024, costs.causal_pairs(8, 1024), 4096)
    settings = {"remat": "full", "kernel": "splash", "chunk": 64}
    alone = costs.training(case.model, rows, Parts(), 2, **settings)
    assert alone.links == 0
    for part in (Parts(8, 1, 8, 1, 1), Parts(2, 4, 8, 1, 1), Parts(4, 1, 4, 2, 1)):
        shared = costs.training(case.model, rows, part, 2, **settings)
        assert shared.flops == pytest.approx(alone.flops / 8)
        assert shared.links > 0
    gathered = costs.forward(case.model, rows, Parts(8, 1, 8, 1, 1), 2).links
    assert gathered == pytest.approx(2 * costs.matrices(case.model) * 7 / 8)


def test_matrices_are_those_of_the_parameters():
    model = cases.build(tiny(), machine(1)).model
    layers = decoder.abstract_params(model)["layers"]
    kernels = [x.size for path, x in jax.tree.leaves_with_path(layers) if path[-1].key == "kernel"]
    assert costs.matrices(model) == sum(kernels)


def test_a_played_rollout_is_what_the_engine_does():
    """The engine's statistics, from the lengths of the responses that it drew."""
    config = cases.architecture(tiny())
    params = decoder.init_params(jax.random.key(0), config)
    how = Forward(config, attention="reference")
    sampling = Sampling(max_response_length=200, stop_token_ids=(3,))
    for pages in (400, 40):
        engine = Engine(
            how, sampling, num_slots=24, max_prompt_length=21, chunk_length=8,
            max_prefill_tokens=256, cache=Cache(pages * page_bytes(config, "float32", 8) / 1e9, 8),
        )  # fmt: skip
        requests = [Request(i, np.r_[i, np.arange(20)]) for i in range(12)]
        responses, stats = engine.generate(params, requests, group_size=4, seed=0)
        play = playing.played(engine, 21, [len(r.tokens) for r in responses], 4)
        assert (stats.preemptions > 0) == (pages == 40)
        assert play.preemptions == stats.preemptions
        assert play.recomputed == stats.recomputed_tokens
        assert play.steps == stats.decode_steps
        assert play.peak == stats.pages_peak
        assert play.utilisation == stats.slot_utilisation
        assert sum(one.calls for one in play.prefills) == stats.prefill_calls
        # On one device every token but the last is read once, whatever waits or comes back.
        entries = sum(sum(range(21, 21 + len(r.tokens))) for r in responses)
        entries += 8 / 2 * sum(len(r.tokens) for r in responses)
        assert sum(chunk.entries for chunk in play.chunks) == entries


def test_the_fullest_device_decides():
    case = cases.build(tiny(), machine(2), mean_length=100)
    lengths = [40] * 8 + [10] * 8  # a prompt's on either device
    play = playing.played(case.engine, 16, lengths, 8)
    assert play.steps == 40
    half = case.engine.page_size / 2
    assert sum(c.entries for c in play.chunks) == 8 * sum(16 + half + j for j in range(40))
    assert sum(c.steps * c.live for c in play.chunks) == sum(lengths)


def test_assumed_lengths_have_their_mean_and_their_longest():
    lengths = costs.power_lengths(4000, 32768, 1024)
    assert max(lengths) == 32768
    assert np.mean(lengths) == pytest.approx(4000, rel=0.01)
    with pytest.raises(ValueError, match="mean length of 9"):
        costs.power_lengths(9, 8, 4)


def test_the_bound_is_what_takes_longest():
    topology = machine()
    program = programs.Program("p", None, Work(1e11, 5e10, 1e9), 1, {"beside": 3e8})
    made = programs.Compiled(4 * 10**8, 10**8, 10**8, 4 * 10**8, 0, 0.1, 0.2)
    one = report.record(topology, program, made)
    assert one["seconds"] == {"compute": 1.0, "memory": 5.0, "interconnect": 1.0}
    assert one["bound"] == "memory"
    assert one["peak_bytes"] == 1.1e9
    assert one["over_bytes"] == pytest.approx(1e8)
    assert not one["fits"]


def test_a_compilers_own_refusal_is_read():
    message = "Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm."
    assert programs.memory_named(message) == (120.5 * 2**30, 95.74 * 2**30)
    assert programs.memory_named("RESOURCE_EXHAUSTED") == (1.0, 0.0)


# ---------------------------------------------------------------- whole rehearsals


ONE_A_ROW = {"train__packing": False, "train__microbatch_tokens": 0, "train__num_microbatches": 2}


def brought(case, prompts, monkeypatch):
    """(rows of each pass by name, batch of the first update) of a step, by what training calls.

    Responses have the assumed lengths; the log-probs of a pass are left out.
    """
    model, passes, wanted = case.model, {}, case.programs.passes(stale=case.stale)
    kind, shape = np.uint8, (0, 0)
    if model.num_experts:
        kind, shape = id_type(model.num_experts), (model.num_expert_layers, model.experts_per_token)

    def response(prompt, sample_id, length):
        floats = np.zeros(length, np.float32)
        ids = {}
        if model.num_experts:
            ids = {"expert_ids": np.zeros((length, *shape), kind),
                   "prompt_expert_ids": np.zeros((len(prompt.tokens), *shape), kind)}  # fmt: skip
        return Response(
            0, sample_id, np.ones(length, np.int32), floats, True, **ids, counted=True,
            versions=np.zeros(length, np.uint32), trained=np.ones(length, bool), advantage=0.0,
        )  # fmt: skip

    def passed(state, one, laid, planner):
        (name,) = (name for name, known in wanted.items() if known == one)
        passes[name] = put(laid_rows(planner, laid[0]), planner.layout)
        pairs = [pair for part in laid for pair in zip(part.prompts, part.responses, strict=True)]
        zeros = [np.zeros(len(r.tokens), np.float32) for _, r in pairs]
        ids = None
        if one.record_experts:
            lengths = [len(p.tokens) + len(r.tokens) for p, r in pairs]
            ids = [np.zeros((n, *shape), kind) for n in lengths]
        return PolicyLogprobs(zeros, zeros, ids, None)

    size, lengths = case.sizes.group_size, case.response_lengths
    groups = [
        Group(
            prompt,
            [response(prompt, i, n) for i, n in enumerate(lengths[k * size : (k + 1) * size])],
        )
        for k, prompt in enumerate(prompts)
    ]
    monkeypatch.setattr(stages, "policy_logprobs", passed)
    rollouts, width = stages.with_logprobs(
        Rollouts(groups, int(case.stale)), None, case.programs, case.planner, StepMetrics()
    )
    chosen = np.arange(case.sizes.responses_per_minibatch)
    batch, _ = stages.train_batch(rollouts, case.planner, chosen, width)
    return passes, put(batch, case.planner.layout)


def assert_same_shapes(made, wanted):
    """Of shapes and arrays: structure, shapes, types, and places where there is a mesh."""
    assert jax.tree.structure(made) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype


BROUGHT = {
    "text": (False, {}),
    "entropies": (False, {"objective__top_entropy_quantile": 0.2}),
    "a reference": (False, {"objective__kl_coef": 0.1}),
    "a reference, several epochs": (False, {"objective__kl_coef": 0.1, "train__num_epochs": 2}),
    "one update": (False, {"train__num_minibatches": 1}),
    "one update, whose tokens compete": (
        False, {"train__num_minibatches": 1, "objective__correction": "m2po"}),
    "experts": (True, {}),
    "experts, a reference, one update": (
        True, {"objective__kl_coef": 0.1, "train__num_minibatches": 1}),
    "partial rollouts, one update": (
        False, {"train__num_minibatches": 1, "rollout__overlap": 4, "rollout__max_age": 1}),
    "experts, partial rollouts": (True, {"rollout__overlap": 4, "rollout__max_age": 1}),
}  # fmt: skip


@pytest.mark.parametrize("rows", [{}, ONE_A_ROW], ids=["packed", "one a row"])
@pytest.mark.parametrize("name", BROUGHT)
def test_shapes_are_those_that_a_run_would_bring(name, rows, monkeypatch):
    experts, leaves = BROUGHT[name]
    case = cases.build((tiny_experts if experts else tiny)(**leaves, **rows), machine(),
                       mean_length=100)  # fmt: skip
    prompts = [Prompt(np.ones(16, np.int32))] * case.sizes.prompts_per_step
    passes, real = brought(case, prompts, monkeypatch)
    batch, _ = programs.train_batch(case)
    assert_same_shapes(batch, real)
    for made, wanted in zip(jax.tree.leaves(batch), jax.tree.leaves(real), strict=True):
        assert made.sharding == wanted.sharding
    wanted = case.programs.passes(stale=case.stale)
    assert list(passes) == list(wanted)
    for which, one in wanted.items():
        made, *_ = programs.pass_rows(case, one)
        assert_same_shapes(made, passes[which])
        assert made.tokens_RT.sharding == passes[which].tokens_RT.sharding


def test_rows_of_a_mixture_come_with_recorded_experts():
    case = cases.build(tiny_experts(), machine(), mean_length=100)
    rows = programs.train_batch(case)[0].rows
    for recorded in (rows.expert_ids.sampler, rows.expert_ids.old):
        assert recorded.shape == (*rows.tokens_RT.shape, 2, 2)
        assert recorded.dtype == np.uint8
        assert recorded.sharding.spec[0] == rows.tokens_RT.sharding.spec[0]
    rows, *_ = programs.pass_rows(case, case.programs.passes()["old"])
    assert rows.expert_ids.old is None


@pytest.mark.parametrize("make", [tiny, tiny_experts])
def test_one_update_with_a_reference_passes_over_the_responses_once(make):
    """The update's own: log-probs and experts of the old policy are those of its forward pass, and
    the reference policy's are computed beside them."""
    config = make(objective__kl_coef=0.1, train__num_minibatches=1)
    case = cases.build(config, machine(), mean_length=100)
    assert case.programs.passes() == {}
    assert not [p for p in programs.programs(case) if "log-probs" in p.name]
    batch, work = programs.train_batch(case)
    assert batch.responses.ref_logprobs_BT is None
    assert batch.responses.old_logprobs_BT is None
    alone = cases.build(make(train__num_minibatches=1), machine(), mean_length=100)
    _, without = programs.train_batch(alone)
    assert 1.2 < work.flops / without.flops < 1.5  # of three to four forward passes
    if case.model.num_experts:
        assert batch.rows.expert_ids.sampler is not None
        assert batch.rows.expert_ids.old is None
    several = make(objective__kl_coef=0.1, train__num_epochs=2)
    several = cases.build(several, machine(), mean_length=100)
    batch, _ = programs.train_batch(several)
    assert list(several.programs.passes()) == ["old", "ref"]
    assert batch.responses.old_logprobs_BT is not None
    assert batch.responses.ref_logprobs_BT is not None
    if case.model.num_experts:
        assert batch.rows.expert_ids.old is not None


def test_every_pass_is_among_what_settings_of_training_change():
    config = tiny(objective__kl_coef=0.1, train__num_epochs=2)
    case = cases.build(config, machine(), mean_length=100)
    names = [p.name for p in programs.programs(case) if "log-probs" in p.name]
    assert names == ["log-probs", "log-probs (ref)"]
    assert set(names) < set(search._TRAINING)
    assert len({search._counted(case, name) for name in names}) == 1


def test_a_mixture_is_rehearsed():
    """Experts over 4 of 8 devices, in training and rollout."""
    config = tiny_experts(model__expert_kernel="reference", model__remat="full", **SMALL)
    config.model.overrides.num_hidden_layers = 1
    config.mesh.expert = config.rollout_mesh.expert = 4
    config.train.microbatch_tokens = 8 * 32
    case = cases.build(config, machine(), mean_length=12)
    arguments = {}
    for program in programs.programs(case):
        if program.name in ("hand-over", "decode chunk", "update"):
            one = report.record(case.topology, program, programs.compiled(program))
            assert one["fits"]
            assert one["link_bytes"] > 0
            beside = one["bytes"]["beside"].get("inputs that it does not read", 0)
            arguments[program.name] = one["bytes"]["arguments"] + beside
    state = sum(resident.state_bytes(case, "params", "opt_state").values())
    rows = resident.device_bytes(programs.train_batch(case)[0])
    assert arguments["update"] == pytest.approx(state + rows, rel=0.01)
    assert arguments["hand-over"] == pytest.approx(state / 3, rel=0.01)
    decode = resident.pool_bytes(case) + resident.weights_bytes(case)
    assert arguments["decode chunk"] == pytest.approx(decode, rel=0.05)


def test_other_expert_axes_are_among_the_settings_that_a_search_looks_at():
    config = tiny_experts(**SMALL)
    config.mesh.expert, config.train.microbatch_tokens = 4, 8 * 32
    case = cases.build(config, machine(), mean_length=12)
    found = {changes.get("mesh.expert") for changes, _ in search._training(case)}
    assert found == {None, 1, 8}


FIELDS = {
    "fits", "bytes", "peak_bytes", "usable_bytes", "over_bytes", "compiler_error", "flops",
    "memory_bytes", "link_bytes", "seconds", "roofline_s", "counted", "share", "bound",
    "calls_a_step", "lower_s",
    "compile_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def rehearsed():
    """A case, and its rehearsal where memory is plenty."""
    case = cases.build(tiny(), machine(), mean_length=100)
    return case, report.rehearse(case, say=lambda _: None)


def test_a_rehearsal_reports_every_program(rehearsed):
    _, found = rehearsed
    assert found["fits"]
    assert list(found["programs"]) == [
        "hand-over", "prefill", "copy pages", "decode chunk", "decode chunk (held out)",
        "log-probs", "update",
    ]  # fmt: skip
    for one in found["programs"].values():
        assert set(one) == FIELDS
        assert one["fits"]
        assert one["peak_bytes"] > 0
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again["step"]["expected_s"] > again["step"]["roofline_s"] > 0
    assert again["capacity"]["rows_a_host"] == 128
    text = report.text(found)
    assert "| update |" in text
    assert "The pool of a device has" in text
    assert "blocks (decoding)" in text
    told = {name for name, one in found["programs"].items() if one["counted"]}
    assert told == {"hand-over", "log-probs", "update"}
    assert "counted from the compiled instructions for hand-over" in text
    assert "**log-probs**" in report.instructions(found)


def test_arguments_are_the_bytes_of_the_arrays_themselves(rehearsed):
    case, found = rehearsed
    size = found["programs"]["update"]["bytes"]
    batch, _ = programs.train_batch(case)
    responses = batch.responses
    read = (
        abstract_state(case.rule), batch.rows, responses.starts_B, responses.response_mask_BT,
        responses.advantages_B, responses.old_logprobs_BT, responses.sampler_logprobs_BT,
    )  # fmt: skip
    assert size["arguments"] == pytest.approx(resident.device_bytes(read), rel=0.01)
    beside = size["beside"]["inputs that it does not read"]
    rate = 4  # which it reads, and which is no part of state or batch
    assert beside == resident.device_bytes(responses.group_ids_B) - rate
    pool = case.sampled.pages * 2 * 2 * 2 * case.engine.page_size * case.model.head_dim * 4
    assert resident.pool_bytes(case) == pool * case.model.num_kv_heads / 2
    decode = found["programs"]["decode chunk"]["bytes"]["arguments"]
    assert decode == pytest.approx(pool + resident.weights_bytes(case), rel=0.02)


@pytest.mark.parametrize("name", ["update", pytest.param("prefill", marks=pytest.mark.slow)])
def test_what_is_too_large_is_named_with_a_change_that_fits(rehearsed, name):
    case, found = rehearsed
    memory = 0.75 * found["programs"][name]["peak_bytes"]
    # The same pool, asked for: without, it would be as large as what the machine has left.
    pool = {"rollout__cache_gb": resident.pool_bytes(case) / 1e9}
    small = cases.build(tiny(**pool), machine(memory=memory), mean_length=100)
    assert resident.pool_bytes(small) == resident.pool_bytes(case)
    records = {key: resized(one, memory) for key, one in found["programs"].items()}
    found = {**found, "programs": records}
    assert not records[name]["fits"]
    found["capacity"] = report.capacity(small, records)
    found["advice"] = [one for one in search.advice(small, found) if one["program"] == name]
    (one,) = found["advice"]
    assert one["change"]
    told = search.refusal(found)
    assert f"{name} is " in told
    assert f"({one['over_bytes']:,.0f} bytes)" in told
    assert search.flags(one["change"]) in told
    other = search.changed(small, one["change"])
    program = next(p for p in programs.programs(other) if p.name == name)
    assert report.record(other.topology, program, programs.compiled(program))["fits"]


def resized(one, memory):
    """A program's record on a machine with other memory."""
    over = max(0.0, one["peak_bytes"] - memory)
    return {**one, "usable_bytes": memory, "over_bytes": over, "fits": not over}


def test_the_launcher_refuses_in_a_line():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.rehearse", "--config=configs/quickstart.py",
         "--topology=v5p:9x9x9"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "does not exist; valid: v5p:2x2x1" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_launcher_writes_its_report_into_both_files(tmp_path):
    files = {"json": tmp_path / "found.json", "markdown": tmp_path / "found.md"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.rehearse", "--config=configs/quickstart.py",
         "--topology=local", *(f"--{flag}={file}" for flag, file in files.items())],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(files["json"].read_text())["fits"] is True
    assert files["markdown"].read_text() in done.stdout
