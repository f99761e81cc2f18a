"""The paper's data and rewards on a model for one GPU or a TPU v5e-8: Qwen3-1.7B on DAPO-Math-17k.

Command : bash launch/one_host.sh --config=configs/qwen3_1_7b_dapo17k.py --workdir=runs/dapo_1_7b
          (on a TPU VM of one host, a v5e-8 in a notebook, or 8 GPUs, the same)
Hardware: one GPU of 80 GB, 8 GPUs, or the 8 chips of a v5e-8 (16 GB each); 8 rows are computed at
          once, so 1, 2, 4 or 8 devices.
Memory  : weights and Adam's moments are 20.6 GB; keys and values take 115 kB a token; a
          checkpoint is 20.6 GB and three are kept.
Time    : rehearsed, not run: responses of 1,024 tokens on average, a step takes at least 1.3 min
          on one H100 (expected 2.2) and on a v5e-8 (expected 2.1). `python -m
          experiments.rehearse --config=configs/qwen3_1_7b_dapo17k.py --topology=h100:1x1`
Result  : not run yet.

The method is the LUSPO paper's: its data, prompt, rate, warm-up, temperature, clip range, rewards
and validation sampler. These are smaller: responses up to 4,096 tokens with a buffer of 512 (its
ratio, an eighth), 32 prompts × 8 responses per step, minibatches of 8 prompts, AIME24 avg@8. The
model answers without a thinking block.
"""

from configs import qwen2_5_7b_dapo17k


def get_config():
    config = qwen2_5_7b_dapo17k.get_config()
    config.num_steps = 200
    config.model.path = "hub:Qwen/Qwen3-1.7B"
    config.model.head_chunk_tokens = 1024
    config.data.enable_thinking = False
    config.data.max_prompt_length = 1024
    config.reward.options.overlong.buffer = 512
    config.rollout.prompts_per_step = 32
    config.rollout.max_response_length = 4096
    config.rollout.num_slots = 256  # All responses of a step, as pages last.
    config.rollout.chunk_length = 64
    config.train.num_minibatches = 4
    config.train.microbatch_tokens = 8 * (1024 + 4096)
    config.eval.num_samples = 8
    config.eval.num_slots = 256
    config.output.checkpoint_every = 10
    return config
