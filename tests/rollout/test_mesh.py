"""The rollout on a mesh: the tokens of one device, a share of the memory, no weight gathered."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.models import decoder
from luspo_jax.models.forward import Forward
from luspo_jax.models.rope import RopeScaling
from luspo_jax.ops import paged_prefill
from luspo_jax.ops.paged_attention import Places
from luspo_jax.ops.paged_prefill import Runs
from luspo_jax.ops.pages import PAGES_AXES, Pages
from luspo_jax.rollout import Cache, Engine, Request, Sampling, loop, programs
from tests.rollout import rollout_cases as cases

MODELS = {kind: cases.config(98, model_type=kind) for kind in ("llama", "qwen2", "qwen3")}
# Positions up to 48, of which the scaling takes 16 to be the original ones.
MODELS["llama"] = dataclasses.replace(MODELS["llama"], rope_scaling=RopeScaling("llama3", 8.0, 16))
SPLIT_THRICE = "data 2, tensor 2, context 2"
RAGGED = cases.requests_of([3, 17, 1, 9, 12, 5], 98)
SAMPLING = Sampling(31, (0, 11, 50))
MESHES = {
    "data 8": {"data": 8},
    "data 4, tensor 2": {"data": 4, "tensor": 2},
    SPLIT_THRICE: {"data": 2, "tensor": 2, "context": 2},
    "data 2, context 4": {"data": 2, "context": 4},
}


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Runs of few pages, so that long prompts are read in several."""
    monkeypatch.setattr(loop, "SMALLEST_RUN", 4)
    monkeypatch.setattr(loop, "LONGEST_RUN", 8)
    monkeypatch.setattr(paged_prefill, "_BEFORE", 16)


def _layout(mesh):
    if mesh is None:
        return None
    return sharding.layout("rollout", MESHES.get(mesh) or dict(mesh), jax.devices())


def _placed(params, model, layout):
    if layout is None:
        return params
    return jax.device_put(params, sharding.shardings(decoder.param_axes(model), layout))


def _engine(mesh, kind="qwen3", **kwargs):
    """`pages` beyond those of the longest response on each device."""
    pages = kwargs.pop("pages", None)
    sizes = {"num_slots": 6, "max_prompt_length": 17, "chunk_length": 8, "cache": Cache(None, 2)}
    engine = Engine(Forward(MODELS[kind], layout=_layout(mesh)), SAMPLING, **(sizes | kwargs))
    if pages is not None:
        engine.take_room(engine.least_bytes + pages * engine.page_bytes)
    return engine


def _generate(mesh, kind="qwen3", *, params=None, group_size=5, **kwargs):
    engine = _engine(mesh, kind, **kwargs)
    params = cases.random_params(MODELS[kind]) if params is None else params
    params = _placed(params, MODELS[kind], engine.layout)
    return engine.generate(params, RAGGED, group_size=group_size, seed=5, step=2)


@functools.cache
def _one_device(kind):
    return _generate(None, kind)[0]


# What is sampled.


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        *((mesh, "qwen3") for mesh in MESHES),
        (SPLIT_THRICE, "qwen2"),
        pytest.param(SPLIT_THRICE, "llama", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_one_device_but_at_ties(mesh, kind):
    """Refills (30 responses on few rows), preemption, ragged prompts, stop tokens."""
    others, stats = _generate(mesh, kind, pages=3, num_slots=24)
    assert stats.preemptions > 0
    assert stats.generated_tokens > 300
    prompts = {request.prompt_id: request for request in RAGGED}
    model, params = MODELS[kind], cases.random_params(MODELS[kind])
    ties = tokens = 0
    for mine, other in zip(_one_device(kind), others, strict=True):
        assert (mine.prompt_id, mine.sample_id) == (other.prompt_id, other.sample_id)
        length = min(len(mine.tokens), len(other.tokens))
        differ = np.flatnonzero(mine.tokens[:length] != other.tokens[:length])
        same = differ[0] if len(differ) else length
        tokens += same
        np.testing.assert_allclose(mine.logprobs[:same], other.logprobs[:same], atol=1e-5)
        if not len(differ):
            assert len(mine.tokens) == len(other.tokens)
            assert mine.stopped == other.stopped
            continue
        # Equal up to here, so the logits of this draw are those of `mine`.
        ties += 1
        logits = cases.teacher_logits(model, params, RAGGED, [mine])[0][same]
        noise = cases.noise(5, 2, prompts[mine.prompt_id], mine)[same]
        assert cases.boundary_distance(logits, noise) <= 1e-5
    assert tokens > 300
    assert ties <= 1


@pytest.mark.parametrize("mesh", ["data 4, tensor 2", "data 2, context 4"])
def test_no_mesh_changes_the_noise(mesh):
    """With equal logits a token is its noise: other bits would be other tokens."""
    params = dict(cases.random_params(MODELS["qwen3"]))
    params["embedding"] = jnp.zeros_like(params["embedding"])
    base, _ = _generate(None, params=params)
    others, _ = _generate(mesh, params=params)
    assert [r.tokens.tolist() for r in others] == [r.tokens.tolist() for r in base]


def test_few_responses_leave_slots_idle_and_the_statistics_say_so():
    engine = _engine("data 8", num_slots=11)
    assert engine.num_slots == 16
    params = _placed(cases.random_params(MODELS["qwen3"]), MODELS["qwen3"], engine.layout)
    responses, stats = engine.generate(params, RAGGED[:3], group_size=1, seed=5, step=2)
    assert [r.prompt_id for r in responses] == [r.prompt_id for r in RAGGED[:3]]
    tokens = sum(len(r.tokens) for r in responses)
    assert stats.generated_tokens == tokens
    np.testing.assert_allclose(stats.slot_utilisation, tokens / (8 * stats.decode_steps))
    assert stats.preemptions == 0
    assert engine.generate(params, [], group_size=1, seed=5)[0] == []


def test_a_second_call_on_a_mesh_compiles_nothing():
    assert _generate("data 2, context 4")[1].prefill_calls > 1
    assert _generate("data 2, context 4")[1].compilations == 0


# Where things lie.

LENGTH, ROWS, RUNS, RUN, SIZE = 1024, 16, 8, 16, 4


def _abstract(tree, axes_tree, layout):
    """Shapes, types and, with a layout, shardings."""
    leaves, treedef = jax.tree.flatten(tree)
    axes = jax.tree.leaves(axes_tree, is_leaf=lambda node: type(node) is tuple)
    of = [None if layout is None else layout.sharding(a) for a in axes]
    return treedef.unflatten(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(leaves, of, strict=True)
    )


def _parts(layout, axis):
    return 1 if layout is None else layout.size(axis)


def _arguments(layout):
    """(params, pages, rows, runs, tokens) for ROWS rows of LENGTH tokens."""
    model = MODELS["qwen3"]
    params = _abstract(decoder.abstract_params(model), decoder.param_axes(model), layout)
    count = ROWS * LENGTH // SIZE  # as many on all devices together as one device needs
    pages = jax.eval_shape(
        functools.partial(programs.empty_pages, how=Forward(model), num_pages=count, page_size=SIZE)
    )
    pages = _abstract(pages, Pages(PAGES_AXES, PAGES_AXES), layout)
    width = LENGTH // SIZE // _parts(layout, "cache_length")

    def whole(count, *shape, kind=np.int32):
        return np.zeros((count, *shape), kind)

    places = Places(whole(ROWS, width), whole(ROWS), whole(ROWS, kind=bool))
    ids = [whole(ROWS, kind=np.uint32)] * 3
    rows = programs.Rows(
        whole(ROWS), places, whole(ROWS), whole(ROWS), whole(ROWS, kind=bool), *ids,
        jax.random.key(0), np.int32(8), np.int32(ROWS),
    )  # fmt: skip
    runs = Runs(whole(RUNS, width), whole(RUNS), whole(RUNS))
    return params, pages, rows, runs, (whole(RUNS, RUN), whole(RUNS))


@functools.cache
def _compiled(mesh, program):
    layout = _layout(mesh)
    how = Forward(MODELS["qwen3"], layout=layout, paged_attention="blocks")
    params, pages, rows, runs, tokens = _arguments(layout)
    if program == "decode":
        sizes = {"sampling": SAMPLING, "chunk_length": 8}
        lowered = programs.decode_chunk.lower(params, pages, rows, how=how, **sizes)
    elif program == "prefill":
        lowered = programs.prefill.lower(params, pages, runs, tokens, how=how)
    else:
        some = np.zeros(8, np.int32)
        lowered = programs.copy_pages.lower(pages, some, some, layout=layout)
    return lowered.compile()


def _moved(compiled):
    """Elements of the result of every collective of a compiled program."""
    pattern = r"= (.*?) (?:all-|collective-|reduce-scatter)[a-z-]*\("
    shapes = re.findall(pattern, compiled.as_text())
    sizes = [re.findall(r"\w\d+\[([\d,]*)\]", shape) for shape in shapes]
    return [math.prod(int(n) for n in one.split(",") if n) for found in sizes for one in found]


def _elements(model):
    """(of the smallest stacked matrix, of the embedding)."""
    params = decoder.abstract_params(model)
    stacked = [x.size for x in jax.tree.leaves(params["layers"]) if x.ndim > 2]
    return min(stacked), params["embedding"].size


@pytest.mark.parametrize("mesh", list(MESHES))
def test_a_decode_step_moves_no_page_and_no_weight(mesh):
    moved = _moved(_compiled(mesh, "decode"))
    layout, model = _layout(mesh), MODELS["qwen3"]
    rows = ROWS // layout.size("batch")
    # Activations of this device's rows, and its logits: nothing larger.
    most = rows * max(model.embed_dim, model.num_heads * (model.head_dim + 1))
    if layout.size("vocab") > 1:
        most = max(most, rows * model.vocab_size)
    assert moved
    assert max(moved) <= most
    if mesh == "data 8":
        assert max(moved) == 1  # how many rows are without work


def test_what_moves_is_found_in_the_text():
    """A product whose weight is gathered, as the decode step must not."""
    layout = _layout("data 8")
    x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=layout.sharding(("batch", None)))
    gathered = jax.jit(lambda x: sharding.constrain(2 * x, (None, None), layout)).lower(x).compile()
    assert _moved(gathered) == [8 * 32]


@pytest.mark.parametrize("mesh", [None, *MESHES])
@pytest.mark.parametrize("program", ["decode", "prefill", "copy"])
def test_the_pool_is_a_share_on_every_device_and_updated_in_place(mesh, program):
    layout = _layout(mesh)
    pool = 2 * ROWS * LENGTH * (2 * 2 * 8 * 4)
    memory = _compiled(mesh, program).memory_analysis()
    assert memory.alias_size_in_bytes * (1 if layout is None else 8) == pool
    engine = _engine(mesh, cache=Cache(None, SIZE))
    count = ROWS * LENGTH // SIZE // _parts(layout, "pages")
    assert engine.page_bytes * count == memory.alias_size_in_bytes
    # A second pool, or one gathered, would show.
    assert memory.temp_size_in_bytes < 0.4 * memory.alias_size_in_bytes
    if program == "copy":
        assert not _moved(_compiled(mesh, program))


def test_a_prefill_moves_no_page():
    """Activations of this device's runs, and what joins the parts of a row."""
    for mesh in MESHES:
        layout, model = _layout(mesh), MODELS["qwen3"]
        runs = RUNS // layout.size("batch") * RUN
        heads = model.num_heads // layout.size("heads")
        most = runs * max(model.embed_dim, heads * (model.head_dim + 1))
        assert max(_moved(_compiled(mesh, "prefill")), default=0) <= most


# What it refuses.


@pytest.mark.parametrize(
    ("sizes", "table", "message"),
    [
        ({"tensor": 8}, "rollout", r"num_key_value_heads 2 cannot be cut into 8 .*tensor 8"),
        ({"data": 8}, "train", r"table \"rollout\", not 'train'"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_with_their_numbers(sizes, table, message):
    layout = sharding.layout(table, sizes, jax.devices())
    how = Forward(MODELS["qwen3"], layout=layout)
    with pytest.raises(sharding.MeshError, match=message):
        Engine(how, SAMPLING, num_slots=6, max_prompt_length=17)


def test_a_vocabulary_that_cannot_be_cut_is_refused():
    how = Forward(cases.config(97), layout=_layout("data 4, tensor 2"))
    with pytest.raises(sharding.MeshError, match="vocab_size 97 cannot be cut into 2"):
        Engine(how, SAMPLING, num_slots=6, max_prompt_length=17)


def test_prompts_too_long_are_refused_on_a_mesh_too():
    engine = _engine("data 8")
    with pytest.raises(ValueError, match="prompt_id 4 has 18 tokens"):
        engine.generate({}, [Request(4, np.arange(18))], group_size=1, seed=0)
