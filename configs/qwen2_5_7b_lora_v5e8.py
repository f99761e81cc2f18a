"""LUSPO on DAPO-Math-17k with a low-rank adapter of Qwen2.5-7B, on a TPU v5e host of 8 chips."""

from configs import qwen2_5_7b_lora_80gb


def get_config():
    config = qwen2_5_7b_lora_80gb.get_config()
    config.rollout.prompts_per_step = 64
    config.rollout.num_slots = 512
    config.eval.num_slots = 512
    config.rollout_mesh.tensor = 4  # A whole copy of the merged weights would fill a chip.
    config.train.microbatch_tokens = 8 * (2048 + 8192)  # One row per chip.
    return config
