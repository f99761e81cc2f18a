"""LUSPO on DAPO-Math-17k with a low-rank adapter of Qwen2.5-7B, on a TPU v5e host of 8 chips.

Command : bash launch/one_host.sh --config=configs/qwen2_5_7b_lora_v5e8.py --workdir=runs/lora_v5e
Hardware: the 8 chips of a v5e-8, 16 GB each.
Memory  : frozen weights are 15.2 GB, the adapter with its moments 0.48 GB, which is also what a
          checkpoint has, an eighth of both on each chip; keys and values take 57 kB a token, a
          quarter on each of 4 chips.
Time    : rehearsed, not run (experiments/studies/rehearsal/README.md): at mean length 2,000 a step
          takes at least 3.0 min on v5e:2x4 (expected 6.1); an update takes 11.7 GB a device,
          and 13.7 of 16.4 GB in use at most, in the rollout: its part of the weights twice,
          and 7 GB of pages.
Rehearse: `python -m experiments.rehearse --config=configs/qwen2_5_7b_lora_v5e8.py
          --topology=v5e:2x4`
Result  : not run here.

As configs/qwen2_5_7b_lora_80gb.py, whose header says what differs from the paper, with 64 prompts a
step, minibatches of 16. In the rollout 4 chips share a merged copy, as there are 4 key heads.
"""

from configs import qwen2_5_7b_lora_80gb


def get_config():
    config = qwen2_5_7b_lora_80gb.get_config()
    config.rollout.prompts_per_step = 64
    config.rollout.num_slots = 512
    config.eval.num_slots = 512
    config.rollout_mesh.tensor = 4  # A whole copy of the merged weights would fill a chip.
    config.train.microbatch_tokens = 8 * (2048 + 8192)  # One row per chip.
    return config
