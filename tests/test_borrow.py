"""The page on borrowing the loss: its blocks run, on arrays shaped as other trainers hold them."""

import dataclasses
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import objectives
from tests.borrow_cases import (
    GROUP,
    B,
    T,
    maxtext_data,
    rows_of,
    shifted,
    step,
    tunix_example,
)

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "borrow.md"
LUSPO = objectives.preset("luspo")
ORDER = np.random.default_rng(1).permutation(B)


def blocks(heading: str) -> list[str]:
    """The code under a heading of the page, in its order."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.S | re.M)
    return re.findall(r"^```python\n(.*?)^```", section, re.S | re.M)


def run(code: str, **names) -> dict:
    """The names that a block leaves, run where `names` are known."""
    exec(compile(code, f"<{PAGE.name}>", "exec"), names)
    return names


def direct(objective, arrays, **optional):
    """(loss, gradient) by `step_loss`."""

    def value(live_BT):
        order = ("mask_BT", "rewards_B", "ids_B")
        return objectives.step_loss(objective, live_BT, *(arrays[n] for n in order), **optional)

    (loss, _), grad_BT = jax.value_and_grad(value, has_aux=True)(arrays["live_BT"])
    return loss, grad_BT


def numerical(value, point_BT, where_BT, step=1e-6):
    """Central differences of a scalar function at some places, 0 elsewhere."""
    value, grad_BT = jax.jit(value), np.zeros_like(point_BT)
    for index in zip(*np.nonzero(where_BT), strict=True):
        up_BT, down_BT = point_BT.copy(), point_BT.copy()
        up_BT[index] += step
        down_BT[index] -= step
        grad_BT[index] = (value(up_BT) - value(down_BT)) / (2 * step)
    return grad_BT


def close(actual, expected, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


@pytest.mark.usefixtures("x64")
def test_six_lines_are_a_step():
    (code,) = blocks("Six lines")
    assert len(list(filter(None, code.splitlines()))) <= 6
    arrays = step()
    table_BT = arrays["live_BT"]
    found = run(
        code,
        logprobs_BT=lambda params: params * table_BT,
        params=jnp.ones(()),
        **{name: arrays[name] for name in ("mask_BT", "rewards_B", "ids_B")},
    )
    loss, grad_BT = direct(LUSPO, arrays)
    close(found["loss"], loss)
    close(found["grads"], (grad_BT * table_BT).sum())
    assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl"} <= set(found["means"])


@pytest.mark.usefixtures("x64")
def test_shares_of_micro_batches_add_up():
    (code,) = blocks("A step in micro-batches")
    arrays = step()
    found = run(
        code,
        logprobs_BT=lambda params: params,
        params=jnp.asarray(arrays["live_BT"]),
        microbatches=np.split(ORDER, [4]),
        **{name: jnp.asarray(arrays[name]) for name in ("mask_BT", "rewards_B", "ids_B")},
    )
    dapo = objectives.preset("dapo")
    loss, grad_BT = direct(dapo, arrays)
    close(found["loss"], loss)
    close(found["grads"], grad_BT)
    tokens = arrays["mask_BT"].sum()
    assert float(found["metrics"]["actor/pg_clipfrac"][1]) == tokens


@pytest.mark.usefixtures("x64")
def test_tunix_piece_on_its_arrays():
    piece, arrays = run(blocks("Tunix")[0]), step()
    advantages_B = piece["estimate"](rewards=arrays["rewards_B"], num_generations=GROUP)
    example = tunix_example(arrays, advantages_B)

    def value(live_BT):
        return piece["loss_of"](live_BT, example)[0]

    loss, grad_BT = jax.value_and_grad(value)(arrays["live_BT"])
    expected = direct(LUSPO, arrays, old_logprobs_BT=arrays["old_BT"])
    close(loss, expected[0])
    close(grad_BT, expected[1])
    close(grad_BT, numerical(value, arrays["live_BT"], arrays["mask_BT"]), 1e-5, 1e-7)
    assert np.abs(grad_BT).max() > 0
    _, metrics = piece["loss_of"](arrays["live_BT"], example)
    assert float(metrics["kl"]) == 0
    assert float(metrics["pg_clipfrac"]) == float(metrics["actor/pg_clipfrac"]) > 0
    with pytest.raises(ValueError, match="packed"):
        piece["loss_of"](
            arrays["live_BT"], dataclasses.replace(example, segment_ids=arrays["mask_BT"])
        )


@pytest.mark.usefixtures("x64")
def test_tunix_optional_arrays_are_used():
    piece, arrays = run(blocks("Tunix")[0]), step()
    piece["LUSPO"] = with_kl = objectives.preset("luspo", kl_coef=0.1)
    weights_BT = np.random.default_rng(3).random((B, T))
    advantages_B = piece["estimate"](arrays["rewards_B"], GROUP)
    example = tunix_example(
        arrays,
        advantages_B,
        old_per_token_logps=None,
        ref_per_token_logps=arrays["ref_BT"],
        sampler_is_weights=weights_BT,
    )
    loss, metrics = piece["loss_of"](arrays["live_BT"], example)
    optional = {"ref_logprobs_BT": arrays["ref_BT"], "token_weights_BT": weights_BT}
    close(loss, direct(with_kl, arrays, **optional)[0])
    assert float(metrics["kl"]) > 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "holds"), [("luspo", True), ("gspo", True), ("dapo", False)])
def test_tunix_mean_over_micro_batches_is_the_step_by_sequences_alone(name, holds):
    """optax.MultiSteps: the mean of the micro-batches' gradients."""
    piece, arrays = run(blocks("Tunix")[0]), step()
    objective = piece["LUSPO"] = objectives.preset(name)
    example = tunix_example(arrays, piece["estimate"](arrays["rewards_B"], GROUP))
    total_BT, parts = np.zeros((B, T)), np.split(ORDER, 3)
    for rows in parts:
        part = rows_of(example, rows)
        grad = jax.grad(lambda x, part=part: piece["loss_of"](x, part)[0])
        total_BT[rows] += np.asarray(grad(arrays["live_BT"][rows])) / len(parts)
    expected_BT = direct(objective, arrays, old_logprobs_BT=arrays["old_BT"])[1]
    assert np.allclose(total_BT, expected_BT, rtol=1e-9, atol=1e-12) == holds


@pytest.mark.usefixtures("x64")
def test_tunix_hooks_call_and_return_what_the_learner_uses(monkeypatch):
    """Stand-ins for the library's modules, with its names; the slow test has the library."""
    arrays, hooks = step(), {}
    registry = types.ModuleType("tunix.rl.function_registry")
    for kind in ("policy_loss_fn", "advantage_estimator"):
        setattr(
            registry,
            f"register_{kind}",
            lambda name, kind=kind: lambda f: hooks.setdefault((kind, name), f),
        )
    common = types.ModuleType("tunix.rl.common")

    def compute_per_token_logps(
        graphdef, state, prompt_tokens, completion_tokens, pad_id, eos_id,
        stop_gradient=True, temperature=1.0,
    ):  # fmt: skip
        assert (len(prompt_tokens), len(completion_tokens), temperature) == (B, B, 0.7)
        return jax.lax.stop_gradient(state) if stop_gradient else state

    common.compute_per_token_logps = compute_per_token_logps
    learner = types.ModuleType("tunix.rl.grpo.grpo_learner")
    learner.GRPOConfig = lambda **fields: types.SimpleNamespace(temperature=0.7, **fields)
    nnx = types.SimpleNamespace(split=lambda model: (None, model))
    flax, rl = types.ModuleType("flax"), types.ModuleType("tunix.rl")
    flax.nnx, rl.common, rl.function_registry = nnx, common, registry
    for name in ("tunix", "tunix.rl.grpo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module in (flax, rl, registry, common, learner):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    config = run("\n".join(blocks("Tunix")))["config"]
    assert config.num_generations == GROUP
    estimate = hooks["advantage_estimator", config.advantage_estimator]
    policy_loss = hooks["policy_loss_fn", config.policy_loss_fn]
    example = tunix_example(arrays, estimate(rewards=arrays["rewards_B"], num_generations=GROUP))

    def value(model):
        return policy_loss(model, example, algo_config=config, pad_id=0, eos_id=8)

    (loss, aux), grad_BT = jax.value_and_grad(value, has_aux=True)(arrays["live_BT"])
    expected = direct(LUSPO, arrays, old_logprobs_BT=arrays["old_BT"])
    close(loss, expected[0])
    close(grad_BT, expected[1])
    assert {"kl", "pg_clipfrac"} <= set(aux)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("old", [True, False])
def test_maxtext_piece_on_its_arrays(old):
    piece, arrays = run(blocks("MaxText")[0]), step()
    data = piece["of_step"](maxtext_data(arrays, old=old), GROUP)

    def value(live_BT):
        return piece["loss_of"](shifted(live_BT), data, 1)[0]

    loss, grad_BT = jax.value_and_grad(value)(arrays["live_BT"])
    expected = direct(LUSPO, arrays, old_logprobs_BT=arrays["old_BT"] if old else None)
    close(loss, expected[0])
    close(grad_BT, expected[1])
    if old:  # without, the value says less: π/π is 1 wherever it is measured
        close(grad_BT, numerical(value, arrays["live_BT"], arrays["mask_BT"]), 1e-5, 1e-7)


class Config:
    """The fields of a MaxText configuration that its loss reads."""

    train_data_columns = "prompt"
    num_generations = GROUP
    gradient_accumulation_steps = 3


def maxtext_modules(monkeypatch, arrays):
    """Stand-ins for the trainer's modules: its names, its rule of accumulation, given log-probs."""
    trainer = types.ModuleType("maxtext.experimental.rl.grpo_trainer")
    utils = types.ModuleType("maxtext.experimental.rl.grpo_utils")

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class LossAux:
        total_loss: float
        avg_reward: float
        avg_reward_std: float
        avg_advantage: float
        avg_kl: float | None
        completion_length: float
        moe_lb_loss: float
        total_weights: float

    def compute_log_probs_nnx(
        model, inputs, position, segmentation, completions, config, is_train=False
    ):
        assert inputs.shape == position.shape == segmentation.shape == completions.shape
        return shifted(model), {}

    def train_step(model, config, shardings, params_shardings, state, data, rng):
        """(loss, gradient): micro-batches in the order of rows, weighted by total_weights."""
        count = config.gradient_accumulation_steps
        grads, losses, weights = [], 0.0, 0.0
        for k in range(count):
            rows = slice(k * B // count, (k + 1) * B // count)
            part = jax.tree.map(lambda x, rows=rows: x[rows], data)
            function = jax.value_and_grad(trainer.grpo_loss_fn_nnx, has_aux=True)
            (_, aux), grad = function(state[rows], config, part, rng, None, None)
            grads.append(grad * aux.total_weights)
            losses, weights = losses + aux.total_loss, weights + aux.total_weights
        return losses / count, np.concatenate(grads) / weights

    trainer.LossAux, trainer.train_step = LossAux, train_step
    utils.compute_log_probs_nnx = compute_log_probs_nnx
    package = types.ModuleType("maxtext.experimental.rl")
    package.grpo_trainer, package.grpo_utils = trainer, utils
    for name in ("maxtext", "maxtext.experimental"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module in (package, trainer, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return trainer


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["luspo", "dapo"])
def test_maxtext_hooks_keep_the_micro_batch_law(name, monkeypatch):
    arrays = step()
    trainer = maxtext_modules(monkeypatch, arrays)
    piece = run("\n".join(blocks("MaxText")))
    objective = piece["LUSPO"] = objectives.preset(name)
    data, live_BT = maxtext_data(arrays), jnp.asarray(arrays["live_BT"])
    loss, grad_BT = trainer.train_step(None, Config, None, None, live_BT, data, None)
    expected = direct(objective, arrays, old_logprobs_BT=arrays["old_BT"])
    close(loss, expected[0])
    close(grad_BT, expected[1])
    held_out, aux = trainer.grpo_loss_fn_nnx(live_BT, Config, data, None, None, None, False)
    close(held_out, expected[0])
    close(aux.completion_length, arrays["mask_BT"].sum(axis=1).mean())


def test_own_loop_learns_and_reports():
    (code,) = blocks("Your own loop")
    history = run(code)["history"]
    first, last = ([h["reward"] for h in part] for part in (history[:5], history[-5:]))
    assert np.mean(last) > 2 * np.mean(first)
    assert {"actor/pg_loss", "actor/ppo_kl", "reward", "length"} <= set(history[0])
    assert all(np.isfinite(list(h.values())).all() for h in history)


@pytest.mark.slow
def test_tunix_piece_in_tunix():
    """Its registry, types, forward pass, and a trainer's step over three micro-batches."""
    pytest.importorskip("tunix.rl.grpo.grpo_learner", reason="google-tunix is not installed")
    import optax
    from flax import nnx
    from tunix.rl import function_registry, trainer
    from tunix.rl.grpo import grpo_learner
    from tunix.sft import peft_trainer

    class Bigram(nnx.Module):
        def __init__(self):
            rng = np.random.default_rng(5)
            self.table = nnx.Param(jnp.asarray(rng.standard_normal((9, 9)), jnp.float32))

        def __call__(self, tokens, positions, cache, attention_mask):
            return self.table[...][tokens], cache

    piece, arrays = run("\n".join(blocks("Tunix"))), step(np.float32)
    config = piece["config"]
    config.temperature = 1.0  # GRPOLearner sets it to the sampler's
    estimate = function_registry.get_advantage_estimator(config.advantage_estimator)
    advantages_B = estimate(rewards=arrays["rewards_B"], num_generations=config.num_generations)
    model = Bigram()
    start = np.asarray(model.table[...])
    example = tunix_example(arrays, advantages_B, grpo_learner.TrainExample)

    def logprobs_BT(table):
        ids = np.concatenate([example.prompt_ids, example.completion_ids], axis=1)
        logprobs = jax.nn.log_softmax(table[ids[:, :-1]])
        return jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=2)[:, -T:, 0]

    # Old log-probs near the model's own, so that some rows are clipped and some are not.
    drift_BT = 0.004 * np.random.default_rng(6).standard_normal((B, T))
    old_BT = np.asarray(logprobs_BT(start) + drift_BT, np.float32)
    example = dataclasses.replace(example, old_per_token_logps=old_BT)

    options = peft_trainer.TrainingConfig(eval_every_n_steps=100, gradient_accumulation_steps=3)
    actor = trainer.Trainer(model, optax.sgd(1.0), options, dict)
    policy_loss = function_registry.get_policy_loss_fn(config.policy_loss_fn)

    def its_loss(model, train_example, algo_config):
        return policy_loss(model, train_example, algo_config=config, pad_id=0, eos_id=8)

    actor.with_loss_fn(its_loss, has_aux=True)
    actor.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": config})
    actor.with_rl_metrics_to_log({"kl": np.mean, "pg_clipfrac": np.mean})
    parts = [rows_of(example, rows) for rows in np.split(ORDER, 3)]
    actor.train([jax.tree.map(jnp.asarray, part) for part in parts])

    def value(table):
        order = ("mask_BT", "rewards_B", "ids_B")
        return objectives.step_loss(
            LUSPO, logprobs_BT(table), *(arrays[name] for name in order), old_logprobs_BT=old_BT
        )

    (_, metrics), expected = jax.value_and_grad(value, has_aux=True)(jnp.asarray(start))
    clipped = float(objectives.metric_means(metrics)["actor/pg_clipfrac"])
    assert 0 < clipped < 1
    assert np.abs(expected).max() > 0.01
    close(start - np.asarray(model.table[...]), expected, 1e-4, 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["luspo", "dapo"])
def test_maxtext_piece_in_maxtext(name):
    """Its log-probs and its train step over three micro-batches, on a tiny model."""
    trainer = pytest.importorskip(
        "maxtext.experimental.rl.grpo_trainer", reason="maxtext is not installed"
    )
    import optax
    from flax import nnx
    from maxtext.common.train_state_nnx import TrainStateNNX

    class Bigram(nnx.Module):
        def __init__(self):
            rng = np.random.default_rng(5)
            self.table = nnx.Param(jnp.asarray(rng.standard_normal((9, 9)), jnp.float32))

        def __call__(self, decoder_input_tokens, **_):
            return self.table[...][decoder_input_tokens]

    its_train_step, its_loss = trainer.train_step, trainer.grpo_loss_fn_nnx
    try:
        piece, arrays = run("\n".join(blocks("MaxText"))), step(np.float32)
        objective = piece["LUSPO"] = objectives.preset(name)
        data, model = maxtext_data(arrays), Bigram()
        start = jnp.asarray(model.table[...])
        ids = data["prompt_completions"]

        def logprobs_BT(table):
            logprobs = jax.nn.log_softmax(table[ids[:, :-1]])
            return jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=2)[..., 0]

        mask_BT = data["ar_completions_segmentation"][:, 1:] != 0
        drift_BT = 0.004 * np.random.default_rng(6).standard_normal(mask_BT.shape)
        old_BT = np.asarray(logprobs_BT(start) + drift_BT, np.float32)
        padded = np.where(mask_BT, old_BT, -np.inf)
        data["completions_logprobs"] = np.pad(padded, ((0, 0), (1, 0)))
        state = TrainStateNNX(model, nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param))
        state.reference_model = Bigram()
        graphdef, state = nnx.split(state)
        config = types.SimpleNamespace(
            train_data_columns="prompt",
            num_generations=GROUP,
            gradient_accumulation_steps=3,
            decode_sampling_temperature=1.0,
            enable_dropout=False,
            gradient_clipping_threshold=0,
            optimizer_memory_host_offload=False,
        )

        def train(state, data):
            return trainer.train_step(graphdef, config, None, None, state, data, None)

        state, found = jax.jit(train)(state, jax.tree.map(jnp.asarray, data))
    finally:
        trainer.train_step, trainer.grpo_loss_fn_nnx = its_train_step, its_loss

    def value(table):
        rest = (mask_BT, arrays["rewards_B"], arrays["ids_B"])
        return objectives.step_loss(objective, logprobs_BT(table), *rest, old_logprobs_BT=old_BT)

    (loss, _), expected = jax.value_and_grad(value, has_aux=True)(start)
    assert np.abs(expected).max() > 0.01
    close(start - state["model"]["table"][...], expected, 1e-4, 1e-6)
    close(found["scalar"]["learning/loss"], loss, 1e-4, 1e-6)
