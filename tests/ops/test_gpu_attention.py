"""The GPU kernels, interpreted on CPU, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.ops import gpu_attention as module
from luspo_jax.ops.attention import attention
from tests.ops import attention_cases as cases

_TRITON = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


@pytest.fixture
def _interpreted(monkeypatch):
    monkeypatch.setattr(module, "_INTERPRET", True)


pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("shape", [(2, 256, 4, 2, 16), (1, 150, 3, 1, 24)], ids=str)
def test_values_and_gradients_match_a_plain_computation(shape):
    """The second has one key head, and a length and head size that are padded."""
    arrays = cases.inputs(*shape)
    grad = cases.cotangent(arrays[0])
    got = cases.computed(arrays, grad, "flash_gpu")
    assert cases.error(got, cases.dense(*arrays, grad)) < 1e-6


@pytest.mark.usefixtures("_interpreted")
def test_the_ring_of_kernels_gives_one_device():
    arrays = cases.inputs(1, 512, 2, 1, 16)
    grad = cases.cotangent(arrays[0])
    got = cases.computed(arrays, grad, "flash_gpu", cases.layout_of(context=2))
    assert cases.error(got, cases.dense(*arrays, grad)) < 1e-6


@pytest.mark.usefixtures("_interpreted")
def test_the_future_and_other_segments_have_no_influence():
    cases.assert_unseen_has_no_influence("flash_gpu")


@pytest.mark.usefixtures("_interpreted")
def test_bfloat16_sums_in_float32():
    arrays = cases.inputs(1, 128, 2, 1, 16)
    rough = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])
    arrays = (*(np.asarray(x.astype(jnp.float32)) for x in rough), arrays[3])
    grad = jnp.asarray(cases.cotangent(arrays[0]), jnp.bfloat16)
    exact = cases.dense(*arrays, np.asarray(grad.astype(jnp.float32)))
    assert cases.error(cases.computed((*rough, arrays[3]), grad, "flash_gpu"), exact) < 0.01


@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_it_lowers_for_cuda(head_dim):
    query = jax.ShapeDtypeStruct((1, 300, 4, head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 300, 2, head_dim), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, 300), jnp.int32)

    def loss(query, key, value, segments):
        out = attention(query, key, value, segment_ids_BT=segments, implementation="flash_gpu")
        return jnp.sum(out.astype(jnp.float32))

    export = jax.export.export(
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["cuda"], disabled_checks=[_TRITON]
    )
    try:
        exported = export(query, key, key, segments)
    except RuntimeError as error:  # jax ≥ 0.11
        if "No supported GPU devices found" not in str(error):
            raise
        pytest.skip("this jax lowers Triton kernels only where there is a GPU")
    for name in ("attention_forward", "attention_query_gradient", "attention_key_gradients"):
        assert name in exported.mlir_module()
