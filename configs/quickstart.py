"""LUSPO on the embedded base model and task: learns to reason longer, on a laptop.

Command : python -m experiments.train --config=configs/quickstart.py --workdir=/tmp/quickstart
Hardware: two CPU cores
"""

from luspo_jax.run.fields import default_config


def get_config():
    config = default_config()
    config.num_steps = 80
    config.model.path = "embedded:label_sums"
    config.data.name = "label_sums"
    config.data.max_prompt_length = 16
    config.reward.parts = {"gsm8k": 1.0}
    config.rollout.prompts_per_step = 16
    config.rollout.group_size = 8
    config.rollout.max_response_length = 40
    config.rollout.num_slots = 128
    config.rollout.chunk_length = 40
    config.objective.preset = "luspo"
    config.train.num_minibatches = 4
    config.train.learning_rate = 2e-4
    config.train.warmup_steps = 5
    config.train.num_length_buckets = 1
    config.eval.every = 10
    config.eval.num_problems = 500
    config.eval.num_samples = 4
    return config
