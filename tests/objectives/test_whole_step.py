"""The loss of a step in one call: NumPy's numbers, the micro-batch law, and what it refuses."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.objectives import Objective, preset
from tests.objectives import numpy_objectives
from tests.objectives.objective_cases import (
    ALL,
    PART_WEIGHTS,
    batch_of,
    case,
    denominators_of,
    loss_grad_metrics,
)

OWN = ("logprobs_BT", "response_mask_BT", "rewards_B", "group_ids_B")
# What a fresh process may load for the loss: jax, and what jax itself loads.
HEAVY = {
    "PIL", "absl", "chex", "datasets", "flax", "ml_collections", "optax", "orbax", "pandas",
    "pyarrow", "tensorboard", "tensorboardX", "tensorflow", "tensorstore", "tokenizers", "torch",
    "transformers",
}  # fmt: skip


def given(arrays):
    """(the step's own arrays, those that some objectives need)."""
    rest = {name: x for name, x in arrays.items() if name not in OWN}
    rest["part_weights_M"] = np.array(PART_WEIGHTS, arrays["logprobs_BT"].dtype)
    return {name: arrays[name] for name in OWN}, rest


def loss_and_gradient(objective, arrays, **changes):
    own, rest = given(arrays)
    rest |= changes

    @jax.jit
    def value_and_grad(logprobs_BT):
        def value(live_BT):
            return objectives.step_loss(objective, **(own | {"logprobs_BT": live_BT}), **rest)

        return jax.value_and_grad(value, has_aux=True)(logprobs_BT)

    (value, metrics), grad_BT = value_and_grad(own["logprobs_BT"])
    return value, grad_BT, metrics


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["grpo", "luspo", "dr_grpo", "opo", "otb", "gdpo", "lambda_grpo"])
def test_value_and_gradient_are_those_of_the_transcription(name):
    arrays = case(3)
    value, grad_BT, _ = loss_and_gradient(ALL[name], arrays)
    expected = numpy_objectives.loss(name, arrays, arrays["logprobs_BT"])
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(
        grad_BT, numpy_objectives.gradient(name, arrays), rtol=1e-6, atol=1e-9
    )


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("name", sorted({*[*ALL][::4], "luspo+terms", "otb", "hispo"}))
def test_one_call_is_the_four(name):
    arrays = case(5, dtype=np.float32)
    batch = batch_of(ALL[name], arrays)
    expected = loss_grad_metrics(ALL[name], batch, denominators_of(ALL[name], batch))
    for x, y in zip(
        jax.tree.leaves(loss_and_gradient(ALL[name], arrays)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_without_old_logprobs_the_policy_is_its_own():
    arrays = case(6)
    value, grad_BT, _ = loss_and_gradient(ALL["luspo"], arrays, old_logprobs_BT=None)
    same = loss_and_gradient(ALL["luspo"], arrays, old_logprobs_BT=arrays["logprobs_BT"])
    np.testing.assert_allclose(value, same[0], rtol=1e-12)
    np.testing.assert_allclose(grad_BT, same[1], rtol=1e-12)
    # On-policy LUSPO is −A/N at every token, and its value −Σ A L/N.
    mask_BT = arrays["response_mask_BT"]
    length_B = mask_BT.sum(axis=1)
    advantage_B = np.array(
        numpy_objectives.group_std(arrays["rewards_B"], arrays["group_ids_B"], length_B)
    )
    np.testing.assert_allclose(value, -(advantage_B * length_B).mean(), rtol=1e-9)
    np.testing.assert_allclose(
        grad_BT, np.where(mask_BT, -advantage_B[:, None] / len(mask_BT), 0), rtol=1e-9
    )


@pytest.mark.usefixtures("x64")
def test_a_kl_in_the_reward_is_taken_from_the_reward():
    arrays = case(7)
    mask_BT = arrays["response_mask_BT"]
    gap_BT = arrays["old_logprobs_BT"] - arrays["ref_logprobs_BT"]
    paid_B = arrays["rewards_B"] - 0.3 * np.where(mask_BT, gap_BT, 0).sum(axis=1)
    placed = preset("grpo", kl_coef=0.3, kl_placement="reward", kl_estimator="k1")
    value, grad_BT, _ = loss_and_gradient(placed, arrays)
    expected = numpy_objectives.loss("grpo", arrays | {"rewards_B": paid_B}, arrays["logprobs_BT"])
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert not np.allclose(grad_BT, loss_and_gradient(preset("grpo"), arrays)[1])


@pytest.mark.usefixtures("x64")
def test_token_baselines_weigh_by_the_truncated_ratio():
    arrays = case(8)
    otb = preset("otb", correction="tis", tis_max=1.2)
    mask_BT = arrays["response_mask_BT"]
    rho_BT = np.exp(arrays["old_logprobs_BT"] - arrays["sampler_logprobs_BT"])
    tokens = objectives.TokenStatistics(
        mask_BT, arrays["old_logprobs_BT"], arrays["collision_BT"], np.minimum(rho_BT, 1.2)
    )
    found_BT = objectives.advantages(
        otb, arrays["rewards_B"], arrays["group_ids_B"], mask_BT.sum(axis=1), tokens=tokens
    )
    batch = dataclasses.replace(batch_of(otb, arrays), token_advantages_BT=found_BT)
    expected = loss_grad_metrics(otb, batch, denominators_of(otb, batch))
    np.testing.assert_allclose(loss_and_gradient(otb, arrays)[1], expected[1], rtol=1e-9)


def test_integers_and_half_precision_are_taken():
    arrays = case(9, dtype=np.float32)
    half = jnp.asarray(arrays["logprobs_BT"], jnp.bfloat16)
    value, grad_BT, _ = loss_and_gradient(
        ALL["luspo"], arrays | {"logprobs_BT": half, "rewards_B": np.array([0, 1, 1, 0, 0, 1])}
    )
    assert value.dtype == jnp.float32
    assert grad_BT.dtype == jnp.bfloat16
    assert np.isfinite(value)
    assert np.abs(np.asarray(grad_BT, np.float32)).max() > 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("grpo", {"ref_logprob_BT": None}, "did you mean 'ref_logprobs_BT'"),
        ("grpo", {"response_mask_BT": np.ones((6, 9), int)}, "response_mask_BT must be bool"),
        ("grpo", {"logprobs_BT": np.zeros((6, 8))}, "logprobs_BT has shape"),
        ("grpo", {"old_logprobs_BT": np.zeros((6, 8))}, "old_logprobs_BT has shape"),
        ("otb", {"collision_BT": np.zeros((5, 9))}, "collision_BT has shape"),
        ("grpo", {"rewards_B": np.zeros(5)}, r"rewards_B \(5,\)"),
        ("grpo", {"group_ids_B": np.zeros((6, 1), int)}, r"group_ids_B \(6, 1\)"),
        ("otb", {"collision_BT": None}, "collision_BT is missing"),
        ("gdpo", {"parts_BM": None}, "parts_BM is missing"),
        ("gdpo", {"part_weights_M": None}, "part_weights_M is missing"),
        ("hispo", {"segment_starts_BT": None}, "segment_starts_BT is missing"),
        ("luspo+terms", {"sampler_logprobs_BT": None}, "sampler_logprobs_BT is missing"),
        ("luspo+terms", {"ref_logprobs_BT": None}, "ref_logprobs_BT is missing"),
        ("luspo+terms", {"entropy_BT": None}, "entropy_BT is missing"),
    ],
)
def test_errors_name_the_argument(name, changes, message):
    own, rest = given(case(1, dtype=np.float32))
    with pytest.raises(ValueError, match=message):
        objectives.step_loss(ALL[name], **(own | rest | changes))


def test_a_reference_that_the_reward_needs_is_asked_for():
    own, _ = given(case(1, dtype=np.float32))
    with pytest.raises(ValueError, match="ref_logprobs_BT is missing"):
        objectives.step_loss(Objective(kl_coef=0.1, kl_placement="reward"), **own)


def test_a_process_that_borrows_the_loss_loads_little():
    code = """
import sys
import jax, jax.numpy as jnp
jax.grad(jnp.sum)(jnp.ones(2))
before = set(sys.modules)
from luspo_jax import objectives
def value(x):
    return objectives.step_loss(
        objectives.preset("luspo"), x, x < 0, jnp.arange(4.0), jnp.array([0, 0, 1, 1])
    )
(_, metrics), grad = jax.value_and_grad(value, has_aux=True)(-jnp.ones((4, 3)))
objectives.metric_means(metrics)
assert abs(grad).max() > 0
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(*sorted(new))
print(*sorted({name.split(".")[0] for name in sys.modules}))
print(*sorted(name for name in sys.modules if name.startswith("luspo_jax.")))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    new, everything, ours = (set(line.split()) for line in ran.stdout.splitlines())
    assert not everything & HEAVY
    # Parts of jax that a first gradient did not need may come; nothing else does.
    assert {name for name in new if not name.startswith("_")} <= {"luspo_jax", "jax", "jaxlib"}
    allowed = ("luspo_jax.objectives", "luspo_jax.hosts")
    assert {name for name in ours if not name.startswith(allowed)} == set()
