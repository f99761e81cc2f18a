"""The TPU kernels, interpreted on CPU, and compiled for a pod where libtpu is installed."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from luspo_jax.ops import splash_attention as module
from tests.ops import attention_cases as cases


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(module, "_INTERPRET", True)


@pytest.mark.parametrize("shape", [(2, 256, 4, 2, 16), (1, 150, 3, 1, 8)], ids=str)
def test_values_and_gradients_match_a_plain_computation(shape):
    """The second has one key head, and a length that must be padded to whole tiles."""
    arrays = cases.inputs(*shape)
    grad = cases.cotangent(arrays[0])
    assert cases.error(cases.computed(arrays, grad, "splash"), cases.dense(*arrays, grad)) < 1e-6


def test_the_ring_of_kernels_gives_one_device():
    arrays = cases.inputs(1, 512, 2, 1, 8)
    grad = cases.cotangent(arrays[0])
    layout = cases.layout_of(context=2)
    ours = cases.computed(arrays, grad, "splash", layout)
    assert cases.error(ours, cases.dense(*arrays, grad)) < 1e-6


def test_the_future_and_other_segments_have_no_influence():
    cases.assert_unseen_has_no_influence("splash")


def test_bfloat16_sums_in_float32():
    arrays = cases.inputs(1, 128, 2, 1, 16)
    rough = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])
    arrays = (*(np.asarray(x.astype(jnp.float32)) for x in rough), arrays[3])
    grad = jnp.asarray(cases.cotangent(arrays[0]), jnp.bfloat16)
    exact = cases.dense(*arrays, np.asarray(grad.astype(jnp.float32)))
    assert cases.error(cases.computed((*rough, arrays[3]), grad, "splash"), exact) < 0.01


@pytest.mark.parametrize(("T", "block"), [(1024, 512), (1280, 256), (896, 128)])
def test_tiles_are_scheduled_as_by_jax_own_mask(T, block):
    ours = module._made((T, T), block, block, 2, True, True)
    theirs = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * 2),
        block_sizes=ours.kwargs["block_sizes"],
        head_shards=1,
        q_seq_shards=1,
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


_FOR_A_POD = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from luspo_jax import sharding
from luspo_jax.ops.attention import attention

pod = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x4")
layout = sharding.layout("train", {"context": 4, "tensor": 4}, list(pod.devices))

def shape(dims, axes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=layout.sharding(axes))

query = shape((1, 32768, 28, 128), ("batch", "length", "heads", None))
key = shape((1, 32768, 4, 128), ("batch", "length", "kv_heads", None))
segments = shape((1, 32768), ("batch", "length"), jnp.int32)

def both(query, key, value, segments, grad):
    out, pull = jax.vjp(
        lambda *x: attention(*x, segment_ids_BT=segments, implementation="splash", layout=layout),
        query, key, value)
    return out, pull(grad)

compiled = jax.jit(both).lower(query, key, key, segments, query).compile()
text = compiled.as_text()
assert "tpu_custom_call" in text and "collective-permute" in text
assert "all-gather" not in text and "all-reduce" not in text
print("temporaries", compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_it_compiles_for_a_pod():
    """Forward and backward at 32768 tokens over context 4 × tensor 4, for v5p; no TPU needed."""
    pytest.importorskip("libtpu")
    settings = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", _FOR_A_POD], env={**os.environ, **settings},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    # Measured 121 MiB; 14 + 4 + 4 MiB of queries, keys and values a device.
    assert int(ran.stdout.split()[-1]) < 160 * 2**20
