"""The architecture of a base policy, set by flags, and the image processor of a vision model."""

from absl import flags

from luspo_jax.models import char_tokenizer
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.vision_config import VisionConfig

LAYERS = flags.DEFINE_integer("num_layers", 3, "Decoder layers.", 1)
EMBED = flags.DEFINE_integer("embed_dim", 64, "Width; a head is a quarter of it.", 8)
MLP = flags.DEFINE_integer("mlp_dim", 128, "Width of the MLP.", 1)

EXPERTS = flags.DEFINE_integer("num_experts", 0, "Experts of a layer in place of its MLP.", 0)
EXPERTS_EACH = flags.DEFINE_integer("experts_per_token", 2, "Experts that a token goes to.", 1)
EXPERT_DIM = flags.DEFINE_integer("expert_dim", 32, "Width of an expert.", 1)
NORM_TOPK = flags.DEFINE_bool("norm_topk", True, "The weights of a token's experts sum to one.")
BALANCE = flags.DEFINE_float("balance", 0.01, "Coefficient of the load-balancing loss.", 0.0)

VISION_LAYERS = flags.DEFINE_integer("vision_layers", 2, "Blocks of the tower, the last full.", 1)
VISION_EMBED = flags.DEFINE_integer("vision_embed_dim", 48, "Width of a patch in the tower.", 16)
VISION_MLP = flags.DEFINE_integer("vision_mlp_dim", 96, "Width of the MLP of its blocks.", 1)
# Rotations by row and by column are the slow half of all (`mrope_section`). With the usual 10,000
# they hardly differ between neighbours, in heads as narrow as these.
THETA = flags.DEFINE_float("vision_rope_theta", 10.0, "Base of the decoder's rotations.", 1.5)

# Flags that decide the folder's content besides the task, with experts or a tower.
SIZES = (LAYERS, EMBED, MLP)
OF_EXPERTS = (EXPERTS, EXPERTS_EACH, EXPERT_DIM, NORM_TOPK, BALANCE)
OF_VISION = (VISION_LAYERS, VISION_EMBED, VISION_MLP, THETA)

MAX_POSITION = 128
_WINDOW = 56  # pixels: two units per side, so that a drawing is a few windows with little padding


def text_config(vocab_size: int) -> DecoderConfig:
    """Builds the Qwen3 or Qwen3-MoE configuration from the flags."""
    experts = {}
    if EXPERTS.value:
        experts = {
            "num_experts": EXPERTS.value,
            "experts_per_token": EXPERTS_EACH.value,
            "expert_dim": EXPERT_DIM.value,
            "norm_topk": NORM_TOPK.value,
        }
    return DecoderConfig(
        model_type="qwen3_moe" if experts else "qwen3",
        rope_theta=10_000.0,
        qkv_bias=False,
        qk_norm=True,
        **_common(vocab_size),
        **experts,
    )


def image_config(vocab_size: int) -> DecoderConfig:
    """Builds the Qwen2.5-VL configuration from the flags; IMAGE_TOKENS end its vocabulary."""
    first = vocab_size - len(char_tokenizer.IMAGE_TOKENS)
    start, end, image, video = range(first, vocab_size)
    half = EMBED.value // 8  # rotations of a head, split in proportion 2 : 3 : 3
    turned = half * 3 // 8
    return DecoderConfig(
        model_type="qwen2_5_vl",
        rope_theta=THETA.value,
        qkv_bias=True,
        qk_norm=False,
        mrope_section=(half - 2 * turned, turned, turned),
        vision=VisionConfig(
            depth=VISION_LAYERS.value,
            embed_dim=VISION_EMBED.value,
            mlp_dim=VISION_MLP.value,
            num_heads=4,
            out_dim=EMBED.value,
            full_layers=(VISION_LAYERS.value - 1,),
            window_size=_WINDOW,
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        **_common(vocab_size),
    )


def _common(vocab_size):
    return {
        "vocab_size": vocab_size,
        "num_layers": LAYERS.value,
        "embed_dim": EMBED.value,
        "mlp_dim": MLP.value,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": EMBED.value // 4,
        "rms_norm_eps": 1e-6,
        "tie_embeddings": True,
        "max_position": MAX_POSITION,
        "eos_token_ids": (char_tokenizer.END_ID,),
        "pad_token_id": char_tokenizer.PAD_ID,
        "dtype": "float32",
    }


def image_processor(config: DecoderConfig) -> dict:
    """Returns the tower's `preprocessor_config.json`: drawings keep their size."""
    vision = config.vision
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "min_pixels": (vision.patch_size * vision.merge_size) ** 2,
        "max_pixels": 256 * (vision.patch_size * vision.merge_size) ** 2,
        # Approximate mean and spread of the drawings; photographs have others.
        "image_mean": [0.85, 0.84, 0.8],
        "image_std": [0.28, 0.25, 0.31],
    }
