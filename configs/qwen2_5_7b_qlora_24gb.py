"""LUSPO on DAPO-Math-17k with a low-rank adapter of Qwen2.5-7B in 4 bits, on one card of 24 GB."""

from configs import qwen2_5_7b_lora_80gb


def get_config():
    config = qwen2_5_7b_lora_80gb.get_config()
    config.lora.base = "nf4"
    config.data.max_prompt_length = 1024
    config.reward.options.overlong.buffer = 256
    config.rollout.lora = "apart"  # A merged copy in bfloat16 would fill the card.
    config.rollout.max_response_length = 2048
    config.train.microbatch_tokens = 1024 + 2048  # One row.
    return config
