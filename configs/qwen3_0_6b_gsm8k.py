"""A first run on a real model: Qwen3-0.6B on GSM8K, on one GPU or a TPU v5e-8.

Command : bash launch/one_host.sh --config=configs/qwen3_0_6b_gsm8k.py --workdir=runs/gsm8k
          (on a TPU VM of one host, a v5e-8 in a notebook, or 8 GPUs, the same)
Hardware: one GPU of 24 GB or more, 8 GPUs, or the 8 chips of a v5e-8 (16 GB each); 8 rows are
          computed at once, so 1, 2, 4 or 8 devices.
Memory  : weights and Adam's moments are 7.2 GB; keys and values take 115 kB a token; a
          checkpoint is 7.2 GB and three are kept.
Time    : rehearsed, not run: a step takes at least 7 s on one H100 (expected 13). `python -m
          experiments.rehearse --config=configs/qwen3_0_6b_gsm8k.py --topology=h100:1x1`
Result  : not run yet.

The method is the LUSPO paper's, sized for one device: its rate, warm-up, temperature, clip range
and the three rewards; 32 prompts × 8 responses per step, minibatches of 8 prompts. The model
answers without a thinking block, so that 1,024 tokens suffice.
"""

from luspo_jax.run.fields import default_config


def get_config():
    config = default_config()
    config.num_steps = 200
    config.model.path = "hub:Qwen/Qwen3-0.6B"
    config.model.dtype = "bfloat16"
    config.model.rollout_dtype = "bfloat16"
    config.model.remat = "full"
    config.model.head_chunk_tokens = 1024
    config.data.name = "gsm8k"
    config.data.path = "hub:openai/gsm8k/main/train-00000-of-00001.parquet"
    config.data.eval_path = "hub:openai/gsm8k/main/test-00000-of-00001.parquet"
    config.data.template = "boxed"
    config.data.enable_thinking = False
    config.data.max_prompt_length = 512
    config.reward.parts = {"boxed_math": 1.0, "format": 0.5, "overlong": 1.0}
    config.reward.options = {
        "format": {"name": "boxed"},
        "overlong": {"buffer": 128, "factor": 0.3},
    }
    config.rollout.prompts_per_step = 32
    config.rollout.group_size = 8
    config.rollout.max_response_length = 1024
    config.rollout.num_slots = 256  # All responses of a step, as pages last.
    config.rollout.mismatch_limit = 1.0  # As in configs/qwen2_5_7b_dapo17k.py.
    config.objective.preset = "luspo"
    config.train.num_minibatches = 4
    config.train.learning_rate = 1e-6
    config.train.warmup_steps = 20
    config.train.packing = True
    config.train.microbatch_tokens = 8 * (512 + 1024)
    config.train.num_length_buckets = 1
    config.eval.metric = "boxed_math"
    config.eval.every = 20
    config.eval.num_problems = 500
    config.eval.num_samples = 1
    config.eval.num_slots = 256
    config.output.checkpoint_every = 20
    return config
