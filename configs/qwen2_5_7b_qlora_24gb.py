"""LUSPO on DAPO-Math-17k with a low-rank adapter of Qwen2.5-7B in 4 bits, on one card of 24 GB.

Command : bash launch/one_host.sh --config=configs/qwen2_5_7b_qlora_24gb.py --workdir=runs/qlora_7b
Hardware: one GPU with 24 GB (RTX 4090; A10G and L4 were not rehearsed).
Memory  : frozen weights are 5.9 GB, the adapter with its moments 0.48 GB, which is also what a
          checkpoint has; keys and values take 57 kB a token. At the start the host holds the
          weights in bfloat16, 15.2 GB, and rounding them, a stack at a time, takes up to 15 GB of
          the card (by the compiler, as below).
Time    : rehearsed, not run (experiments/studies/rehearsal/README.md): at mean length 1,000 a step
          takes at least 4.3 min on rtx4090:1x1 (expected 6.8); an update takes 9.1 GB a
          device, and 19.2 of 23.3 GB in use at most, in the rollout, which reads the
          trainer's weights and has 12 GB of pages, 207,872 tokens.
Rehearse: `python -m experiments.rehearse --config=configs/qwen2_5_7b_qlora_24gb.py
          --topology=rtx4090:1x1`
Result  : not run here.

As configs/qwen2_5_7b_lora_80gb.py, whose header says what differs from the paper, but for the
frozen weights in NF4, which sampler and trainer both read as they are, and for shorter prompts and
responses: up to 1,024 and 2,048 tokens, with a buffer of 256.
"""

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
