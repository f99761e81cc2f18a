"""The usual base of papers on response length: DeepSeek-R1-Distill-Qwen-1.5B on DAPO-Math-17k.

Command : bash launch/one_host.sh --config=configs/deepseek_r1_distill_qwen_1_5b_dapo17k.py \
            --workdir=runs/r1_1_5b
          GSPO or GRPO instead: --config.objective.preset=gspo (or grpo)
Hardware: one host of 8 GPUs with 80 GB each, or TPU v5p:2x2x4 by launch/tpu_vm.sh. 16 rows are
          computed at once, so 1, 2, 4, 8 or 16 devices (fewer than 8 were not rehearsed).
Memory  : weights and Adam's moments are 21.3 GB; keys and values take 29 kB a token; a
          checkpoint is 21.3 GB and three are kept.
Time    : rehearsed, not run (experiments/studies/rehearsal/README.md): at mean length 4,000 a step
          takes at least 1.3 min on h100:1x8 (expected 2.3; 18 of 78 GB a device in use at most) and
          at least 59.7 s on v5p:2x2x4 (expected 1.8 min; 29 GB); decoding is most of it.
Rehearse: `python -m experiments.rehearse --config=configs/deepseek_r1_distill_qwen_1_5b_dapo17k.py
          --topology=h100:1x8`, or --topology=v5p:2x2x4
Result  : not run here. Published for the model as it is, avg@64 at 32,768 tokens: AIME24 28.9,
          MATH500 83.9 (DeepSeek-R1's README). In DeepScaleR's stage of 8,192 tokens, GRPO on
          other data, responses went from 5,500 tokens to 3,500.
Evaluate: python -m experiments.evaluate --model=runs/r1_1_5b --benchmarks=aime24_boxed,math500 \
            --template=r1 --protocol=deepseek_r1 --data=DIR --workdir=OUT

The chat template opens the reasoning: a prompt ends in `<think>`, a response begins inside it, and
one that is cut off there has no answer (docs/rewards.md, "What counts as an answer").

From DeepScaleR's first stage (scripts/train/run_deepscaler_1.5b_8k.sh): 128 prompts × 8 responses,
minibatches of 64 prompts, rate 1e-6, temperature 0.6, prompts up to 1,024 and responses up to 8,192
tokens, reward 1 for a right answer and 0 for everything else. From DeepSeek-R1's README: the
prompt, no system prompt, top-p 0.95 in evaluation. As in the LUSPO paper's runs: objective, clip
range, data, warm-up, weight decay and gradient clipping. Ours: no KL term (DeepScaleR's is
--config.objective.kl_coef=0.001, with GRPO), AIME24 avg@16 at the training's length, and three
passes over the data, as DeepScaleR's first stage made over its own 40,000 problems. The second
stage begins from this one's export: --config.model.path=runs/r1_1_5b/export
--config.rollout.max_response_length=16384 --config.train.microbatch_tokens=278528.
"""

from configs import qwen2_5_7b_dapo17k


def get_config():
    config = qwen2_5_7b_dapo17k.get_config()
    config.num_steps = 405
    config.model.path = "hub:deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    config.data.template = "r1"
    config.data.max_prompt_length = 1024
    config.reward.parts = {"boxed_math": 1.0}
    config.reward.options = {}
    config.rollout.max_response_length = 8192
    config.rollout.temperature = 0.6
    config.train.num_minibatches = 2  # 64 prompts each.
    config.train.microbatch_tokens = 16 * (1024 + 8192)  # Two rows per device on 8, one on 16.
    config.eval.metric = "boxed_math"
    config.eval.every = 20
    config.eval.num_samples = 16
    config.eval.temperature = 0.6
    config.eval.top_p = 0.95
    config.output.checkpoint_every = 10
    return config
