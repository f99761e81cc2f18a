"""LUSPO on DAPO-Math-17k with a low-rank adapter of Qwen2.5-7B, on one card of 80 GB."""

from configs import qwen2_5_7b_dapo17k


def get_config():
    config = qwen2_5_7b_dapo17k.get_config()
    config.num_steps = 200
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.reward.options.overlong.buffer = 1024
    config.rollout.prompts_per_step = 32
    config.rollout.max_response_length = 8192
    config.rollout.num_slots = 256  # All responses of a step, as pages last.
    config.train.num_minibatches = 4  # 8 prompts each.
    config.train.learning_rate = 1e-5
    config.train.microbatch_tokens = 2048 + 8192  # One row.
    config.eval.num_samples = 8
    config.eval.num_slots = 256
    config.output.checkpoint_every = 10
    return config
