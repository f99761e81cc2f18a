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
from luspo_jax.rollout import Engine, Request, Sampling, slots
from luspo_jax.rollout import engine as engine_module
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
def small_rooms(monkeypatch):
    """Caches that start short, so that they also grow."""
    monkeypatch.setattr(engine_module, "SMALLEST_ROOM", 32)
    monkeypatch.setattr(engine_module, "SMALLEST_PROMPT", 32)


def _layout(mesh):
    if mesh is None:
        return None
    return sharding.layout("rollout", MESHES.get(mesh) or dict(mesh), jax.devices())


def _placed(params, model, layout):
    if layout is None:
        return params
    return jax.device_put(params, sharding.shardings(decoder.param_axes(model), layout))


def _engine(mesh, kind="qwen3", **kwargs):
    sizes = {"num_slots": 6, "max_prompt_length": 17, "chunk_length": 8} | kwargs
    return Engine(Forward(MODELS[kind], layout=_layout(mesh)), SAMPLING, **sizes)


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
    [*((mesh, "qwen3") for mesh in MESHES), (SPLIT_THRICE, "qwen2"), (SPLIT_THRICE, "llama")],
)
def test_tokens_are_those_of_one_device_but_at_ties(mesh, kind):
    """Refills (30 responses on few slots), a cache that grows, ragged prompts, stop tokens."""
    others, stats = _generate(mesh, kind)
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
    assert engine.generate(params, [], group_size=1, seed=5)[0] == []


def test_a_second_call_on_a_mesh_compiles_nothing():
    assert _generate("data 2, context 4")[1].prefill_calls > 1
    assert _generate("data 2, context 4")[1].compilations == 0


# Where things lie.

LENGTH, ROWS, PROMPTS, PROMPT_LENGTH = 64, 16, 8, 18


def _abstract(tree, axes_tree, layout):
    """Shapes, types and, with a layout, shardings."""
    leaves, treedef = jax.tree.flatten(tree)
    axes = jax.tree.leaves(axes_tree, is_leaf=lambda node: isinstance(node, tuple))
    of = [None if layout is None else layout.sharding(a) for a in axes]
    return treedef.unflatten(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(leaves, of, strict=True)
    )


def _arguments(layout):
    model, key = MODELS["qwen3"], jax.random.key(0)
    params = _abstract(decoder.abstract_params(model), decoder.param_axes(model), layout)
    sizes = {"num_slots": ROWS, "length": LENGTH, "how": Forward(model)}
    empty = jax.eval_shape(functools.partial(slots.empty_slots, **sizes), key)
    prompts = (np.zeros((PROMPTS, PROMPT_LENGTH), np.int32), np.ones(PROMPTS, np.int32))
    prefill = functools.partial(slots.prefill, how=Forward(model))
    pool, _ = jax.eval_shape(prefill, decoder.abstract_params(model), *prompts)
    pool_axes, slots_axes = slots.POOL_AXES, slots.SLOTS_AXES
    return params, _abstract(empty, slots_axes, layout), _abstract(pool, pool_axes, layout)


@functools.cache
def _compiled(mesh, program):
    layout = _layout(mesh)
    params, state, pool = _arguments(layout)
    if program == "decode":
        lowered = slots.decode_chunk.lower(
            params, state, np.int32(8), np.int32(ROWS),
            how=Forward(MODELS["qwen3"], layout=layout), sampling=SAMPLING, chunk_length=8,
        )  # fmt: skip
    elif program == "fill":
        lowered = slots.fill.lower(state, pool, _refill([]), jax.random.key(0), layout=layout)
    else:
        keys = state.cache.keys_LBKSH
        lowered = slots.grow_array.lower(keys, length=2 * LENGTH, layout=layout)
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
def test_a_decode_step_moves_no_cache_and_no_weight(mesh):
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
        assert max(moved) == 1  # how many slots are free


def test_what_moves_is_found_in_the_text():
    """A product whose weight is gathered, as the decode step must not."""
    layout = _layout("data 8")
    x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=layout.sharding(("batch", None)))
    gathered = jax.jit(lambda x: sharding.constrain(2 * x, (None, None), layout)).lower(x).compile()
    assert _moved(gathered) == [8 * 32]


@pytest.mark.parametrize("program", ["decode", "fill", "grow"])
def test_no_device_holds_the_whole_length(program):
    """Of the arrays with a length of cache, none is longer than this device's part."""
    mesh = "data 2, context 4"
    parts, text = _layout(mesh).size("cache_length"), _compiled(mesh, program).as_text()
    shapes = {
        tuple(int(n) for n in shape.split(",")) for shape in re.findall(r"f32\[(\d[\d,]*)\]", text)
    }
    longest = (2 if program == "grow" else 1) * LENGTH // parts
    prompts = -(-PROMPT_LENGTH // parts) * parts if program == "fill" else 0
    layers, kv_heads, head = 2, 2, 8
    caches = {shape for shape in shapes if len(shape) == 5 and shape[-1] == head}
    assert (layers, ROWS // 2, kv_heads, longest, head) in caches
    assert max(shape[3] for shape in caches) == max(longest, prompts)


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_the_cache_is_a_share_on_every_device_and_updated_in_place(mesh):
    layout = _layout(mesh)
    engine = _engine(mesh, num_slots=ROWS)
    share = engine.kv_bytes_per_slot(LENGTH) * ROWS // engine.row_multiple
    assert share * (1 if layout is None else 8) == 2 * ROWS * LENGTH * (2 * 2 * 8 * 4)
    state = _arguments(layout)[1]
    small = sum(
        x.size * x.dtype.itemsize // engine.row_multiple
        for x in (state.hidden_BD, state.lengths_B, state.offsets_B, state.limits_B, state.active_B)
    )
    keys = 2 * 4 * ROWS // engine.row_multiple
    for program in ("decode", "fill"):
        memory = _compiled(mesh, program).memory_analysis()
        assert memory.alias_size_in_bytes == share + small + keys  # all of the slots
    # A second cache, or one gathered, would show.
    assert _compiled(mesh, "decode").memory_analysis().temp_size_in_bytes < 100_000
    assert _compiled(mesh, "grow").memory_analysis().temp_size_in_bytes < 1000


def test_what_a_refill_gathers_is_bounded_by_the_prompts():
    """1.5 times the pool, each device its heads and positions of it."""
    for mesh in MESHES:
        engine = _engine(mesh)
        pool = PROMPTS * engine.kv_bytes_per_slot(PROMPT_LENGTH)
        own = pool // engine.row_multiple
        temp = _compiled(mesh, "fill").memory_analysis().temp_size_in_bytes
        assert temp <= 1.5 * pool + 2 * own + 4096, (mesh, temp, pool)


# Refills, exactly.


def _refill(rows):
    """rows: (slot, pool row, length, offset, limit, prompt_id, sample_id)."""
    columns = np.zeros((7, ROWS), np.int64)
    columns[0] = ROWS
    if rows:
        columns[:, : len(rows)] = np.array(rows).T
    return slots.Refill(*columns[:5].astype(np.int32), *columns[5:].astype(np.uint32))


def _numbers(tree, seed):
    """Other numbers in every entry of the float arrays of a tree of shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


def _filled(mesh, refill):
    layout, key = _layout(mesh), jax.random.key(3)
    model, parts = MODELS["qwen3"], 1 if mesh is None else _layout(mesh).size("cache_length")
    how = Forward(model, layout=layout)
    state = slots.empty_slots(key, num_slots=ROWS, length=LENGTH, how=how)
    pool = _numbers(_arguments(None)[2], 1)
    if layout is not None:
        axes = (None, "batch", "kv_heads", None, None)
        cache = jax.tree.map(lambda x: sharding.put(x, axes, layout), pool.cache)
        pool = slots.Pool(sharding.put(pool.hidden_PD, ("batch", None), layout), cache)
    state = slots.fill(state, pool, refill, key, layout=layout)
    state = slots.grow(state, length=2 * LENGTH, layout=layout)
    order = np.concatenate([np.arange(2 * LENGTH)[part::parts] for part in range(parts)])
    cache = jax.tree.map(lambda x: np.asarray(x)[:, :, :, np.argsort(order)], state.cache)
    others = (
        state.hidden_BD, state.lengths_B, state.offsets_B, state.limits_B, state.active_B
    )  # fmt: skip
    return [*jax.tree.leaves(cache), *map(np.asarray, others), jax.random.key_data(state.keys_B)]


@pytest.mark.parametrize("mesh", [*MESHES, (("fsdp", 2), ("expert", 2), ("context", 2))], ids=str)
def test_refills_put_what_one_device_puts(mesh):
    refill = _refill(
        [(15, 3, 17, -5, 40, 7, 0), (0, 0, 1, 0, 20, 8, 1),
         (8, 7, 9, -2, 30, 9, 2), (7, 3, 17, -5, 41, 7, 1)]
    )  # fmt: skip
    for got, want in zip(_filled(mesh, refill), _filled(None, refill), strict=True):
        np.testing.assert_array_equal(got, want)


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
