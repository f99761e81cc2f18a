"""Supervised warm start on the embedded task: from short guesses to traces of every step.

Demonstrations are made, not read: with `--config.data.name=file --config.data.path=FILE` they are
rows of your own.

Command : python -m experiments.sft --config=configs/sft_label_sums.py --workdir=/tmp/sft
Hardware: two CPU cores
"""

from luspo_jax.run.fields import default_sft_config


def get_config():
    config = default_sft_config()
    config.num_steps = 200
    config.model.path = "embedded:label_sums"
    config.data.name = "label_sums"
    config.data.max_length = 64
    config.train.batch_size = 64
    config.train.num_length_buckets = 1
    config.train.learning_rate = 1e-3
    config.train.schedule = "linear"
    config.train.warmup_steps = 10
    config.eval.every = 50
    config.eval.num_examples = 512
    config.eval.num_generations = 256
    config.eval.num_slots = 128
    config.eval.max_response_length = 40
    config.eval.chunk_length = 40
    config.output.checkpoint_every = 100
    return config
