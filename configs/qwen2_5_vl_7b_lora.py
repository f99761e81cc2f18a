"""LUSPO on ViRL39K with a low-rank adapter of Qwen2.5-VL-7B-Instruct, on one card of 80 GB.

Command : bash launch/one_host.sh --config=configs/qwen2_5_vl_7b_lora.py --workdir=runs/lora_vl
Data    : as configs/qwen2_5_vl_7b_virl39k.py, whose header says how it is fetched.
Hardware: one GPU with 80 GB (H100, A100).
Memory  : frozen weights are 16.6 GB, the adapter with its moments 0.48 GB, which is also what a
          checkpoint has; keys and values take 57 kB a token.
Time    : rehearsed, not run (experiments/studies/rehearsal/README.md): at mean length 1,000, an
          image of 1,225 tokens in each prompt, a step takes at least 1.1 min on h100:1x1
          (expected 2.0); an update takes 29.3 GB a device, and 68.5 of 78.1 GB in use
          at most, in the rollout: the trainer's weights, a merged copy, and 34 GB of pages.
Rehearse: `python -m experiments.rehearse --config=configs/qwen2_5_vl_7b_lora.py
          --topology=h100:1x1`
Result  : not run here.

The method is configs/qwen2_5_vl_7b_virl39k.py's. These are other: an adapter of rank 16 of the
decoder's linear layers, ten times the rate (configs/qwen2_5_7b_lora_80gb.py says why), a frozen
vision tower, 32 prompts × 8 responses per step, minibatches of 8 prompts.
"""

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
