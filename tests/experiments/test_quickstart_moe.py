"""The quickstart of a mixture of experts: it is the dense one's run, it trains, and it learns."""

import contextlib

import numpy as np
import pytest

from configs import quickstart, quickstart_moe
from luspo_jax import train
from luspo_jax.metrics import read_metrics
from luspo_jax.run import fields
from luspo_jax.run import workdir as workdirs
from luspo_jax.run.build import build, facts


def trained(config, folder):
    """The outcome of a run, and the metrics of its steps."""
    config.output.tensorboard = config.output.export = False
    run = build(config)
    with contextlib.closing(workdirs.Workdir(folder, config, facts(run))) as workdir:
        outcome = train.train(run, workdir)
    return outcome, list(read_metrics(folder / "metrics.jsonl"))


def test_it_differs_from_the_quickstart_in_the_model_alone():
    dense, mixture = (fields.flat(module.get_config()) for module in (quickstart, quickstart_moe))
    assert {name for name in dense if dense[name] != mixture[name]} == {"model.path"}


def test_two_steps_train_and_tell_of_the_routers(tmp_path):
    config = quickstart_moe.get_config()
    config.num_steps = 2
    config.rollout.prompts_per_step, config.rollout.group_size = 4, 4
    config.rollout.num_slots = config.eval.num_slots = 16
    config.train.num_minibatches = 2
    config.eval.num_problems, config.eval.num_samples = 4, 2
    outcome, rows = trained(config, tmp_path)
    assert [step for step, _ in outcome.evaluations] == [0, 2]
    for row in rows[1:]:
        assert row["rollout_corr/max_abs_diff"] < 1e-4
        # In float32 sampler and trainer choose alike, but for a tie or two.
        assert row["router/agreement/sampler_old"] > 0.999
        assert 0.8 < row["router/agreement/old_current"] < 1
        assert 0 < row["router/max_violation"] < 2
        assert row["actor/log_ratio_squared/token"] > row["actor/log_ratio_squared/sequence"] > 0


@pytest.mark.slow
def test_twenty_steps_bring_ten_points(tmp_path):
    config = quickstart_moe.get_config()
    config.num_steps = 20
    outcome, rows = trained(config, tmp_path)
    assert outcome.final.accuracy >= outcome.base.accuracy + 0.1
    assert np.mean([row["router/max_violation"] for row in rows[1:]]) < 1
    assert outcome.final.mean_length > outcome.base.mean_length
