"""The LUSPO paper's mixture-of-experts run (arXiv:2602.05261 §5.1): Qwen3-30B-A3B-Instruct.

Command : sbatch launch/slurm.sbatch --config=configs/qwen3_30b_a3b_dapo17k.py \
            --workdir=SHARED/luspo_30b
          GSPO or GRPO instead: --config.objective.preset=gspo (or grpo), with their own clip
          ranges; see configs/qwen2_5_7b_dapo17k.py. Experts gathered, not spread, in training
          (FSDP only): --config.mesh.expert=1
Hardware: 4 hosts of 8 GPUs with 80 GB each, as in the paper (4×8 H800); the 8 GPUs of a host share
          the experts, in training and rollout.
          TPU v5p:4x4x4, 64 chips on 16 hosts of 4, by launch/tpu_vm.sh, two chips a row:
          --config.mesh.context=2 --config.rollout_mesh.expert=4
Memory  : weights and Adam's moments are 366 GB, 11.5 GB on each of 32 GPUs; keys and values
          take 98 kB a token; a checkpoint is 366 GB and three are kept. The experts of
          each token are recorded: 384 bytes, 1.6 GB of a step's responses at mean length 4,000 in
          the memory of every host, and where a step passes over them before its updates as much
          again (`python -m experiments.bench.expert_memory`; padded rows took 13.7 GB each).
Time    : rehearsed, not run (experiments/studies/rehearsal/README.md): at mean length 4,000 a step
          takes at least 5.9 min on h100:4x8 (expected 9.5; 52 of 78 GB a device in use at most)
          and at least 9.4 min on v5p:4x4x4 (expected 14.9; 84 GB); decoding is most of it.
Rehearse: `python -m experiments.rehearse --config=configs/qwen3_30b_a3b_dapo17k.py
          --topology=h100:4x8`, or for the slice `python -m experiments.rehearse
          --config=configs/qwen3_30b_a3b_dapo17k.py --topology=v5p:4x4x4 --config.mesh.context=2
          --config.rollout_mesh.expert=4`
Result  : not run here. The paper's Table 2: AIME24 76.7 with GSPO, 83.6 with LUSPO.

Stated by the paper and chosen here: as in configs/qwen2_5_7b_dapo17k.py. We assume that the paper's
"Qwen3-30B-A3B-Instruct" is the model released as Instruct-2507. About 50 steps, read off its
figures. The paper does not state replay of expert ids: none here.
"""

from configs import qwen2_5_7b_dapo17k


def get_config():
    config = qwen2_5_7b_dapo17k.get_config()
    config.num_steps = 50
    config.model.path = "hub:Qwen/Qwen3-30B-A3B-Instruct-2507"
    config.mesh.expert = 8
    config.rollout_mesh.expert = 8  # The devices of a host; 4 on hosts of 4.
    config.train.microbatch_tokens = 32 * (2048 + 32768)  # One row per device, on 32.
    return config
