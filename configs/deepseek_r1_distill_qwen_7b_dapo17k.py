"""DeepSeek-R1-Distill-Qwen-7B on DAPO-Math-17k: the 1.5B's run, five times as large.

Command : bash launch/one_host.sh --config=configs/deepseek_r1_distill_qwen_7b_dapo17k.py \
            --workdir=runs/r1_7b
          GSPO or GRPO instead: --config.objective.preset=gspo (or grpo)
Hardware: one host of 8 GPUs with 80 GB each, or TPU v5p:2x2x4 by launch/tpu_vm.sh. 16 rows are
          computed at once, so 4, 8 or 16 devices.
Memory  : weights and Adam's moments are 91 GB; keys and values take 57 kB a token; a
          checkpoint is 91 GB and three are kept.
Time    : rehearsed, not run (experiments/studies/rehearsal/README.md): at mean length 4,000 a step
          takes at least 4.0 min on h100:1x8 (expected 7.0; 51 of 78 GB a device in use at most) and
          at least 2.9 min on v5p:2x2x4 (expected 5.4; 70 GB); decoding is more than half of it.
Rehearse: `python -m experiments.rehearse --config=configs/deepseek_r1_distill_qwen_7b_dapo17k.py
          --topology=h100:1x8`, or --topology=v5p:2x2x4
Result  : not run here. Published for the model as it is, avg@64 at 32,768 tokens: AIME24 55.5,
          MATH500 92.8 (DeepSeek-R1's README).
Evaluate: python -m experiments.evaluate --model=runs/r1_7b --benchmarks=aime24_boxed,math500 \
            --template=r1 --protocol=deepseek_r1 --data=DIR --workdir=OUT

Everything but the model is configs/deepseek_r1_distill_qwen_1_5b_dapo17k.py, whose header says
where each number comes from and how the open `<think>` of the prompt is read.
"""

from configs import deepseek_r1_distill_qwen_1_5b_dapo17k


def get_config():
    config = deepseek_r1_distill_qwen_1_5b_dapo17k.get_config()
    config.model.path = "hub:deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    return config
