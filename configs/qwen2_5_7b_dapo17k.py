"""The LUSPO paper's text run (arXiv:2602.05261 §5.1): Qwen2.5-7B base on DAPO-Math-17k.

Command : bash launch/one_host.sh --config=configs/qwen2_5_7b_dapo17k.py --workdir=runs/luspo_7b
          GSPO or GRPO instead: --config.objective.preset=gspo (or grpo), with their own clip
          ranges, 3e-4/4e-4 and 0.2/0.2; add --config.objective.clip_low=2e-3
          --config.objective.clip_high=2.5e-3 to compare at one range.
Hardware: one host of 8 GPUs with 80 GB each, as in the paper (8 H800).
          TPU v5p:2x2x4, 16 chips on 4 hosts, by launch/tpu_vm.sh: rows for 16 devices need
          --config.train.microbatch_tokens=557056, or two devices a row --config.mesh.context=2.
          With --config.rollout_mesh.tensor=4 the chips of a host share the sampler's weights:
          decoding takes 109 s at the roofline instead of 252.
          131,072 tokens, prompt included, on v5p:4x4x4: --config.rollout.max_response_length=129024
          --config.mesh.context=4 --config.train.microbatch_tokens=2097152
Memory  : weights and Adam's moments are 91 GB, 11.4 GB on each of 8 GPUs; keys and values
          take 57 kB a token; a checkpoint is 91 GB and three are kept.
Time    : rehearsed, not run (experiments/studies/rehearsal/README.md): at mean length 4,000 a step
          takes at least 6.4 min on h100:1x8 (expected 10.8; 70 of 78 GB a device in use at most),
          and before there were pages, at least 10.7 min on v5p:2x2x4 (expected 18.6); decoding is
          most of it. On h100:1x8 a device has 43 GB of pages, 751,488 tokens.
Rehearse: `python -m experiments.rehearse --config=configs/qwen2_5_7b_dapo17k.py
          --topology=h100:1x8`, or for the slice `python -m experiments.rehearse
          --config=configs/qwen2_5_7b_dapo17k.py --topology=v5p:2x2x4
          --config.train.microbatch_tokens=557056`
Result  : not run here. The paper's Table 2, AIME24 avg@32: base 1.6, GSPO 11.8, LUSPO 14.7.

Stated by the paper: data, lengths, batch and minibatch, rate and warm-up, temperature, clip range,
the three rewards, validation. We assume that its minibatch of 16 counts prompts and its "top-p 0.7"
applies to validation, as in the DAPO script that it follows. About 140 steps, read off its figures.
Not stated, chosen here: no KL term, weight decay 0.1 and gradient clipping at 1.0 (DAPO's script),
prompts up to 2,048 tokens (likewise), one epoch, no dual clip, no correction of the sampler's
log-probs, seed, bfloat16 with float32 master weights, the answer's format (one `Answer: …`, at the
end, as the prompt asks), and everything about devices.
"""

from luspo_jax.run.fields import default_config


def get_config():
    config = default_config()
    config.num_steps = 140
    config.model.path = "hub:Qwen/Qwen2.5-7B"
    config.model.dtype = "bfloat16"
    config.model.rollout_dtype = "bfloat16"
    config.model.remat = "full"
    config.data.name = "dapo_math_17k"
    config.data.path = "hub:BytedTsinghua-SIA/DAPO-Math-17k/data/dapo-math-17k.parquet"
    config.data.eval_name = "aime24"
    config.data.eval_path = "hub:BytedTsinghua-SIA/AIME-2024/data/aime-2024.parquet"
    config.data.template = "dapo"
    config.data.max_prompt_length = 2048
    config.reward.parts = {"dapo_math": 1.0, "format": 0.5, "overlong": 1.0}
    config.reward.options = {
        "format": {"name": "answer_line"},
        "overlong": {"buffer": 4096, "factor": 0.3},
    }
    config.rollout.prompts_per_step = 128
    config.rollout.group_size = 8
    config.rollout.max_response_length = 32768
    config.rollout.temperature = 1.0
    config.rollout.num_slots = 1024  # Per process: all responses of a step, as pages last.
    config.rollout.chunk_length = 128
    # The largest of some million differences in bfloat16, not measured at this size (0.2 to 0.5 at
    # 135M): wide, so that it catches faults (a forgotten temperature is several nats) and not
    # rounding.
    config.rollout.mismatch_limit = 1.0
    config.objective.preset = "luspo"
    config.train.num_minibatches = 8  # 16 prompts each.
    config.train.learning_rate = 1e-6
    config.train.warmup_steps = 20
    config.train.weight_decay = 0.1
    config.train.max_grad_norm = 1.0
    config.train.packing = True
    config.train.microbatch_tokens = 8 * (2048 + 32768)  # One row per device, on 8.
    config.train.num_length_buckets = 1  # Rows are packed: shorter ones would save no work.
    config.eval.metric = "dapo_math"
    config.eval.every = 10
    config.eval.num_problems = 30
    config.eval.num_samples = 32
    config.eval.temperature = 1.0
    config.eval.top_p = 0.7
    config.eval.num_slots = 1024
    config.output.checkpoint_every = 5
    return config
