"""No adapted matrix is forgotten: each B leaves zero in the first step, each A in the second."""

import dataclasses

import jax
import numpy as np
import pytest

from luspo_jax import objectives
from luspo_jax.experience import rounds, stages
from luspo_jax.experience.groups import Waiting
from luspo_jax.learner import optimizer
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.learner.policies import laid
from luspo_jax.learner.rows import put
from luspo_jax.learner.state import UpdateRule, initial_state, with_base
from luspo_jax.learner.step import update_step
from luspo_jax.metrics import StepMetrics
from luspo_jax.models import adapter_files, decoder, low_rank
from luspo_jax.models.forward import Forward
from luspo_jax.models.low_rank import Adapter
from luspo_jax.run.build import build
from tests import test_mesh, vl_cases
from tests.models import expert_cases

# Without decay, so that only a gradient moves a matrix.
OPTIMIZER = optimizer.adamw(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
ADAPTER = Adapter(rank=2, alpha=4.0, base="float32")


def _text(model, adapter):
    """(model, adapter, what is trained: at first, after one and after two steps)."""
    how = Forward(model, adapter=adapter)
    rule = UpdateRule(
        LogprobRule(how, head_chunk_tokens=64),
        objectives.preset("luspo"),
        OPTIMIZER,
        max_grad_norm=1.0,
        copies_reference=False,
    )
    params = decoder.init_params(jax.random.key(0), model)
    axes = decoder.param_axes(model)
    base, made = low_rank.begun(jax.random.key(1), params, axes, adapter, None)
    batch = test_mesh._batch()
    batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, expert_ids=None))
    state, seen = with_base(initial_state(made, rule), base), [jax.device_get(made)]
    for _ in range(2):
        state, _ = update_step(state, put(batch, None), np.float32(1e-3), rule=rule)
        seen.append(jax.device_get(state.params))
    return model, adapter, seen


def _pictures(folder):
    """The same of a run on drawn shapes, with its own rollouts and rows."""
    vl_cases.write_model(folder)
    config = vl_cases.config(folder)
    config.lora.rank, config.lora.alpha, config.lora.base = 2, 4.0, "float32"
    config.lora.vision = True
    config.train.weight_decay = 0.0
    run = build(config)
    made, base = run.initial_parts()
    seen = [jax.device_get(made)]
    state = with_base(initial_state(made, run.rule), base)
    with run.scorer:
        policy = rounds.Policy(run.rollout_params(run.policy(state)), 0)
        rollouts, _ = rounds.collect(run.asker, policy, Waiting(), 0, StepMetrics())
    advantages_B = np.random.default_rng(0).normal(size=len(rollouts.responses))
    rollouts = rollouts.enriched(advantage=advantages_B.tolist())
    width = laid(run.planner, rollouts.prompts, rollouts.responses)[0].plan.width
    batch, _ = stages.train_batch(rollouts, run.planner, np.arange(16), width)
    for _ in range(2):
        state, _ = run.programs.update(state, put(batch, None), 1e-3)
        seen.append(jax.device_get(state.params))
    return run.model.config, run.rule.logprobs.how.adapter, seen


def _case(kind, folder):
    if kind == "dense":
        return _text(test_mesh.CONFIG, ADAPTER)
    if kind == "mixture":
        model = expert_cases.config(4, 2, num_layers=3, dense_layers=(1,))
        return _text(model, dataclasses.replace(ADAPTER, experts=True))
    return _pictures(folder)


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("dense", {"self_attn.q_proj": 5, "mlp.down_proj": 5}),
        ("mixture", {"experts.3.gate_proj": 2, "mlp.gate_proj": 1}),
        ("pictures", {"attn.qkv": 2, "attn.proj": 2, "merger.mlp.2": 1, "self_attn.o_proj": 2}),
    ],
)
def test_every_b_leaves_zero_and_every_a_follows(kind, modules, tmp_path):
    model, adapter, seen = _case(kind, tmp_path)
    table = adapter_files.tensor_table(model, adapter)
    for module, count in modules.items():  # the table itself forgets none
        assert sum(name.endswith(f"{module}.lora_B.weight") for name in table) == count, module
    begun, one, two = (
        {name: low_rank.at(tree, path)[place] for name, (path, place, _) in table.items()}
        for tree in seen
    )
    for name in table:
        if ".lora_B." in name:
            assert not begun[name].any(), name
            assert np.abs(one[name]).max() > 1e-4, name
        else:
            np.testing.assert_array_equal(one[name], begun[name], err_msg=name)  # B was zero
            assert np.abs(two[name] - begun[name]).max() > 1e-4, name
