"""LUSPO on images: the embedded Qwen2.5-VL learns to look longer at drawings, on a laptop.

Command : python -m experiments.train --config=configs/quickstart_vl.py --workdir=/tmp/vl
Hardware: two CPU cores, about 90 seconds
Result  : seeds 0, 1, 2: held-out accuracy 30.3 % -> 55.6, 53.1, 55.2 %, length 14.6 -> 26 tokens.
Blank   : what it answers without looking is the line `base` of the same command with
          --config.model.path=/tmp/vl/export --config.data.blank_images=True
          --config.num_steps=1 --workdir=/tmp/vl_blank: 9.2 % (seed 0); the best constant answer to
          each question gets 30.8 % (luspo_jax.datasets.shapes.blind_accuracy)
"""

from luspo_jax.datasets import shapes
from luspo_jax.run.fields import default_config


def get_config():
    config = default_config()
    config.num_steps = 80
    config.model.path = "embedded:shapes"
    config.data.name = "shapes"
    config.data.max_prompt_length = 24
    config.reward.parts = {"exact": 1.0}
    config.reward.options = {"exact": {"pattern": shapes.ANSWER_PATTERN}}
    config.rollout.prompts_per_step = 16
    config.rollout.group_size = 8
    config.rollout.max_response_length = 36
    config.rollout.num_slots = 128
    config.rollout.chunk_length = 36
    config.objective.preset = "luspo"
    config.train.num_minibatches = 4
    config.train.learning_rate = 2e-4
    config.train.warmup_steps = 5
    config.train.num_length_buckets = 1
    config.eval.every = 20
    config.eval.num_problems = 500
    config.eval.num_samples = 4
    return config
