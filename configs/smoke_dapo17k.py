"""Two steps on real inputs: DAPO-Math-17k, the Qwen3 tokenizer and chat template, DAPO's scorer.

The model is small with random weights, so it learns nothing: the run shows in a minute that every
stage of a real run works on this machine, with all its artefacts.

Command : python -m experiments.train --config=configs/smoke_dapo17k.py --workdir=/tmp/smoke \
            --config.data.path=dapo_math_17k.parquet --config.model.path=Qwen3-1.7B
          (a parquet of DAPO-Math-17k; a folder with Qwen3's config.json and tokenizer files)
Hardware: two CPU cores
"""

from luspo_jax.run.fields import default_config


def get_config():
    config = default_config()
    config.num_steps = 2
    config.model.path = "Qwen3-1.7B"
    config.model.random_weights = True
    config.model.overrides = {
        "num_hidden_layers": 2,
        "max_window_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config.data.name = "dapo_math_17k"
    config.data.path = "dapo_math_17k.parquet"
    config.data.template = "dapo"
    config.data.max_prompt_length = 256
    config.reward.parts = {"dapo_math": 1.0, "overlong": 1.0}
    config.reward.options = {"overlong": {"buffer": 16, "factor": 0.3}}
    config.rollout.prompts_per_step = 4
    config.rollout.group_size = 4
    config.rollout.max_response_length = 48
    config.rollout.num_slots = 16
    config.objective.preset = "luspo"
    config.train.num_minibatches = 2
    config.train.num_microbatches = 2
    config.train.num_length_buckets = 1
    config.model.head_chunk_tokens = 256
    config.eval.metric = "dapo_math"
    config.eval.every = 0
    config.eval.num_problems = 4
    config.eval.num_samples = 2
    config.eval.num_slots = 8
    config.output.checkpoint_every = 1
    return config
