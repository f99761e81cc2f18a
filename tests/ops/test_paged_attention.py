"""One query a row over pages of the pool, against a plain softmax over the row's keys in order.

The kernels for GPU and TPU are interpreted on CPU here, and compiled for cards and chips where
their compilers are installed. The TPU's takes bfloat16 only.
"""

import functools
import os
import subprocess
import sys
from typing import Any, NamedTuple

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
    _module,
    append_and_attend,
    resolve,
)
from luspo_jax.ops.pages import PAGES_AXES, Pages

NAMES = sorted(IMPLEMENTATIONS)
DTYPES = [(name, jnp.bfloat16) for name in NAMES] + [
    (name, jnp.float32) for name in NAMES if name != "tpu"
]
LAYER, LAYERS = 1, 3
GARBAGE = 1e30  # finite, and far larger than any key or value

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(gpu_paged_attention, "_INTERPRET", True)
    monkeypatch.setattr(tpu_paged_attention, "_INTERPRET", True)
    # Its copies of a block's pages are unrolled, and the interpreter compiles each of them.
    monkeypatch.setattr(tpu_paged_attention, "_ENTRIES", 64)


class Rows(NamedTuple):
    """Rows of some lengths: what they hold in order, and the same in pages.

    Attributes:
      query: [B, N, H].
      keys: of each row in order, K heads of [length, H].
      values: likewise.
      pool: Pages.
      tables: [B, M].
      lengths: [B].
    """

    query: Any
    keys: Any
    values: Any
    pool: Pages
    tables: Any
    lengths: Any


def _rows(lengths, *, K=2, G=3, H=64, S=16, dtype=jnp.float32, garbage=GARBAGE, more=3):
    """Random rows; what no row holds is garbage, and so are tables past their rows' ends."""
    rng = np.random.default_rng(sum(lengths) + K + G + H + S)
    B, used = len(lengths), [-(-length // S) for length in lengths]
    P, M = sum(used) + 4, max(1, *used) + more
    query = _rounded(rng.normal(size=(B, K * G, H)), dtype)
    pool = garbage * rng.choice([-1.0, 1.0], size=(2, K, LAYERS, P, S, H))
    tables = rng.integers(0, P, size=(B, M)).astype(np.int32)
    numbers = iter(rng.permutation(np.arange(1, P)))
    rows = [_rounded(rng.normal(size=(2, K, length, H)), dtype) for length in lengths]
    for b, row in enumerate(rows):
        tables[b, : used[b]] = [next(numbers) for _ in range(used[b])]
        for t in range(lengths[b]):
            pool[:, :, LAYER, tables[b, t // S], t % S] = row[:, :, t]
    query, *pool = (jnp.asarray(x, dtype) for x in (query, *pool))
    keys, values = zip(*rows, strict=True)
    return Rows(query, keys, values, Pages(*pool), tables, np.array(lengths, np.int32))


def _rounded(array, dtype):
    return np.array(jnp.asarray(array, dtype).astype(jnp.float32))


def _plain(query, keys, values):
    """Returns (out, log-sum-exp) in float64; 0 and −∞ for a row without keys."""
    query = np.asarray(jnp.asarray(query, jnp.float32), np.float64)
    out, lse = np.zeros_like(query), np.full(query.shape[:2], -np.inf)
    for b, n in np.ndindex(lse.shape):
        head = n // (query.shape[1] // len(keys[b]))
        key, value = (np.asarray(x[b][head], np.float64) for x in (keys, values))
        if len(key):
            scores = key @ query[b, n] / np.sqrt(query.shape[2])
            weights = np.exp(scores - scores.max())
            out[b, n] = weights / weights.sum() @ value
            lse[b, n] = scores.max() + np.log(weights.sum())
    return out, lse


def _assert_plain(rows, found):
    """Compares a Partial; entries of bfloat16 are rounded once to nine bits or so at each step."""
    out, lse = _plain(rows.query, rows.keys, rows.values)
    rough = rows.query.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.out, out, atol=0.02 if rough else 2e-6)
    seen = rows.lengths > 0
    np.testing.assert_allclose(found.lse[seen], lse[seen], atol=0.02 if rough else 4e-6)
    assert np.all(np.asarray(found.lse)[~seen] < -1e29)
    assert found.out.dtype == found.lse.dtype == jnp.float32


def _attended(name, rows, shared=None):
    attend = jax.jit(_module(name).attend)
    return attend(rows.query, rows.pool, np.int32(LAYER), rows.tables, rows.lengths, shared)


S16 = (1, 16, 17, 0, 31, 32, 33, 90, 2)  # a page's ends; nine rows are no multiple of a block
CASES = {
    "lengths": (S16, {}),
    "one row": ((37,), {}),
    "one row of one entry": ((1,), {"more": 0}),
    "rows that are idle first and last": ((0, 0, 5, 0, 40, 0), {}),
    "no row at all": ((0, 0), {}),
    "one head a key head": (S16, {"K": 3, "G": 1}),
    "seven heads": (S16, {"K": 1, "G": 7, "H": 128}),
    "eight heads": (S16, {"G": 8}),
    "more heads than a tile": ((20, 3), {"K": 1, "G": 20}),
    "pages of 64": ((1, 64, 65, 200), {"S": 64, "H": 128}),
    "pages of 128": ((128, 1, 129, 300), {"S": 128}),
    "small pages": ((7, 8, 9, 100), {"S": 8}),
    "tables longer than two blocks": ((700, 30, 1100), {"S": 64, "K": 1, "G": 2, "more": 9}),
}


@pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "sizes"), CASES.values(), ids=CASES)
def test_values_match_a_plain_computation(name, dtype, lengths, sizes):
    rows = _rows(lengths, dtype=dtype, **sizes)
    _assert_plain(rows, _attended(name, rows))


def test_the_gpu_shares_a_row_among_programs(monkeypatch):
    """Some have no tile, one a part of one."""
    for splits in (2, 8):
        monkeypatch.setattr(gpu_paged_attention, "_splits", lambda *_, splits=splits: splits)
        rows = _rows((1, 64, 65, 0, 300, 1000))
        _assert_plain(rows, gpu_paged_attention.attend(rows.query, rows.pool, LAYER, *rows[4:]))


@pytest.mark.parametrize(("rows", "entries", "splits"), [(256, 33280, 16), (64, 33280, 32),
                         (1, 512, 2), (3, 64, 1), (8192, 33280, 1), (300, 33280, 8)])  # fmt: skip
def test_programs_of_a_row_on_gpu_fill_the_card_but_have_work(rows, entries, splits):
    assert gpu_paged_attention._splits(rows, entries) == splits


def test_the_gpu_does_not_even_load_what_lies_past_a_row():
    rows = _rows(S16, garbage=np.nan)
    _assert_plain(rows, _attended("gpu", rows))


def test_the_tpu_is_called_for_as_many_rows_as_its_scalars_have_room(monkeypatch):
    rows = _rows(S16, dtype=jnp.bfloat16)
    once = _attended("tpu", rows)
    monkeypatch.setattr(tpu_paged_attention, "_NUMBERS", 3 * 12)
    thrice = tpu_paged_attention.attend(rows.query, rows.pool, LAYER, *rows[4:])
    for a, b in zip(once, thrice, strict=True):
        np.testing.assert_array_equal(a, b)


# Pages that rows share.


def _with_shared(dtype):
    """Rows 1, 4 and 2 begin with pages 1 and 2, rows 0 and 5 with page 3; row 3 is alone.

    Row 2 has nothing else, and row 6 is idle. The second group is smaller, and so is the number of
    groups than of rows.
    """
    rows = _rows((20, 40, 32, 5, 33, 100, 0), dtype=dtype)
    groups, prefixes = ((1, 4, 2), (0, 5)), ((1, 2), (3,))
    taken = {1, 2, 3}
    B, M = rows.tables.shape
    P, S = rows.pool.keys.shape[2:4]
    pool = [np.array(x.astype(jnp.float32)) for x in rows.pool]
    pool = [np.concatenate([x, x, x], axis=2) for x in pool]  # own pages are P … 3 P
    tables = rows.tables + P
    keys, values = list(rows.keys), list(rows.values)
    rng = np.random.default_rng(3)
    for page in taken:
        for x in pool:
            x[:, LAYER, page] = _rounded(rng.normal(size=(x.shape[0], S, x.shape[4])), dtype)
    skipped, own = np.zeros(B, np.int32), tables.copy()
    members = np.full((B, 3), B, np.int32)
    group_tables, group_pages = np.zeros((B, M), np.int32), np.zeros(B, np.int32)
    for g, (group, prefix) in enumerate(zip(groups, prefixes, strict=True)):
        count = len(prefix)
        members[g, : len(group)] = group
        group_tables[g, :count], group_pages[g] = prefix, count
        for b in group:
            tables[b, :count] = prefix
            skipped[b] = count
            own[b] = np.roll(tables[b], -count)
            for t in range(count * S):
                for x, row in zip(pool, (keys, values), strict=True):
                    row[b] = row[b].copy()
                    row[b][:, t] = x[:, LAYER, tables[b, t // S], t % S]
    pool = Pages(*(jnp.asarray(x, dtype) for x in pool))
    shared = Shared(skipped, own, members, group_tables, group_pages)
    return Rows(rows.query, keys, values, pool, tables, rows.lengths), shared


@pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=str)
def test_pages_that_rows_share_are_seen_by_each(name, dtype):
    rows, shared = _with_shared(dtype)
    _assert_plain(rows, _attended(name, rows, shared))
    _assert_plain(rows, _attended(name, rows))


def test_blocks_read_shared_pages_by_their_group():
    """Tables of the group decide, not those of the rows: so it is the group that read them."""
    rows, shared = _with_shared(jnp.float32)
    spoilt = rows._replace(tables=np.zeros_like(rows.tables))
    _assert_plain(rows, _attended("blocks", spoilt, shared))


# Writing.


def test_an_entry_past_the_pool_is_written_nowhere():
    rows = _rows((5, 6, 7))
    new = Pages(*np.random.default_rng(0).normal(size=(2, 3, 2, 64)).astype(np.float32))
    P = rows.pool.keys.shape[2]
    numbers, places = np.array([1, P, 2], np.int32), np.array([3, 3, 15], np.int32)
    written = jax.jit(pages.append)(rows.pool, new, LAYER, numbers, places)
    for got, before, entry in zip(written, rows.pool, new, strict=True):
        want = np.array(before)
        want[:, LAYER, 1, 3], want[:, LAYER, 2, 15] = entry[0], entry[2]
        np.testing.assert_array_equal(got, want)


def test_copied_pages_and_those_past_the_pool():
    pool = _rows((20, 30)).pool
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
    rows = [_rounded(rng.normal(size=(2, K, p + 1, H)), dtype) for p in positions]
    pool = np.full((2, K, LAYERS, pools * P, S, H), GARBAGE)
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
            after[:, :, LAYER, *here] = row[:, :, t]
            if t < positions[b]:
                pool[:, :, LAYER, *here] = row[:, :, t]
    new = np.stack([row[:, :, -1] for row in rows], axis=1)
    arrays = (jnp.asarray(x, dtype) for x in (query, new, pool, after))
    query, new, pool, after = arrays
    return query, Pages(*new), Pages(*pool), Pages(*after), tables, rows


def _on_mesh(layout, name, query, new, pool, places):
    """Returns the output, float32, and the pool after."""
    pool = Pages(*(sharding.put(x, PAGES_AXES, layout) for x in pool))
    function = functools.partial(append_and_attend, implementation=name, layout=layout)
    run = jax.jit(function, donate_argnums=2)
    out, written = run(query, new, pool, np.int32(LAYER), places=places)
    assert all(x.is_deleted() for x in pool)
    assert all(x.sharding.is_equivalent_to(layout.sharding(PAGES_AXES), 5) for x in written)
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
    for got, want in zip(written, after, strict=True):
        np.testing.assert_array_equal(got, want)
    plain, _ = _plain(query, *zip(*rows, strict=True))
    np.testing.assert_allclose(out, plain, atol=tolerance)


def test_rows_that_are_not_real_write_nothing():
    layout = sharding.layout("rollout", {"data": 2, "context": 4}, jax.devices())
    query, new, pool, _, tables, rows = _mesh_case(layout, jnp.float32, POSITIONS)
    real, none = np.arange(8) % 3 != 1, np.zeros(8, bool)
    places = Places(tables, np.array(POSITIONS, np.int32), none)
    _, written = _on_mesh(layout, "reference", query, new, pool, places)
    jax.tree.map(np.testing.assert_array_equal, written, pool)
    out, _ = _on_mesh(layout, "reference", query, new, pool, places._replace(real_B=real))
    plain, _ = _plain(query, *zip(*rows, strict=True))
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
        members_BG=np.where(first[:, None], [[0, 1]], 2).astype(np.int32),
        group_tables_BM=tables * first[:, None].astype(np.int32),
        group_pages_B=first.astype(np.int32),
    )
    places = Places(tables, positions, np.ones(8, bool), shared)
    out, _ = _on_mesh(layout, name, query, new, pool, places)
    plain, _ = _plain(query, *zip(*rows, strict=True))
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
        ("gpu", "cuda", {"dtype": jnp.float64}, "takes bfloat16, float16 or float32, not float64"),
        ("gpu", "cuda", {"head_dim": 512}, "takes heads of up to 256, not 512; here 'reference'"),
        ("tpu", "tpu", {"dtype": jnp.float32}, "bfloat16, and keys and values are float32; here"),
        ("tpu", "tpu", {"head_dim": 64}, "takes heads of a multiple of 128, not 64: it would copy"),
        ("tpu", "tpu", {"page_size": 12}, "takes pages of a multiple of 8 tokens, not 12"),
        ("ragged", "tpu", {}, r"'ragged' is unknown; use 'auto' or one of \['blocks', 'gpu'"),
    ],
)
def test_what_does_not_fit_is_refused(name, platform, changed, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, platform=platform, **(_FITS | changed))


# Compiled for machines that are not here.


def _all_layers(query, new, pool, places, *, name):
    """One step over all layers, their pool in the carry as in a decoder."""

    def layer(index, carry):
        query, pool = carry
        return append_and_attend(query, new, pool, index, places=places, implementation=name)

    return jax.lax.fori_loop(0, pool.keys.shape[1], layer, (query, pool))


def temporaries(machine, name, *, K=4, N=28, H=128, L=28, S=128, B=64, M=260, tokens=4000):
    """Returns (bytes beside the arguments, bytes of the pool) of a step compiled for a machine.

    Defaults are the sizes of Qwen2.5-7B, 64 rows that may be 33,280 tokens long.
    """
    from experiments.rehearsal.topologies import topology

    device = jax.sharding.SingleDeviceSharding(topology(machine).devices[0])

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=device)

    pool = Pages(*[shape(K, L, B * tokens // S, S, H)] * 2)
    ints, booleans = jnp.int32, jnp.bool_
    places = Places(shape(B, M, dtype=ints), shape(B, dtype=ints), shape(B, dtype=booleans))
    step = jax.jit(functools.partial(_all_layers, name=name), donate_argnums=2)
    compiled = step.lower(shape(B, N, H), Pages(*[shape(B, K, H)] * 2), pool, places).compile()
    assert "paged_attention" in compiled.as_text()
    size = sum(x.size * x.dtype.itemsize for x in pool)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size  # the pool that is returned is the one given
    return memory.temp_size_in_bytes, size


_ELSEWHERE = """
from tests.ops.test_paged_attention import temporaries
for machine, name, sizes in CASES:
    print(*temporaries(machine, name, **sizes), flush=True)
"""


def _temporaries_of(cases, **settings):
    """Compiles in a process of its own; returns (temporaries, pool) in MiB of each case."""
    ran = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE.replace("CASES", repr(cases))],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [tuple(int(x) / 2**20 for x in line.split()) for line in ran.stdout.splitlines()]


_PAGES_OF_64 = {"S": 64, "M": 520}


@pytest.mark.slow
def test_no_pool_is_copied_on_a_card():
    pytest.importorskip("jax_cuda13_plugin")
    found = _temporaries_of(
        [
            ("h100:1x1", "gpu", {}),
            ("h100:1x1", "gpu", _PAGES_OF_64),
            ("h100:1x1", "gpu", {"H": 64, "S": 16, "M": 2080}),
            ("a100-80g:1x1", "gpu", {}),
        ],
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", CUDA_VISIBLE_DEVICES="-1", JAX_PLATFORMS="cpu,cuda",
    )  # fmt: skip
    assert [round(pool) for _, pool in found] == [14000, 14000, 7000, 14000]
    assert max(temporary for temporary, _ in found) < 16  # measured 14.3: sums of 16 programs a row


@pytest.mark.slow
def test_no_pool_is_copied_on_a_chip():
    pytest.importorskip("libtpu")
    found = _temporaries_of(
        [
            ("v5p:2x2x1", "tpu", {}),
            ("v5p:2x2x1", "tpu", _PAGES_OF_64),
            ("v5p:2x2x1", "tpu", {"B": 512, "tokens": 500, **_PAGES_OF_64}),
            ("v6e:2x2", "tpu", {}),
            ("v6e:2x2", "tpu", _PAGES_OF_64),
        ],
        TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu",
    )  # fmt: skip
    assert [round(pool) for _, pool in found] == [14000] * 5
    assert max(temporary for temporary, _ in found) < 40
