"""The LUSPO paper's run on images (arXiv:2602.05261 §5.1): Qwen2.5-VL-7B-Instruct on ViRL39K.

Command : bash launch/one_host.sh --config=configs/qwen2_5_vl_7b_virl39k.py --workdir=runs/luspo_vl
          GSPO or GRPO instead: --config.objective.preset=gspo (or grpo), with their own clip
          ranges, 3e-4/4e-4 and 0.2/0.2; add --config.objective.clip_low=2e-3
          --config.objective.clip_high=2.5e-3 to compare at one range.
          The paper's ablation, problems of text with a blank image: name both sources in
          --config.data.mixture and set --config.data.text_blank=448.
Data    : `hf download TIGER-Lab/ViRL39K --repo-type dataset --local-dir data/virl39k`, then unpack
          its images.zip there, so that images/ lies beside 39Krelease.parquet; in another place:
          --config.data.path=FILE --config.data.image_dir=FOLDER. Geometry3K comes by itself.
Hardware: one host of 8 GPUs with 80 GB each, as in the paper (8 H800).
          TPU v5p:2x2x4, 16 chips on 4 hosts, by launch/tpu_vm.sh: as it is.
Memory  : weights and Adam's moments are 100 GB, 12.4 GB on each of 8 GPUs; keys and values
          take 57 kB a token; a checkpoint is 100 GB and three are kept.
Time    : rehearsed, not run (experiments/studies/rehearsal/README.md): at mean length 1,000, an
          image of 1,225 tokens in each prompt, a step takes at least 1.5 min on h100:1x8 (expected
          3.0; 59 of 78 GB a device in use at most) and at least 1.6 min on v5p:2x2x4 (expected
          3.3; 53 GB); updates are half of it, the tower 5 % of an update.
Rehearse: `python -m experiments.rehearse --config=configs/qwen2_5_vl_7b_virl39k.py
          --topology=h100:1x8`, or --topology=v5p:2x2x4
Result  : not run here. The paper's Table 3, mean of six benchmarks: base 39.2, GRPO 44.0, GSPO
          43.6, LUSPO 45.6.

Stated by the paper: data, response length, batch and minibatch, rate and warm-up, temperature, clip
range, the system prompt and the three rewards. We assume that its minibatch of 16 counts prompts.
About 700 steps, read off its figures: 2.3 passes over the data.
Not stated, chosen here: the vision tower is trained too (--config.train.freeze_vision=True freezes
it); images of at most 1,280 tokens, as the model's card suggests, and prompts of at most 2,048;
problems with an unreadable image are left out and counted. Validation: the 601 test problems of
Geometry3K, one response each at top-p 0.7: they come with their images in one file and are judged
by rule; we did not check whether ViRL39K contains some of them. The paper's six benchmarks are
scored by experiments/evaluate.py. Answers are judged by Math-Verify. No KL term, weight decay 0.1
and gradient clipping at 1.0 (DAPO's script), one epoch, no dual clip, seed, bfloat16 with float32
master weights, and everything about devices.
"""

from luspo_jax.prompts.templates import LUSPO_VL_SYSTEM_PROMPT
from luspo_jax.run.fields import default_config


def get_config():
    config = default_config()
    config.num_steps = 700
    config.model.path = "hub:Qwen/Qwen2.5-VL-7B-Instruct"
    config.model.dtype = "bfloat16"
    config.model.rollout_dtype = "bfloat16"
    config.model.remat = "full"
    config.data.name = "virl39k"
    config.data.path = "data/virl39k/39Krelease.parquet"
    config.data.eval_name = "geometry3k"
    config.data.eval_path = "hub:hiyouga/geometry3k"
    config.data.template = "chat"
    config.data.system_prompt = LUSPO_VL_SYSTEM_PROMPT
    config.data.max_pixels = 1280 * 28 * 28  # 28 × 28 pixels become a token.
    config.data.max_prompt_length = 2048
    config.reward.parts = {"boxed_math": 1.0, "format": 0.5, "overlong": 1.0}
    config.reward.options = {
        "format": {"name": "luspo_vl"},
        "overlong": {"buffer": 512, "factor": 0.3},
    }
    config.reward.num_workers = 8
    config.rollout.prompts_per_step = 128
    config.rollout.group_size = 8
    config.rollout.max_response_length = 4096
    config.rollout.temperature = 1.0
    config.rollout.num_slots = 1024  # Per process: all responses of a step, as pages last.
    config.rollout.chunk_length = 128
    # As in configs/qwen2_5_7b_dapo17k.py: wide, so that it catches faults and not rounding.
    config.rollout.mismatch_limit = 1.0
    config.objective.preset = "luspo"
    config.train.num_minibatches = 8  # 16 prompts each.
    config.train.learning_rate = 1e-6
    config.train.warmup_steps = 20
    config.train.weight_decay = 0.1
    config.train.max_grad_norm = 1.0
    config.train.packing = True
    # Four rows per device on 8, two on 16. A micro-batch encodes each of its images once: the
    # larger it is, the fewer times.
    config.train.microbatch_tokens = 32 * (2048 + 4096)
    config.train.num_length_buckets = 1  # Rows are packed: shorter ones would save no work.
    config.eval.metric = "boxed_math"
    config.eval.every = 10
    config.eval.num_problems = 601
    config.eval.num_samples = 1
    config.eval.temperature = 1.0
    config.eval.top_p = 0.7
    config.eval.num_slots = 1024
    config.output.checkpoint_every = 5
    return config
