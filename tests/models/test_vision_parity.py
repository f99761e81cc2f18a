"""Live parity of Qwen2.5-VL with `transformers` (torch, float32): all cases, other sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="live parity needs torch (pip install '.[parity]')")

import transformers  # noqa: E402

from luspo_jax.models import decoder, vision  # noqa: E402
from luspo_jax.models.decoder_config import read_config  # noqa: E402
from luspo_jax.models.decoder_weights import export, load_params, weight_table  # noqa: E402
from luspo_jax.models.forward import Forward  # noqa: E402
from tests.models.make_vision_goldens import (  # noqa: E402
    CASES,
    VARIANTS,
    inputs_of,
    reference_greedy,
    reference_logits,
    reference_model,
    reference_positions,
    reference_units,
    rows_of,
)
from tests.models.test_vision import (  # noqa: E402
    arrays_of,
    batch_of,
    greedy_of,
    logits_of,
    raster_units,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("strict_dtypes")]

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mrope_section": [2, 3, 3],
}
TOWER = {
    "depth": 5,
    "hidden_size": 48,
    "intermediate_size": 37,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 32,
    "fullatt_block_indexes": [2, 4],
}
PADDED = {"windows": 4, "count": 6}  # one program for all cases
SHAPE = (4, 48)


@functools.cache
def _reference(variant, seed=6):
    return reference_model(variant, seed=seed, vision=tuple(TOWER.items()), **SIZES)


@pytest.fixture(params=sorted(VARIANTS))
def checkpoint(request, tmp_path):
    """(reference model, folder, configuration, parameters) of a variant."""
    model = _reference(request.param)
    model.save_pretrained(tmp_path / "saved")
    config = read_config(tmp_path / "saved")
    params = jax.tree.map(jnp.asarray, load_params(tmp_path / "saved", config))
    return model, tmp_path / "saved", config, params


def _close(ours, theirs, bound):
    """Measures the greatest error, over the greatest number."""
    error = np.abs(ours - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), 1e-30)
    print(f"relative error {error:.1e}")
    assert error <= bound


@pytest.mark.parametrize("case", CASES)
def test_embeddings_positions_and_logits(checkpoint, case):
    model, _, config, params = checkpoint
    rows = rows_of(CASES[case], model.config, seed=3)
    _close(raster_units(params, rows, config, **PADDED), reference_units(model, rows), 2e-5)
    batch = batch_of(rows, config, SHAPE, **PADDED)
    positions_BT3, after_B = reference_positions(model, rows)
    own = np.s_[: len(rows), : positions_BT3.shape[1]]
    np.testing.assert_array_equal(batch.positions_BT3[own], positions_BT3)
    np.testing.assert_array_equal(batch.after_B[: len(rows)], after_B)
    _close(logits_of(params, batch, config)[own], reference_logits(model, rows), 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation(checkpoint, case):
    """The seed leaves no call closer than 5e-4 between two tokens, so none may differ."""
    model, _, config, params = checkpoint
    rows = rows_of(CASES[case], model.config, seed=3)
    expected_BT, closest = reference_greedy(model, rows, 32)
    assert closest > 5e-4
    batch = batch_of(rows, config, SHAPE, **PADDED)
    got_BT = np.asarray(greedy_of(params, batch, config, 32))[: len(rows)]
    np.testing.assert_array_equal(got_BT, expected_BT)


def test_a_large_image(checkpoint):
    """More windows than fit a row of them, and positions of the tower beyond its windows."""
    model, _, config, params = checkpoint
    rows = rows_of([[2, (46, 70), 3]], model.config, seed=3)
    _close(raster_units(params, rows, config), reference_units(model, rows), 2e-5)
    _close(logits_of(params, batch_of(rows, config), config), reference_logits(model, rows), 2e-5)


def test_export_is_loaded_by_transformers(checkpoint, tmp_path):
    model, folder, config, params = checkpoint
    rows = rows_of(CASES["mixed_batch"], model.config, seed=3)
    export(tmp_path / "out", params, config, source=folder, max_shard_bytes=100_000)
    export(tmp_path / "own", params, config)  # the configuration in our own spelling
    for name in ("out", "own"):
        loaded, problems = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(problems.values()), problems
        assert loaded.dtype == torch.float32
        np.testing.assert_array_equal(reference_logits(loaded, rows), reference_logits(model, rows))


def test_gradients_of_the_tower(checkpoint):
    model, _, config, params = checkpoint
    rows = rows_of(CASES["mixed_batch"], model.config, seed=3)
    batch = batch_of(rows, config)
    weights = np.random.default_rng(5).normal(size=(*batch.tokens_BT.shape, config.vocab_size))
    weights = np.where(batch.segments_BT[..., None] > 0, weights, 0).astype(np.float32)

    how = Forward(config)

    def loss(params):
        units = vision.encode(params["vision"], *arrays_of(batch.patches), how=how)
        hidden_BTD = decoder.hidden_states(
            params,
            batch.tokens_BT,
            batch.positions_BT3,
            batch.segments_BT,
            how=how,
            units_UD=units.reshape(-1, config.embed_dim),
            index_BT=batch.index_BT,
        )
        logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, decoder.head_kernel(params))
        return jnp.sum(logits_BTV * weights)

    grads = jax.jit(jax.grad(loss))(params)
    model.zero_grad()
    with torch.enable_grad():
        expected = (model(**inputs_of(rows, model.config)).logits * torch.tensor(weights)).sum()
        expected.backward()
    named = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): x.grad
        for name, x in model.named_parameters()
    }
    worst = 0.0
    for name, entry in weight_table(config).items():
        leaf = functools.reduce(lambda node, key: node[key], entry.path, grads)
        ours = entry.to_hf(np.asarray(leaf)[entry.place])
        theirs = named[name].numpy()
        if np.abs(theirs).max() > 1e-3:  # a bias of keys alone changes nothing
            worst = max(worst, np.abs(ours - theirs).max() / np.abs(theirs).max())
    print(f"worst relative error {worst:.1e}")
    assert worst <= 1e-4
