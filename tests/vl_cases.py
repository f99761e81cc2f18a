"""A tiny Qwen2.5-VL with its own tokenizer, and a configuration of a run on drawn shapes."""

import json

from configs.quickstart import get_config
from luspo_jax.datasets import shapes
from luspo_jax.models import char_tokenizer


def write_model(folder, *, hidden=32, seed_fields=None):
    """Writes config, tokenizer and image processor settings; no weights."""
    characters = shapes.CHARACTERS
    char_tokenizer.write_tokenizer(folder, characters, max_length=128, images=True)
    tokens = char_tokenizer.vocabulary(characters, images=True)
    start, end, image, video = (tokens.index(token) for token in char_tokenizer.IMAGE_TOKENS)
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": char_tokenizer.END_ID,
        "pad_token_id": char_tokenizer.PAD_ID,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    }
    (folder / "config.json").write_text(json.dumps(config | (seed_fields or {})))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 28 * 28,
        "max_pixels": 200 * 28 * 28,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def config(folder):
    """A run of two steps on the model of `folder`, weights at random."""
    c = get_config()
    c.num_steps = 2
    c.model.path, c.model.random_weights = str(folder), True
    c.data.name = "shapes"
    c.data.max_prompt_length = 40
    c.reward.parts = {"exact": 1.0}
    c.reward.options = {"exact": {"pattern": shapes.ANSWER_PATTERN}}
    c.rollout.prompts_per_step, c.rollout.group_size = 8, 4
    c.rollout.max_response_length = 16
    c.rollout.num_slots = 16
    c.rollout.chunk_length = 8
    c.train.num_minibatches = 2
    c.eval.num_problems, c.eval.num_samples = 16, 1
    c.output.export = False
    return c
