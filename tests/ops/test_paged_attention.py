"""One query a row over pages of the pool, against a plain softmax over the row's keys in order.

The kernels for GPU and TPU are interpreted on CPU. The TPU's takes bfloat16 only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.ops import gpu_paged_attention, pages, tpu_paged_attention
from luspo_jax.ops.paged_attention import (
    IMPLEMENTATIONS,
    Places,
    Shared,
    append_and_attend,
    resolve,
)
from luspo_jax.ops.pages import PAGES_AXES, Pages
from tests.ops import paged_cases as cases

NAMES = sorted(IMPLEMENTATIONS)
DTYPES = [(name, jnp.bfloat16) for name in NAMES] + [
    (name, dtype) for dtype in (jnp.float32, jnp.int8) for name in NAMES if name != "tpu"
]

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(gpu_paged_attention, "_INTERPRET", True)
    monkeypatch.setattr(tpu_paged_attention, "_INTERPRET", True)
    # Its copies of a block's pages are unrolled, and the interpreter compiles each of them.
    monkeypatch.setattr(tpu_paged_attention, "_ENTRIES", 64)


CASES = {
    "lengths": (cases.S16, {}),
    "one row": ((37,), {}),
    "one row of one entry": ((1,), {"more": 0}),
    "rows that are idle first and last": ((0, 0, 5, 0, 40, 0), {}),
    "no row at all": ((0, 0), {}),
    "one head a key head": (cases.S16, {"K": 3, "G": 1}),
    "seven heads": (cases.S16, {"K": 1, "G": 7, "H": 128}),
    "eight heads": (cases.S16, {"G": 8}),
    "more heads than a tile": ((20, 3), {"K": 1, "G": 20}),
    "pages of 64": ((1, 64, 65, 200), {"S": 64, "H": 128}),
    "pages of 128": ((128, 1, 129, 300), {"S": 128}),
    "small pages": ((7, 8, 9, 100), {"S": 8}),
    "tables longer than two blocks": ((700, 30, 1100), {"S": 64, "K": 1, "G": 2, "more": 9}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("lengths", "sizes"), CASES.values(), ids=CASES)
def test_values_match_a_plain_computation(name, lengths, sizes):
    rows = cases.rows_of(lengths, dtype=_dtype_and_tolerance(name)[0], **sizes)
    cases.assert_plain(rows, cases.attended(name, rows))


@pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=str)
def test_values_match_in_every_type(name, dtype):
    rows = cases.rows_of(cases.S16, K=1, G=7, H=128, dtype=dtype)
    cases.assert_plain(rows, cases.attended(name, rows))


# Pages that rows share.


def _with_shared(dtype):
    """Rows 1, 4 and 2 begin with pages 1 and 2, rows 0 and 5 with page 3; row 3 is alone.

    Row 2 has nothing else, and row 6 is idle. The second group is smaller, and so is the number of
    groups than of rows.
    """
    rows = cases.rows_of((20, 40, 32, 5, 33, 100, 0), dtype=dtype)
    groups, prefixes = ((1, 4, 2), (0, 5)), ((1, 2), (3,))
    taken = {1, 2, 3}
    B, M = rows.tables.shape
    P, S = rows.pool.keys.shape[2:4]
    tables = np.arange(P, dtype=np.int32)[None]
    held = [
        [pages.read(x, layer, tables, jnp.float32) for layer in range(cases.LAYERS)]
        for x in rows.pool
    ]
    pool = [np.stack(x, axis=1).reshape(x[0].shape[0], cases.LAYERS, P, S, -1) for x in held]
    pool = [np.concatenate([x, x, x], axis=2) for x in pool]  # own pages are P … 3 P
    tables = rows.tables + P
    keys, values = list(rows.keys), list(rows.values)
    rng = np.random.default_rng(3)
    for page in taken:
        for x in pool:
            x[:, cases.LAYER, page] = cases.rounded(
                rng.normal(size=(x.shape[0], S, x.shape[4])), dtype
            )
    skipped, own = np.zeros(B, np.int32), tables.copy()
    members, places = np.zeros((B, 3), np.int32), np.full(B, -1, np.int32)
    group_tables, group_pages = np.zeros((B, M), np.int32), np.zeros(B, np.int32)
    for g, (group, prefix) in enumerate(zip(groups, prefixes, strict=True)):
        count = len(prefix)
        members[g, : len(group)] = group
        places[list(group)] = 3 * g + np.arange(len(group))
        group_tables[g, :count], group_pages[g] = prefix, count
        for b in group:
            tables[b, :count] = prefix
            skipped[b] = count
            own[b] = np.roll(tables[b], -count)
            for t in range(count * S):
                for x, row in zip(pool, (keys, values), strict=True):
                    row[b] = row[b].copy()
                    row[b][:, t] = x[:, cases.LAYER, tables[b, t // S], t % S]
    pool = cases.pool_of(*pool, dtype)
    shared = Shared(skipped, own, members, places, group_tables, group_pages)
    return cases.Rows(rows.query, keys, values, pool, tables, rows.lengths), shared


@pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=str)
def test_pages_that_rows_share_are_seen_by_each(name, dtype):
    rows, shared = _with_shared(dtype)
    cases.assert_plain(rows, cases.attended(name, rows, shared))
    cases.assert_plain(rows, cases.attended(name, rows))


def test_blocks_read_shared_pages_by_their_group():
    """Tables of the group decide, not those of the rows: so it is the group that read them."""
    rows, shared = _with_shared(jnp.float32)
    spoilt = rows._replace(tables=np.zeros_like(rows.tables))
    cases.assert_plain(rows, cases.attended("blocks", spoilt, shared))


# Writing.


def test_an_entry_past_the_pool_is_written_nowhere():
    rows = cases.rows_of((5, 6, 7))
    new = Pages(*np.random.default_rng(0).normal(size=(2, 3, 2, 64)).astype(np.float32))
    P = rows.pool.keys.shape[2]
    numbers, places = np.array([1, P, 2], np.int32), np.array([3, 3, 15], np.int32)
    written = jax.jit(pages.append)(rows.pool, new, cases.LAYER, numbers, places)
    for got, before, entry in zip(written, rows.pool, new, strict=True):
        want = np.array(before)
        want[:, cases.LAYER, 1, 3], want[:, cases.LAYER, 2, 15] = entry[0], entry[2]
        np.testing.assert_array_equal(got, want)


def test_int8_is_within_half_a_scale_and_zeros_are_zeros():
    x = np.random.default_rng(0).normal(size=(5, 3, 64)).astype(np.float32)
    x[2, 1] = 0
    found = jax.jit(pages.scaled)(jnp.asarray(x))
    assert found.numbers.dtype == jnp.int8
    np.testing.assert_allclose(found.scales, np.abs(x).max(axis=-1) / 127, rtol=1e-6)
    error = np.abs(np.asarray(found.numbers, np.float64) * np.asarray(found.scales)[..., None] - x)
    assert np.all(error <= np.asarray(found.scales)[..., None] * 0.5001)
    assert np.max(np.abs(np.asarray(found.numbers, int))) == 127


@pytest.mark.parametrize("parts", [1, 2])
def test_runs_fill_whole_pages_in_int8(parts):
    """Two rows of two pages on each device; one page of the second row is nobody's."""
    rng = np.random.default_rng(0)
    new = rng.normal(size=(2, 2, 16 * parts, 3, 64)).astype(np.float32)
    numbers = np.array([[4, 1], [3, 6]], np.int32)  # 6 is past the end
    for part in range(parts):
        pool = pages.zeros((3, 2, 6, 8, 64), jnp.int8)
        written = pages.write_runs(pool, Pages(*new), 1, numbers, part, parts)
        for half, rows in zip(written, new, strict=True):
            got = pages.read(half, 1, numbers[:, :1], jnp.float32)
            want = cases.rounded(np.moveaxis(rows[:, part::parts][:, :8], 2, 0), jnp.int8)
            np.testing.assert_allclose(got, want, atol=1e-6)
            assert not np.any(np.asarray(half.numbers[:, 0]))
            assert not np.any(np.asarray(half.numbers[:, 1, [0, 2, 5]]))


def test_copied_pages_and_those_past_the_pool():
    pool = cases.rows_of((20, 30)).pool
    P = pool.keys.shape[2]
    got = jax.jit(pages.copied)(pool, np.array([1, 2], np.int32), np.array([3, P], np.int32))
    for after, before in zip(got, pool, strict=True):
        want = np.array(before)
        want[:, :, 3] = want[:, :, 1]
        np.testing.assert_array_equal(after, want)


# On a mesh.

MESHES = [
    {"data": 2, "context": 4},
    {"fsdp": 2, "tensor": 2, "context": 2},
    {"data": 2, "expert": 2, "tensor": 2},
    {"context": 8},
]


def _mesh_case(layout, dtype, positions, *, H=64, S=8, K=2, G=2):
    """Rows before their last entry over the pools of all devices, and the pools after it."""
    rng = np.random.default_rng(7)
    B, C, pools = len(positions), layout.size("cache_length"), layout.size("pages")
    P, M = 12, max(positions) // (S * C) + 2
    query = rng.normal(size=(B, K * G, H))
    rows = [cases.rounded(rng.normal(size=(2, K, p + 1, H)), dtype) for p in positions]
    pool = np.full((2, K, cases.LAYERS, pools * P, S, H), cases.GARBAGE)
    per_part = B // layout.size("batch")
    tables = np.zeros((B, M), np.int32)
    after = pool.copy()
    for b, row in enumerate(rows):
        if b % per_part == 0:
            numbers = iter(rng.permutation(np.arange(1, P)))
        tables[b, : positions[b] // (S * C) + 1] = [
            next(numbers) for _ in range(positions[b] // (S * C) + 1)
        ]
        for t in range(positions[b] + 1):
            first = ((b // per_part) * C + t % C) * P
            here = first + tables[b, t // C // S], t // C % S
            after[:, :, cases.LAYER, *here] = row[:, :, t]
            if t < positions[b]:
                pool[:, :, cases.LAYER, *here] = row[:, :, t]
    new = np.stack([row[:, :, -1] for row in rows], axis=1)
    query, *new = (jnp.asarray(x, cases.query_type(dtype)) for x in (query, *new))
    pool, after = (cases.pool_of(*x, dtype) for x in (pool, after))
    return query, Pages(*new), pool, after, tables, rows


def _on_mesh(layout, name, query, new, pool, places):
    """Returns the output, float32, and the pool after."""
    pool = jax.tree.map(lambda x: sharding.put(x, PAGES_AXES[: x.ndim], layout), pool)
    function = functools.partial(append_and_attend, implementation=name, layout=layout)
    run = jax.jit(function, donate_argnums=2)
    out, written = run(query, new, pool, np.int32(cases.LAYER), places=places)
    assert all(x.is_deleted() for x in jax.tree.leaves(pool))
    for x in jax.tree.leaves(written):
        assert x.sharding.is_equivalent_to(layout.sharding(PAGES_AXES[: x.ndim]), x.ndim)
    return np.asarray(out.astype(jnp.float32)), written


def _dtype_and_tolerance(name):
    return (jnp.bfloat16, 0.03) if name == "tpu" else (jnp.float32, 2e-6)


POSITIONS = (0, 1, 7, 8, 23, 47, 40, 15)  # the first of parts, of pages, and of a row


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_writes_one_entry_a_row_and_attends_as_one_device(sizes, name):
    layout = sharding.layout("rollout", sizes, jax.devices())
    dtype, tolerance = _dtype_and_tolerance(name)
    query, new, pool, after, tables, rows = _mesh_case(layout, dtype, POSITIONS)
    places = Places(tables, np.array(POSITIONS, np.int32), np.ones(8, bool))
    out, written = _on_mesh(layout, name, query, new, pool, places)
    jax.tree.map(np.testing.assert_array_equal, written, after)
    plain, _ = cases.plain(query, *zip(*rows, strict=True))
    np.testing.assert_allclose(out, plain, atol=tolerance)


@pytest.mark.parametrize("name", ["blocks", "gpu"])
def test_a_mesh_over_int8(name):
    layout = sharding.layout("rollout", MESHES[1], jax.devices())
    query, new, pool, after, tables, rows = _mesh_case(layout, jnp.int8, POSITIONS)
    places = Places(tables, np.array(POSITIONS, np.int32), np.ones(8, bool))
    out, written = _on_mesh(layout, name, query, new, pool, places)
    for got, want in zip(written, after, strict=True):
        np.testing.assert_array_equal(got.numbers, want.numbers)
        np.testing.assert_allclose(got.scales, want.scales, rtol=1e-6)
    plain, _ = cases.plain(query, *zip(*rows, strict=True))
    np.testing.assert_allclose(out, plain, atol=2e-6)


def test_rows_that_are_not_real_write_nothing():
    layout = sharding.layout("rollout", {"data": 2, "context": 4}, jax.devices())
    query, new, pool, _, tables, rows = _mesh_case(layout, jnp.float32, POSITIONS)
    real, none = np.arange(8) % 3 != 1, np.zeros(8, bool)
    places = Places(tables, np.array(POSITIONS, np.int32), none)
    _, written = _on_mesh(layout, "reference", query, new, pool, places)
    jax.tree.map(np.testing.assert_array_equal, written, pool)
    out, _ = _on_mesh(layout, "reference", query, new, pool, places._replace(real_B=real))
    plain, _ = cases.plain(query, *zip(*rows, strict=True))
    np.testing.assert_allclose(out[real], plain[real], atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_rows_are_cut_over_a_mesh_like_the_rows(name):
    """Pairs of rows share their first page; members are numbers of a row on its own device."""
    layout = sharding.layout("rollout", {"data": 4, "tensor": 2}, jax.devices())
    dtype, tolerance = _dtype_and_tolerance(name)
    positions = np.full(8, 11, np.int32)
    query, new, pool, _, tables, rows = _mesh_case(layout, dtype, positions)
    for b in range(1, 8, 2):
        tables[b, 0] = tables[b - 1, 0]
        rows[b][:, :, :8] = rows[b - 1][:, :, :8]
    first = np.arange(8) % 2 == 0  # the first of a device's two rows: its one group
    shared = Shared(
        skipped_B=np.ones(8, np.int32),
        tables_BM=np.roll(tables, -1, axis=1),
        members_BW=np.tile(np.arange(2, dtype=np.int32), (8, 1)),
        places_B=np.arange(8, dtype=np.int32) % 2,
        group_tables_BM=tables * first[:, None].astype(np.int32),
        group_pages_B=first.astype(np.int32),
    )
    places = Places(tables, positions, np.ones(8, bool), shared)
    out, _ = _on_mesh(layout, name, query, new, pool, places)
    plain, _ = cases.plain(query, *zip(*rows, strict=True))
    np.testing.assert_allclose(out, plain, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_parts_without_entries_weigh_nothing_beside_any_score(name):
    """Scores of −3600 in the only part with entries, and huge values in the others."""
    layout = sharding.layout("rollout", {"context": 8}, jax.devices())
    query, _, pool, *_ = _mesh_case(layout, _dtype_and_tolerance(name)[0], (0,) * 8)
    new = Pages(*(jnp.full((8, 2, 64), x, query.dtype) for x in (-15.0, 2.5)))
    tables = np.arange(1, 9, dtype=np.int32)[:, None]
    places = Places(tables, np.zeros(8, np.int32), np.ones(8, bool))
    out, _ = _on_mesh(layout, name, jnp.full_like(query, 30.0), new, pool, places)
    np.testing.assert_array_equal(out, np.full(out.shape, 2.5))


# Choosing.

_FITS = {"page_size": 64, "head_dim": 128, "dtype": jnp.bfloat16}


@pytest.mark.parametrize(
    ("platform", "changed", "name"),
    [
        ("cpu", {}, "blocks"),
        ("cpu", {"dtype": jnp.float32, "head_dim": 6, "page_size": 5}, "blocks"),
        ("gpu", {}, "gpu"),
        ("cuda", {"dtype": jnp.float32, "head_dim": 80, "page_size": 48}, "gpu"),
        ("cuda", {"dtype": jnp.float64}, "reference"),
        ("cuda", {"head_dim": 512}, "reference"),
        ("cuda", {"dtype": jnp.int8}, "gpu"),
        ("cpu", {"dtype": jnp.int8}, "blocks"),
        ("tpu", {"dtype": jnp.int8}, "reference"),
        ("tpu", {}, "tpu"),
        ("tpu", {"head_dim": 256, "page_size": 8}, "tpu"),
        ("tpu", {"dtype": jnp.float32}, "reference"),
        ("tpu", {"head_dim": 64}, "reference"),
        ("tpu", {"page_size": 12}, "reference"),
    ],
)
def test_auto_is_what_fits(platform, changed, name):
    assert resolve("auto", platform=platform, **(_FITS | changed)) == name
    assert resolve(name, platform=platform, **(_FITS | changed)) == name


@pytest.mark.parametrize(
    ("name", "platform", "changed", "message"),
    [
        ("blocks", "tpu", {}, "'blocks' runs on cpu, not on tpu; here 'tpu' does"),
        ("gpu", "cpu", {}, "'gpu' runs on gpu or cuda or rocm, not on cpu; here 'blocks' does"),
        (
            "gpu",
            "cuda",
            {"dtype": jnp.float64},
            "takes bfloat16, float16, float32 or int8, not float64",
        ),
        ("gpu", "cuda", {"head_dim": 512}, "takes heads of up to 256, not 512; here 'reference'"),
        ("tpu", "tpu", {"dtype": jnp.float32}, "bfloat16, and keys and values are float32; here"),
        ("tpu", "tpu", {"dtype": jnp.int8}, "'tpu' takes the scales of int8 only as wide as the"),
        ("tpu", "tpu", {"head_dim": 64}, "takes heads of a multiple of 128, not 64: it would copy"),
        ("tpu", "tpu", {"page_size": 12}, "takes pages of a multiple of 8 tokens, not 12"),
        ("ragged", "tpu", {}, r"'ragged' is unknown; use 'auto' or one of \['blocks', 'gpu'"),
    ],
)
def test_what_does_not_fit_is_refused(name, platform, changed, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, platform=platform, **(_FITS | changed))
