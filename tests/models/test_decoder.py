"""The decoder against recorded `transformers` results, and against itself."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig, read_config
from luspo_jax.models.decoder_weights import load_params, num_params
from luspo_jax.models.forward import Forward
from luspo_jax.ops.paged_attention import Places
from tests.models import paged_cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")

GOLDENS = pathlib.Path(__file__).parent / "goldens"
VARIANTS = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
CONFIG = DecoderConfig(
    model_type="qwen3",
    vocab_size=61,
    num_layers=3,
    embed_dim=24,
    mlp_dim=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    out_bias=True,
    qk_norm=True,
    tie_embeddings=False,
    max_position=64,
)
HOW = Forward(CONFIG)
PAGED = paged_cases.on_pages(HOW)
PAGED_BLOCKS = dataclasses.replace(HOW, paged_attention="blocks")


@functools.cache
def _params(config=CONFIG):
    """Random parameters in which no weight is at its initial one or zero."""
    rng = np.random.default_rng(0)

    def noise(leaf):
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape) + (leaf.ndim == 2), jnp.float32)

    return jax.tree.map(noise, decoder.abstract_params(config))


def _rows(lengths_B, T):
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (len(lengths_B), T))
    return positions_BT, (positions_BT < jnp.asarray(lengths_B)[:, None]).astype(jnp.int32)


_hidden = jax.jit(decoder.hidden_states, static_argnames="how")
_greedy = jax.jit(paged_cases.greedy, static_argnames=("how", "count"))
_read = jax.jit(paged_cases.read, static_argnames="how")
_step = jax.jit(paged_cases.step, static_argnames="how")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(variant):
    config = read_config(GOLDENS / variant)
    params = jax.tree.map(jnp.asarray, load_params(GOLDENS / variant, config))
    expected = np.load(GOLDENS / variant / "expected.npz")
    tokens_BT, lengths_B = expected["tokens_BT"], expected["lengths_B"]
    rows = _rows(lengths_B, tokens_BT.shape[1])
    hidden_BTD = _hidden(params, tokens_BT, *rows, how=Forward(config))
    logits_BTV = np.asarray(hidden_BTD @ decoder.head_kernel(params).T)
    mask_BT = np.asarray(rows[1]) > 0
    error = np.abs(logits_BTV - expected["logits_BTV"])[mask_BT].max()
    assert error <= 2e-5 * np.abs(expected["logits_BTV"]).max()
    count = expected["greedy_BT"].shape[1]
    greedy_BT = _greedy(params, tokens_BT, lengths_B, how=Forward(config), count=count)
    np.testing.assert_array_equal(greedy_BT, expected["greedy_BT"])


# One shape for most tests, so that they share compiled programs.
ROWS, LENGTH = 4, 12
TOKENS_BT = np.random.default_rng(7).integers(0, 61, (ROWS, LENGTH)).astype(np.int32)


def test_reading_runs_and_tokens_equals_the_whole_sequence():
    lengths_B, rows_B, how = np.array([7, 1, 4, 6], np.int32), np.arange(ROWS), PAGED
    whole_BTD = _hidden(_params(), TOKENS_BT, *_rows([LENGTH] * ROWS, LENGTH), how=HOW)
    pages, tables_BM = paged_cases.opened(how, ROWS, LENGTH)
    assert pages.keys.shape == (2, 3, ROWS * LENGTH // paged_cases.SIZE + 1, paged_cases.SIZE, 8)
    pages = _read(_params(), TOKENS_BT, lengths_B, pages, tables_BM, how=how)
    for _ in range(6):
        at_B = lengths_B - 1
        hidden_BD, pages = _step(
            _params(), TOKENS_BT[rows_B, at_B], at_B, pages, tables_BM, how=how
        )
        np.testing.assert_allclose(hidden_BD, whole_BTD[rows_B, at_B], atol=3e-6)
        lengths_B = lengths_B + 1


def test_a_step_writes_one_entry_a_row_and_none_for_idle_rows():
    pages, tables_BM = paged_cases.opened(PAGED, ROWS, LENGTH)
    before = jax.tree.map(lambda x: x + 1, pages)
    at_B, real_B = np.array([5, 2, 0, LENGTH - 1], np.int32), np.array([True, True, False, True])
    places = Places(tables_BM, at_B, real_B)
    after = decoder.decode_step(_params(), TOKENS_BT[:, 0], before, places, how=PAGED)[1]
    expected = sorted(
        (int(tables_BM[row, at_B[row] // 4]), at_B[row] % 4) for row in np.flatnonzero(real_B)
    )
    for old, new in zip(before, after, strict=True):
        changed_PS = np.asarray(old != new).any(axis=(0, 1, 4))
        assert sorted(map(tuple, np.argwhere(changed_PS))) == expected


PACKED_SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] + [0] * 2] * ROWS, np.int32)
PACKED_POSITIONS = np.array([[*range(5), *range(4), 0, 0, 0]] * ROWS, np.int32)


def _packed(tokens_BT):
    hidden_BTD = _hidden(_params(), tokens_BT, PACKED_POSITIONS, PACKED_SEGMENTS, how=HOW)
    return np.asarray(hidden_BTD)


def test_packed_segments_equal_separate_rows():
    bounds = [(0, 5), (5, 9), (9, 10)]
    separate_BT = np.zeros_like(TOKENS_BT)
    for row, (start, end) in enumerate(bounds):
        separate_BT[row, : end - start] = TOKENS_BT[0, start:end]
    packed_BTD = _packed(TOKENS_BT)
    alone_BTD = _hidden(_params(), separate_BT, *_rows([5, 4, 1, 0], LENGTH), how=HOW)
    for row, (start, end) in enumerate(bounds):
        np.testing.assert_allclose(
            packed_BTD[0, start:end], alone_BTD[row, : end - start], atol=3e-6
        )
    assert np.isfinite(packed_BTD).all()
    assert np.isfinite(alone_BTD).all()  # the last row is all padding


@pytest.mark.parametrize("changed", [3, 6, 9, 11])
def test_other_segments_and_the_future_change_nothing_at_all(changed):
    other_BT = TOKENS_BT.copy()
    other_BT[0, changed] = (other_BT[0, changed] + 1) % CONFIG.vocab_size
    differs_BT = (_packed(TOKENS_BT) != _packed(other_BT)).any(axis=-1)
    same_T = PACKED_SEGMENTS[0] == PACKED_SEGMENTS[0, changed]
    np.testing.assert_array_equal(differs_BT[0], same_T & (np.arange(LENGTH) >= changed))
    assert not differs_BT[1:].any()


def _gradient(remat):
    """The compiled gradient of a loss over rows of 8 × 32, its numbers and its temporary bytes."""
    tokens_BT = jax.random.randint(jax.random.key(5), (8, 32), 0, CONFIG.vocab_size)
    positions_BT, segments_BT = _rows([32, 9, 0, 32, 32, 32, 1, 20], 32)

    def loss(params):
        hidden_BTD = decoder.hidden_states(
            params, tokens_BT, positions_BT, segments_BT, how=Forward(CONFIG, remat=remat)
        )
        return jnp.sum(jnp.where(segments_BT[..., None] > 0, jnp.square(hidden_BTD), 0.0))

    compiled = jax.jit(jax.grad(loss)).lower(_params()).compile()
    return compiled(_params()), compiled.memory_analysis().temp_size_in_bytes


def test_remat_changes_memory_and_no_number():
    (plain, plain_bytes), (remat, remat_bytes) = _gradient("none"), _gradient("full")
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        assert np.isfinite(a).all()  # a row is all padding
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))
    assert remat_bytes < 0.75 * plain_bytes


@pytest.mark.parametrize("switch", [False, True])
def test_axes_name_every_dimension(switch):
    config = dataclasses.replace(
        CONFIG, qkv_bias=switch, out_bias=switch, qk_norm=switch, tie_embeddings=not switch
    )
    sizes = {
        "layers": 3,
        "vocab": 61,
        "embed": 24,
        "mlp": 40,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
    }
    abstract = decoder.abstract_params(config, jnp.bfloat16)
    axes = decoder.param_axes(config)
    # "norm" is any small vector, which is cut over nothing.
    jax.tree.map(
        lambda leaf, names: np.testing.assert_equal(
            leaf.shape, tuple(sizes.get(n, d) for n, d in zip(names, leaf.shape, strict=True))
        ),
        abstract,
        axes,
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == num_params(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype(jnp.bfloat16)}


def test_init_is_seeded_and_has_the_abstract_shapes():
    params = decoder.init_params(jax.random.key(0), CONFIG)
    abstract = decoder.abstract_params(CONFIG)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), params, abstract)
    query_LDNH = np.asarray(params["layers"]["attention"]["query"]["kernel"])
    assert abs(query_LDNH.std() - decoder.INIT_STDDEV) < 0.002
    assert not np.array_equal(query_LDNH[0], query_LDNH[1])  # each layer draws its own


def test_bfloat16_activations_stay_close():
    rows = _rows([12, 5, 9, 12], LENGTH)
    exact = np.asarray(_hidden(_params(), TOKENS_BT, *rows, how=HOW))
    rough = _hidden(_params(), TOKENS_BT, *rows, how=Forward(CONFIG, "bfloat16"))
    assert rough.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(rough, np.float32) - exact)
    assert 0 < difference.mean() < 0.03 * np.abs(exact).mean()


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match=r"'flash' is unknown; use one of .*reference"):
        _hidden(
            _params(),
            jnp.zeros((1, 2), jnp.int32),
            *_rows([2], 2),
            how=Forward(CONFIG, attention="flash"),
        )


def test_a_decode_loop_holds_the_pages_once():
    """Donated and carried through a while_loop, the pool is never copied."""
    batch, length = 8, 512
    pages, tables_BM = paged_cases.opened(PAGED, batch, length)
    pool_bytes = sum(leaf.nbytes for leaf in pages)

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(params, tokens_B, pages):
        def body(state):
            at_B, _, pages = state
            return at_B + 1, *paged_cases.step(
                params, tokens_B, at_B, pages, tables_BM, how=PAGED_BLOCKS
            )

        at_B, hidden_BD = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, CONFIG.embed_dim))
        return jax.lax.while_loop(lambda s: s[0][0] < length, body, (at_B, hidden_BD, pages))

    memory = decode.lower(_params(), jnp.zeros(batch, jnp.int32), pages).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < 0.2 * pool_bytes
