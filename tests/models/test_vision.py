"""The tower and the decoder that sees, against recorded `transformers` results and themselves."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.images.batch import in_slots
from luspo_jax.images.layout import laid_out, mrope_positions, token_units
from luspo_jax.models import decoder, vision
from luspo_jax.models.decoder_config import read_config
from luspo_jax.models.decoder_weights import load_params
from luspo_jax.models.forward import Forward
from luspo_jax.models.vision_config import VisionConfig
from luspo_jax.ops.attention import ring_order
from luspo_jax.types import Images
from tests.models import paged_cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")

GOLDENS = pathlib.Path(__file__).parent / "vision_goldens"
VARIANTS = ("untied", "tied")
TOWER = VisionConfig(
    depth=3,
    embed_dim=16,
    mlp_dim=24,
    num_heads=2,
    out_dim=32,
    full_layers=(1,),
    patch_size=2,
    window_size=8,
)
GRIDS = [(1, 4, 10), (1, 2, 2), (1, 8, 8), (1, 12, 6)]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of text and images as the decoder takes them."""

    tokens_BT: np.ndarray
    lengths_B: np.ndarray
    positions_BT3: np.ndarray
    after_B: np.ndarray
    index_BT: np.ndarray
    patches: Images

    @property
    def segments_BT(self):
        return (np.arange(self.tokens_BT.shape[1])[None] < self.lengths_B[:, None]).astype(np.int32)


def batch_of(rows, config, shape=None, **settings):
    """A Batch of rows (tokens, patches of images, grids), padded on the right with anything.

    `shape` is (rows, tokens a row) to pad to; `settings` are those of `images.batch.in_slots`.
    """
    images = [pair for _, patches, grids in rows for pair in zip(patches, grids, strict=True)]
    made = in_slots(images, config.vision, **settings)
    shape = shape or (len(rows), max(len(tokens) for tokens, _, _ in rows))
    rows = [*rows, *[(np.array([7], np.int32), [], [])] * (shape[0] - len(rows))]
    tokens_BT, index_BT = np.full(shape, 5, np.int32), np.full(shape, -1, np.int32)
    positions_BT3, after, first = np.zeros((*shape, 3), np.int32), [], 0
    for b, (tokens, _, grids) in enumerate(rows):
        own = slice(0, len(tokens))
        tokens_BT[b, own] = tokens
        positions_BT3[b, own], end = mrope_positions(tokens, grids, config)
        numbers = range(first, first + len(grids))
        index_BT[b, own] = token_units(tokens, grids, numbers, made.num_units, config)
        after.append(end)
        first += len(grids)
    lengths = [len(tokens) for tokens, _, _ in rows]
    return Batch(
        tokens_BT,
        np.array(lengths, np.int32),
        positions_BT3,
        np.array(after, np.int32),
        index_BT,
        made.images,
    )


def arrays_of(patches):
    return patches.patches_ISC, patches.positions_IS2, patches.valid_IS


encode = jax.jit(vision.encode, static_argnames="how")


def of_tower(config, **settings):
    """The Forward of a recorded model that has the tower `config`."""
    model = dataclasses.replace(read_config(GOLDENS / "untied"), vision=config)
    return Forward(model, **settings)


HOW = of_tower(TOWER)


def units_of(params, batch, config):
    """Embeddings of all units, flattened; None where there is no image."""
    if not len(batch.patches.valid_IS):
        return None
    units_IUD = encode(params["vision"], *arrays_of(batch.patches), how=Forward(config))
    return units_IUD.reshape(-1, config.embed_dim)


@functools.partial(jax.jit, static_argnames="config")
def _logits(params, units_UD, arrays, config):
    tokens_BT, positions_BT, segments_BT, index_BT = arrays
    hidden_BTD = decoder.hidden_states(
        params,
        tokens_BT,
        positions_BT,
        segments_BT,
        how=Forward(config),
        images=(units_UD, index_BT),
    )
    return jnp.einsum("btd,vd->btv", hidden_BTD, decoder.head_kernel(params))


def logits_of(params, batch, config):
    """Logits [B, T, V], zero on padding."""
    arrays = batch.tokens_BT, batch.positions_BT3, batch.segments_BT, batch.index_BT
    logits_BTV = _logits(params, units_of(params, batch, config), arrays, config)
    return np.where(batch.segments_BT[..., None] > 0, logits_BTV, 0)


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _greedy(params, units_UD, arrays, config, count):
    tokens_BT, lengths_B, positions_BT3, after_B, index_BT = arrays
    return paged_cases.greedy(
        params,
        tokens_BT,
        lengths_B,
        how=Forward(config),
        count=count,
        after_B=after_B,
        positions_BT=positions_BT3,
        units_UD=units_UD,
        index_RT=index_BT,
    )


def greedy_of(params, batch, config, count):
    """Greedy continuations [B, count]: prefill with images, then steps whose positions lag."""
    arrays = (
        batch.tokens_BT,
        batch.lengths_B,
        batch.positions_BT3,
        batch.after_B,
        batch.index_BT,
    )
    return _greedy(params, units_of(params, batch, config), arrays, config, count)


def raster_units(params, rows, config, **settings):
    """Embeddings of every image's units in raster order, as `transformers` gives them."""
    images = [pair for _, patches, grids in rows for pair in zip(patches, grids, strict=True)]
    if not images:
        return np.zeros((0, config.embed_dim), np.float32)
    patches = in_slots(images, config.vision, **settings).images
    units_IUD = np.asarray(encode(params["vision"], *arrays_of(patches), how=Forward(config)))
    layouts = [laid_out(grid, config.vision) for _, grid in images]
    return np.concatenate([units_IUD[row, layout.units_U] for row, layout in enumerate(layouts)])


@functools.cache
def _golden(variant):
    """(configuration, parameters, rows, expected) of a recorded checkpoint."""
    folder = GOLDENS / variant
    config = read_config(folder)
    params = jax.tree.map(jnp.asarray, load_params(folder, config))
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    rows = []
    for i in range(len(expected["greedy"])):
        grids = [tuple(map(int, grid)) for grid in expected[f"grids_{i}"]]
        patches = [expected[f"patches_{i}_{j}"] for j in range(len(grids))]
        rows.append((expected[f"tokens_{i}"], patches, grids))
    return config, params, rows, expected


@functools.cache
def _params(config=TOWER):
    """Random parameters of the tower in which no weight is at its initial one or zero."""
    rng = np.random.default_rng(0)

    def noise(path, leaf):
        scale = path[-1].key == "scale"
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape) + scale, jnp.float32)

    return jax.tree_util.tree_map_with_path(noise, vision.abstract_params(config))


def _images(grids=GRIDS, config=TOWER, seed=1):
    rng = np.random.default_rng(seed)
    channels = int(np.prod(config.patch_shape))
    return [(rng.normal(size=(h * w, channels)).astype(np.float32), (1, h, w)) for _, h, w in grids]


# ---------------------------------------------------------------- recorded results


@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_of_images(variant):
    config, params, rows, expected = _golden(variant)
    units = raster_units(params, rows, config)
    assert np.abs(units - expected["units"]).max() <= 2e-5 * np.abs(expected["units"]).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_positions(variant):
    config, _, rows, expected = _golden(variant)
    batch = batch_of(rows, config)
    np.testing.assert_array_equal(batch.positions_BT3, expected["positions"])
    np.testing.assert_array_equal(batch.after_B, expected["after"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant):
    config, params, rows, expected = _golden(variant)
    logits_BTV = logits_of(params, batch_of(rows, config), config)
    error = np.abs(logits_BTV - expected["logits"]).max()
    assert error <= 2e-5 * np.abs(expected["logits"]).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens(variant):
    config, params, rows, expected = _golden(variant)
    greedy_BT = greedy_of(params, batch_of(rows, config), config, expected["greedy"].shape[1])
    np.testing.assert_array_equal(greedy_BT, expected["greedy"])


def test_positions_that_do_not_lag_give_other_tokens():
    config, params, rows, expected = _golden("untied")
    batch = batch_of(rows, config)
    wrong = dataclasses.replace(batch, after_B=batch.lengths_B)
    greedy_BT = greedy_of(params, wrong, config, expected["greedy"].shape[1])
    assert (np.asarray(greedy_BT) != expected["greedy"]).any()


# ---------------------------------------------------------------- what must change nothing


def test_buckets_order_and_empty_rows_change_nothing():
    images = _images()
    alone = [
        np.asarray(encode(_params(), *arrays_of(in_slots([x], TOWER).images), how=HOW))[0]
        for x in images
    ]
    order = [2, 0, 3, 1]
    padded = in_slots([images[i] for i in order], TOWER, windows=16, count=6).images
    together = np.asarray(encode(_params(), *arrays_of(padded), how=HOW))
    assert together.shape == (6, 16 * TOWER.window_slots // TOWER.unit_patches, TOWER.out_dim)
    assert np.isfinite(together).all()
    for row, i in enumerate(order):
        units = laid_out(images[i][1], TOWER).units_U
        np.testing.assert_allclose(together[row, units], alone[i][units], rtol=2e-5, atol=2e-5)


def test_what_lies_in_empty_slots_changes_nothing():
    patches = in_slots(_images(), TOWER).images
    noise = np.random.default_rng(2).normal(size=patches.patches_ISC.shape).astype(np.float32)
    filled = dataclasses.replace(
        patches, patches_ISC=np.where(patches.valid_IS[..., None], patches.patches_ISC, noise)
    )
    clean, noisy = (np.asarray(encode(_params(), *arrays_of(x), how=HOW)) for x in
                    (patches, filled))  # fmt: skip
    for row, (_, grid) in enumerate(_images()):
        units = laid_out(grid, TOWER).units_U
        np.testing.assert_array_equal(clean[row, units], noisy[row, units])


def test_a_window_sees_itself_only_until_a_full_layer():
    """Without full layers a patch changes its own window's units; with one, all of its image."""
    (patches, grid), _ = _images([(1, 8, 8), (1, 8, 8)])
    other = patches.copy()
    other[0] += 1.0
    for full, changed in (((), 4), ((1,), 16)):
        config = dataclasses.replace(TOWER, full_layers=full)
        both = in_slots([(patches, grid), (other, grid)], config).images
        one, two = np.asarray(encode(_params(), *arrays_of(both), how=of_tower(config)))
        assert np.sum(np.abs(one - two).max(axis=-1) > 0) == changed


def test_compiles_once_a_bucket():
    config = dataclasses.replace(TOWER, depth=1, full_layers=())
    params, traced = _params(config), []

    @jax.jit
    def compiled(params, *arrays):
        traced.append(arrays[0].shape)
        return vision.encode(params, *arrays, how=of_tower(config))

    sizes = np.random.default_rng(0).permutation(144)[:50]
    for size in sizes:
        grid = (1, 2 + 2 * (int(size) // 12), 2 + 2 * (int(size) % 12))
        compiled(params, *arrays_of(in_slots(_images([grid], config), config).images))
    assert 5 <= len(traced) == len(set(traced)) <= 11  # buckets of 1 to 36 windows


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_remat_changes_no_gradient(remat):
    arrays = arrays_of(in_slots(_images(), TOWER).images)
    expected, got = (
        jax.jit(jax.grad(functools.partial(_loss, remat=way)))(_params(), arrays)
        for way in ("none", remat)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max()),
        expected,
        got,
    )


def _loss(params, arrays, **settings):
    """A number on which every valid unit bears."""
    units_IUD = vision.encode(params, *arrays, how=of_tower(TOWER, **settings))
    I, U, D = units_IUD.shape
    weights = jnp.cos(jnp.arange(U * D, dtype=jnp.float32)).reshape(1, U, D)
    real = arrays[2].reshape(I, U, -1).any(axis=-1)
    return jnp.sum(jnp.where(real[..., None], units_IUD * weights, 0.0)) / 100


# ---------------------------------------------------------------- meshes


# Four context devices do not divide the six windows of an image.
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "context": 4}]
)
def test_gradients_on_a_mesh_are_those_of_one_device(sizes):
    layout = sharding.layout("train", sizes, jax.devices("cpu"))
    arrays = arrays_of(in_slots(_images() * 2, TOWER).images)
    value, grads = jax.jit(jax.value_and_grad(_loss))(_params(), arrays)
    places = sharding.shardings(vision.param_axes(TOWER), layout)
    spread = jax.device_put(_params(), places)

    def loss(params, arrays):
        return _loss(params, arrays, remat="full", layout=layout)

    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
    spread_value, spread_grads = step(spread, arrays)
    np.testing.assert_allclose(spread_value, value, rtol=1e-5)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(spread_grads), jax.tree.leaves(grads), strict=True
    ):
        assert np.isfinite(ours).all()
        assert np.abs(theirs).max() > 0, path
        error = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
        assert error <= 2e-5 * np.abs(theirs).max(), jax.tree_util.keystr(path)


def test_hidden_states_on_a_mesh_are_those_of_one_device():
    """Embeddings, whose rows lie over the mesh, reach the tokens of all rows; gradients return."""
    config, params, rows, _ = _golden("untied")
    batch = batch_of(rows * 2, config, count=8)
    T = batch.tokens_BT.shape[1] + -batch.tokens_BT.shape[1] % 4
    widths = ((0, 0), (0, T - batch.tokens_BT.shape[1]))
    tokens, index, segments = (
        np.pad(x, widths, constant_values=value)
        for x, value in ((batch.tokens_BT, 0), (batch.index_BT, -1), (batch.segments_BT, 0))
    )
    positions = np.pad(batch.positions_BT3, (*widths, (0, 0)))

    def loss(params, order, layout):
        how = Forward(config, layout=layout)
        units = vision.encode(params["vision"], *arrays_of(batch.patches), how=how)
        hidden = decoder.hidden_states(
            params,
            tokens[:, order],
            positions[:, order],
            segments[:, order],
            how=how,
            images=(units.reshape(-1, config.embed_dim), index[:, order]),
        )
        weights = jnp.sin(jnp.asarray(order, jnp.float32))[None, :, None]
        return jnp.sum(jnp.where(segments[:, order, None] > 0, hidden * weights, 0.0))

    value, grads = jax.jit(
        jax.value_and_grad(functools.partial(loss, order=np.arange(T), layout=None))
    )(params)
    sizes = {"data": 2, "fsdp": 2, "context": 2}
    layout = sharding.layout("train", sizes, jax.devices("cpu"))
    order = ring_order(T, layout.size("length"))
    places = sharding.shardings(decoder.param_axes(config), layout)
    spread_value, spread_grads = jax.jit(
        jax.value_and_grad(functools.partial(loss, order=order, layout=layout)),
        out_shardings=(None, places),
    )(jax.device_put(params, places))
    np.testing.assert_allclose(spread_value, value, rtol=2e-4)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(spread_grads), jax.tree.leaves(grads), strict=True
    ):
        error = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
        assert error <= 1e-4 * np.abs(theirs).max(), jax.tree_util.keystr(path)


# ---------------------------------------------------------------- bad input


def test_sizes_that_do_not_fit_are_named():
    patches = in_slots(_images(), TOWER).images
    with pytest.raises(ValueError, match=r"\[9, 24\] each; the tower takes a multiple of 16 slots"):
        vision.encode(
            _params(), patches.patches_ISC[:, :9], patches.positions_IS2[:, :9],
            patches.valid_IS[:, :9], how=HOW,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"takes lengths, .* use 'flash_gpu'"):
        vision.encode(_params(), *arrays_of(patches), how=of_tower(TOWER, vision_attention="cudnn"))
