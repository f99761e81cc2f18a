"""The engine with a mixture of experts: what the sampler records is what the trainer routes."""

import functools
import math
import re

import jax
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.learner.logprobs import LogprobRule, microbatch_logprobs
from luspo_jax.models import decoder, decoder_layers
from luspo_jax.models.forward import Forward
from luspo_jax.ops.paged_attention import Places
from luspo_jax.ops.pages import PAGES_AXES, Pages
from luspo_jax.rollout import Cache, Engine, Sampling, loop, programs
from luspo_jax.types import ExpertIds
from tests.models import expert_cases
from tests.rollout import rollout_cases as cases
from tests.row_cases import plan_of, rows_of

SIZES = {"vocab_size": 98, "num_layers": 3}
MODELS = {
    "experts in all layers": expert_cases.config(8, 2, **SIZES),
    "dense layers between": expert_cases.config(8, 2, dense_layers=(1,), **SIZES),
    "300 experts": expert_cases.config(300, 3, expert_dim=4, **SIZES),
}
MODEL = MODELS["dense layers between"]
RAGGED = cases.requests_of([3, 17, 1, 9, 12, 5], 98)
SAMPLING = Sampling(31, (0, 11, 50))
MESHES = {
    "expert 8": {"expert": 8},
    "data 2, expert 4": {"data": 2, "expert": 4},
    "data 2, expert 2, tensor 2": {"data": 2, "expert": 2, "tensor": 2},
}


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Runs of few pages, so that long prompts are read in several."""
    monkeypatch.setattr(loop, "SMALLEST_RUN", 4)
    monkeypatch.setattr(loop, "LONGEST_RUN", 8)


def _layout(mesh):
    return sharding.layout("rollout", MESHES[mesh], jax.devices()) if mesh else None


def _engine(mesh=None, model=MODEL, dtype="float32", expert_kernel="reference", **kwargs):
    """`pages` beyond those of the longest response on each device."""
    pages = kwargs.pop("pages", None)
    sizes = {"num_slots": 6, "max_prompt_length": 17, "chunk_length": 8, "record_experts": True,
             "cache": Cache(None, 4)}  # fmt: skip
    how = Forward(model, dtype, expert_kernel=expert_kernel, layout=_layout(mesh))
    engine = Engine(how, SAMPLING, **(sizes | kwargs))
    if pages is not None:
        engine.take_room(engine.least_bytes + pages * engine.page_bytes)
    return engine


@functools.cache
def _generate(mesh=None, model=MODEL, group_size=4, **kwargs):
    """Responses to prompts of several lengths: refills, preemption, stop tokens, cuts."""
    engine, params = _engine(mesh, model, **kwargs), expert_cases.params(model)
    if mesh:
        axes = decoder.param_axes(model)
        params = jax.device_put(params, sharding.shardings(axes, engine.layout))
    if engine.dtype != np.float32:
        params = decoder.cast(params, engine.dtype)
    responses, stats = engine.generate(params, RAGGED, group_size=group_size, seed=5, step=2)
    assert stats.prefill_calls > 1 or mesh
    assert stats.preemptions > 0 or "pages" not in kwargs
    assert len({r.stopped for r in responses}) == 2
    return responses


@functools.partial(jax.jit, static_argnames="rule")
def _logprobs(params, rows, *, rule):
    return microbatch_logprobs(params, rows, rule=rule)


def _trainers(responses, model=MODEL, replay="none"):
    """(rows, gap to the sampler's log-probs of each token, recorded ids, the trainer's)."""
    prompts = {request.prompt_id: request.tokens for request in RAGGED}
    prompts, tokens = [prompts[r.prompt_id] for r in responses], [r.tokens for r in responses]
    plan = plan_of(prompts, tokens, width=48)
    recorded = plan.lay([np.concatenate([r.prompt_expert_ids, r.expert_ids]) for r in responses])
    ids = ExpertIds(sampler=recorded) if replay != "none" else None
    rows = rows_of(model, plan, prompts, tokens, expert_ids=ids)
    rule = LogprobRule(Forward(model), head_chunk_tokens=64, replay=replay)
    found = _logprobs(expert_cases.params(model), rows, rule=rule)
    sampled_RT = plan.place([r.logprobs for r in responses])  # one response a row
    gap = np.abs(np.asarray(found.logprobs_RT) - sampled_RT)[rows.response_mask_RT]
    return rows, gap, recorded, np.asarray(found.router.expert_ids)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("dense layers between", "reference"),
        pytest.param("300 experts", "reference", marks=pytest.mark.slow),
        pytest.param("experts in all layers", "reference", marks=pytest.mark.slow),
        pytest.param("dense layers between", "blocks", marks=pytest.mark.slow),
    ],
)
def test_the_sampler_records_what_the_trainer_routes(name, implementation):
    """Ids exactly, log-probs to rounding: prompts, responses, refilled slots, samples, cut rows."""
    model = MODELS[name]
    responses = _generate(model=model, expert_kernel=implementation, pages=4, num_slots=12)
    for r in responses:
        assert r.expert_ids.shape == (
            len(r.tokens),
            model.num_expert_layers,
            model.experts_per_token,
        )
        assert r.expert_ids.dtype == (np.uint16 if model.num_experts > 256 else np.uint8)
    assert any(len(r.tokens) == SAMPLING.max_response_length for r in responses)
    rows, gap, recorded, trainers = _trainers(responses, model)
    real = rows.segment_ids_RT > 0
    np.testing.assert_array_equal(recorded[real], trainers[real])
    assert recorded[real].max() >= model.num_experts * 0.8
    assert gap.max() <= 1e-5
    _, gap, _, _ = _trainers(responses, model, replay="sampler")
    assert gap.max() <= 1e-5


@pytest.mark.slow
def test_replay_takes_the_gap_that_another_routing_leaves():
    """Of a sampler that rounds weights and activations: with its experts the trainer is nearer."""
    responses = _generate(dtype="bfloat16", group_size=16)
    rows, alone, recorded, trainers = _trainers(responses)
    _, replayed, _, _ = _trainers(responses, replay="sampler")
    differ = (recorded != trainers).any(-1)[rows.segment_ids_RT > 0].mean()
    print(
        f"routed otherwise {differ:.3f} of tokens and layers; mean |gap| {alone.mean():.2e} -> "
        f"{replayed.mean():.2e}, largest {alone.max():.3f} -> {replayed.max():.3f}"
    )
    assert 0 < differ < 0.2
    assert replayed.mean() < 0.8 * alone.mean()
    assert replayed.max() < alone.max()


# ---------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("mesh", "implementation"),
    [
        ("data 2, expert 2, tensor 2", "reference"),
        pytest.param("data 2, expert 4", "reference", marks=pytest.mark.slow),
        pytest.param("expert 8", "reference", marks=pytest.mark.slow),
        pytest.param("data 2, expert 4", "blocks", marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_tokens_and_experts_are_those_of_one_device_but_at_ties(mesh, implementation):
    prompts = {request.prompt_id: request for request in RAGGED}
    ties = tokens = 0
    others = _generate(mesh, expert_kernel=implementation, pages=3, num_slots=24)
    for mine, other in zip(_generate(expert_kernel="reference"), others, strict=True):
        assert (mine.prompt_id, mine.sample_id) == (other.prompt_id, other.sample_id)
        np.testing.assert_array_equal(mine.prompt_expert_ids, other.prompt_expert_ids)
        length = min(len(mine.tokens), len(other.tokens))
        differ = np.flatnonzero(mine.tokens[:length] != other.tokens[:length])
        same = differ[0] if len(differ) else length
        tokens += same
        np.testing.assert_allclose(mine.logprobs[:same], other.logprobs[:same], atol=1e-5)
        np.testing.assert_array_equal(mine.expert_ids[:same], other.expert_ids[:same])
        if len(differ):
            ties += 1
            logits = cases.teacher_logits(MODEL, expert_cases.params(MODEL), RAGGED, [mine])
            noise = cases.noise(5, 2, prompts[mine.prompt_id], mine)[same]
            assert cases.boundary_distance(logits[0][same], noise) <= 1e-5
        else:
            assert len(mine.tokens) == len(other.tokens)
    assert tokens > 250
    assert ties <= 1
    _, gap, _, _ = _trainers(others)
    assert gap.max() <= 1e-5


@pytest.mark.parametrize(
    "mesh",
    [
        "data 2, expert 4",
        pytest.param("expert 8", marks=pytest.mark.slow),
        pytest.param("data 2, expert 2, tensor 2", marks=pytest.mark.slow),
    ],
)
def test_a_decode_step_moves_tokens_and_no_expert(mesh):
    layout, rows = _layout(mesh), 16
    axes = decoder.param_axes(MODEL)

    def placed(tree, axes):
        leaves, treedef = jax.tree.flatten(tree)
        axes = jax.tree.leaves(axes, is_leaf=lambda node: type(node) is tuple)
        return treedef.unflatten(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(a))
            for x, a in zip(leaves, axes, strict=True)
        )

    how = Forward(MODEL, layout=layout, paged_attention="blocks")
    sizes = {"how": Forward(MODEL), "num_pages": 256, "page_size": 4}
    pages = jax.eval_shape(functools.partial(programs.empty_pages, **sizes))
    of_rows = [np.zeros(rows, kind) for kind in (np.int32, bool, np.uint32)]
    integers, flags, ids = of_rows
    places = Places(np.zeros((rows, 16), np.int32), integers, flags)
    asked = programs.Rows(integers, places, integers, integers, flags, ids, ids, ids,
                          jax.random.key(0), np.int32(8), np.int32(rows))  # fmt: skip
    text = programs.decode_chunk.lower(
        placed(decoder.abstract_params(MODEL), axes), placed(pages, Pages(PAGES_AXES, PAGES_AXES)),
        asked, how=how, sampling=SAMPLING, chunk_length=8, record=True,
    ).compile().as_text()  # fmt: skip
    shapes = re.findall(r"= (.*?) (?:all-|collective-|reduce-scatter)[a-z-]*\(", text)
    moved = [
        math.prod(map(int, dims.split(",")))
        for shape in shapes
        for dims in re.findall(r"\w\d+\[([\d,]+)\]", shape)
    ]
    most = rows // layout.size("batch") * MODEL.vocab_size if layout.size("vocab") > 1 else 0
    assert max(moved) <= max(most, rows // layout.mesh.shape["data"] * MODEL.embed_dim)


# ---------------------------------------------------------------- work


@pytest.mark.slow
def test_slots_without_a_response_send_no_token_to_experts(monkeypatch):
    """What decoding sends is counted: K experts a layer for each token that is generated."""
    sent, real = [], decoder_layers.expert_mlp

    def counted(x, ids, *args):
        if x.ndim == 2:
            jax.debug.callback(lambda ids: sent.append((ids < 8).sum()), ids)
        return real(x, ids, *args)

    monkeypatch.setattr(decoder_layers, "expert_mlp", counted)
    # A length of chunk that nobody else has: the program must be traced here, and is not kept.
    engine, params = _engine(num_slots=16, chunk_length=9), expert_cases.params(MODEL)
    _, stats = engine.generate(params, RAGGED, group_size=2, seed=5, step=2)
    jax.effects_barrier()
    assert stats.slot_utilisation < 0.8
    a_token = MODEL.num_expert_layers * MODEL.experts_per_token
    # Each response reads its prompt's last token too.
    assert sum(sent) == (stats.generated_tokens + len(RAGGED) * 2) * a_token


# ---------------------------------------------------------------- refusals


def test_a_dense_model_records_no_experts():
    with pytest.raises(ValueError, match="record_experts=True needs a mixture of experts"):
        Engine(
            Forward(cases.config()), SAMPLING, num_slots=2, max_prompt_length=9, record_experts=True
        )


def test_experts_that_the_mesh_cannot_cut_are_refused():
    model = expert_cases.config(6, 2, **SIZES)
    message = r"num_experts 6 cannot be cut into 8 equal parts \(mesh expert 8\)"
    with pytest.raises(sharding.MeshError, match=message):
        _engine("expert 8", model)


def test_an_unknown_product_of_experts_is_refused():
    engine = _engine(expert_kernel="block")
    with pytest.raises(ValueError, match="implementation 'block' is unknown"):
        engine.generate(expert_cases.params(MODEL), RAGGED[:1], group_size=1, seed=0)
