"""A small tower, a decoder that has it, and grids of images for the tests of places and batches."""

import numpy as np

from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.vision_config import VisionConfig

TOWER = VisionConfig(
    depth=1, embed_dim=8, mlp_dim=8, num_heads=1, out_dim=8, full_layers=(), patch_size=2,
    window_size=16,
)  # fmt: skip
IMAGE, VIDEO, START, END = 30, 31, 28, 29
CONFIG = DecoderConfig(
    model_type="qwen2_5_vl",
    vocab_size=32,
    num_layers=1,
    embed_dim=8,
    mlp_dim=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    tie_embeddings=True,
    max_position=64,
    mrope_section=(1, 1, 2),
    vision=TOWER,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
)
GRIDS = [(1, 2, 2), (1, 8, 8), (1, 10, 6), (1, 2, 34), (1, 18, 20)]


def tokens_of(*parts):
    return np.array([token for part in parts for token in np.atleast_1d(part)], np.int32)
