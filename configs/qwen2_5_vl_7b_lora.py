"""LUSPO on ViRL39K with a low-rank adapter of Qwen2.5-VL-7B-Instruct, on one card of 80 GB."""

from configs import qwen2_5_vl_7b_virl39k


def get_config():
    config = qwen2_5_vl_7b_virl39k.get_config()
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.rollout.prompts_per_step = 32
    config.rollout.num_slots = 256  # All responses of a step, as pages last.
    config.train.num_minibatches = 4  # 8 prompts each.
    config.train.learning_rate = 1e-5
    config.train.freeze_vision = True  # As it is without an adapter of its own, lora.vision.
    config.train.microbatch_tokens = 4 * (2048 + 4096)  # Four rows, whose images are encoded once.
    config.eval.num_slots = 256
    return config
