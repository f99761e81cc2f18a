"""LUSPO on DAPO-Math-17k with a low-rank adapter of Qwen2.5-7B, on one card of 80 GB.

Command : bash launch/one_host.sh --config=configs/qwen2_5_7b_lora_80gb.py --workdir=runs/lora_7b
Hardware: one GPU with 80 GB (H100, A100).
Memory  : frozen weights are 15.2 GB, the adapter with its moments 0.48 GB, which is also what a
          checkpoint has; keys and values take 57 kB a token.
Time    : rehearsed, not run (experiments/studies/rehearsal/README.md): at mean length 2,000 a step
          takes at least 2.2 min on h100:1x1 (expected 3.7); an update takes 20.9 GB a device,
          and 68.5 of 78.1 GB in use at most, in the rollout: the trainer's weights, a merged
          copy, and 37 GB of pages, 639,168 tokens.
Rehearse: `python -m experiments.rehearse --config=configs/qwen2_5_7b_lora_80gb.py
          --topology=h100:1x1`
Result  : not run here.

The method is configs/qwen2_5_7b_dapo17k.py's: data, prompt, warm-up, temperature, clip range,
rewards and validation. These are other: an adapter of rank 16 of all linear layers, and ten times
the rate of full weights, as Schulman et al. 2025 find best (Thinking Machines, "LoRA Without
Regret"); responses up to 8,192 tokens with a buffer of 1,024 (the paper's ratio, an eighth), 32
prompts × 8 responses per step, minibatches of 8 prompts, AIME24 avg@8. Fewer bits,
--config.lora.base=int8 or nf4, leave more memory to the pages: an update then takes 14.3 and
11.5 GB.
"""

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
