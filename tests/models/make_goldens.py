"""Writes `goldens/`: tiny random checkpoints with the logits and greedy tokens of `transformers`.

Needs torch: `python tests/models/make_goldens.py [VARIANT ...]`. The live parity tests build other
sizes and seeds of the same variants through `reference_model`.
"""

import copy
import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

GOLDENS = pathlib.Path(__file__).parent / "goldens"
VERSIONS = GOLDENS / "versions.json"  # by variant
GREEDY_TOKENS = 64
TIE = 2e-3  # a closer call than this between two tokens says nothing about either port

COMMON = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}

# Every switch of the decoder in both positions. `stored` is how the folder is written.
VARIANTS = {
    "qwen2_tied": {
        "kind": "qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2_multihead": {
        "kind": "qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "theta": 1e6,
    },
    "qwen2_multiquery": {
        "kind": "qwen2",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-3,
        "eos_token_id": [3, 5],
    },
    "qwen2_bfloat16_shards": {
        "kind": "qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "theta": 1e6,
        "stored": {"dtype": torch.bfloat16, "max_shard_size": "16KB"},
    },
    "qwen3_tied": {
        "kind": "qwen3",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "theta": 1e6,
        "tie_word_embeddings": True,
    },
    "qwen3_odd_sizes": {
        "kind": "qwen3",
        "hidden_size": 30,
        "intermediate_size": 37,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 14,
    },
    "qwen3_bias": {
        "kind": "qwen3",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
    },
    "qwen3_one_layer": {
        "kind": "qwen3",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "theta": 50.0,
        "rms_norm_eps": 1e-2,
    },
    "qwen3_deep": {
        "kind": "qwen3",
        "num_hidden_layers": 5,
        "hidden_size": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "tie_word_embeddings": True,
        "eos_token_id": 7,
    },
    "llama_tied": {
        "kind": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "eos_token_id": [3, 5],
    },
    "llama_bias_odd_sizes": {
        "kind": "llama",
        "hidden_size": 30,
        "intermediate_size": 37,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 14,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "theta": 5e5,
    },
    # Rotary positions go beyond the original context: 73 tokens where they began with 16, or 24.
    "llama_3": {
        "kind": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "theta": 5e5,
        "rope": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_yarn": {
        "kind": "llama",
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 96,
        "rope": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "mscale": 1.5,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    },
    "qwen2_yarn": {
        "kind": "qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "theta": 1e6,
        "max_position_embeddings": 96,
        "rope": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    },
    "qwen3_yarn": {
        "kind": "qwen3",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "theta": 1e6,
        "max_position_embeddings": 48,
        "rope": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 24,
            "attention_factor": 1.25,
        },
    },
    "moe_normed": {
        "kind": "qwen3_moe",
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "moe_not_normed": {
        "kind": "qwen3_moe",
        "norm_topk_prob": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "tie_word_embeddings": True,
    },
    "moe_sparse_step": {
        "kind": "qwen3_moe",
        "num_hidden_layers": 4,
        "hidden_size": 24,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 10,
        "decoder_sparse_step": 2,
        "theta": 1e6,
        "stored": {"dtype": torch.bfloat16, "max_shard_size": "16KB"},
    },
    "moe_mlp_only": {
        "kind": "qwen3_moe",
        "num_hidden_layers": 4,
        "hidden_size": 24,
        "norm_topk_prob": False,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7,
        "mlp_only_layers": [0, 3],
        "tie_word_embeddings": True,
        "eos_token_id": [3, 5],
    },
    "moe_step_and_mlp_only": {
        "kind": "qwen3_moe",
        "num_hidden_layers": 4,
        "norm_topk_prob": True,
        "num_experts": 5,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    },
    "moe_top_1": {
        "kind": "qwen3_moe",
        "norm_topk_prob": False,
        "num_experts": 16,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "rms_norm_eps": 1e-5,
    },
    "moe_all_of_them": {
        "kind": "qwen3_moe",
        "norm_topk_prob": False,
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 20,
        "theta": 1e6,
    },
    "moe_bias_odd_sizes": {
        "kind": "qwen3_moe",
        "hidden_size": 30,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 14,
        "attention_bias": True,
        "norm_topk_prob": True,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 13,
    },
}
MOE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # unless they say so
# Recorded; the other mixtures of experts are compared live only.
RECORDED = [
    *(variant for variant, fields in VARIANTS.items() if fields["kind"] != "qwen3_moe"),
    "moe_sparse_step",
    "moe_mlp_only",
    "moe_bias_odd_sizes",
]
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}


def reference_model(variant: str, *, seed: int, **sizes):
    """A `transformers` model of a variant in float32, every weight drawn at random."""
    mixture = VARIANTS[variant]["kind"] == "qwen3_moe"
    fields = COMMON | (MOE if mixture else {}) | VARIANTS[variant] | sizes
    stored = fields.pop("stored", {})
    kind, theta = fields.pop("kind"), fields.pop("theta", 10_000.0)
    rope = {"rope_type": "default"} | fields.pop("rope", {})
    fields["rope_parameters"] = rope | {"rope_theta": theta}
    config_class, model_class = CLASSES[kind]
    torch.manual_seed(seed)
    model = plainly(model_class(config_class(**fields)).eval())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            if "dtype" in stored:
                parameter.copy_(parameter.to(stored["dtype"]))
    return model


def plainly(model):
    """The model with experts computed one after another, as its own file spells them out."""
    if model.config.model_type == "qwen3_moe":
        model.set_experts_implementation("eager")
    return model


def save(model, variant: str, folder: pathlib.Path) -> None:
    """Writes the model by `save_pretrained`, in the type and shards of its variant."""
    stored = VARIANTS[variant].get("stored", {})
    model = copy.deepcopy(model).to(stored.get("dtype", torch.float32))
    model.save_pretrained(folder, max_shard_size=stored.get("max_shard_size", "5GB"))


def ragged_tokens(vocab_size: int, lengths: list[int], *, seed: int) -> np.ndarray:
    """Random tokens [B, T]; what follows a row's length is random too, and must not matter."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab_size, (len(lengths), max(lengths))).astype(np.int32)


@torch.no_grad()
def reference_logits(model, tokens_BT: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Logits [B, T, V] of a batch padded on the right, zero on padding."""
    mask_BT = np.arange(tokens_BT.shape[1])[None] < np.array(lengths)[:, None]
    logits = model(
        torch.tensor(tokens_BT), attention_mask=torch.tensor(mask_BT.astype(np.int64))
    ).logits.numpy()
    return np.where(mask_BT[..., None], logits, 0).astype(np.float32)


@torch.no_grad()
def reference_greedy(model, tokens_BT: np.ndarray, lengths: list[int], count: int):
    """Greedy continuations [B, count] by `generate`, and the closest call between two tokens."""
    model = copy.deepcopy(model)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    rows, closest = [], np.inf
    for row, length in zip(tokens_BT, lengths, strict=True):
        made = model.generate(
            torch.tensor(row[None, :length]),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        rows.append(made.sequences[0, length:].numpy())
        top = torch.stack(made.logits).topk(2).values
        closest = min(closest, (top[..., 0] - top[..., 1]).min().item())
    return np.stack(rows).astype(np.int32), closest


def main(variants: list[str]) -> None:
    versions = json.loads(VERSIONS.read_text()) if VERSIONS.is_file() else {}
    for variant in variants or RECORDED:
        shutil.rmtree(GOLDENS / variant, ignore_errors=True)
        lengths = [9, 1, 5]
        tokens_BT = ragged_tokens(COMMON["vocab_size"], lengths, seed=0)
        for seed in range(100):
            model = reference_model(variant, seed=seed)
            greedy, closest = reference_greedy(model, tokens_BT, lengths, GREEDY_TOKENS)
            if closest > TIE:
                break
        save(model, variant, GOLDENS / variant)
        np.savez_compressed(
            GOLDENS / variant / "expected.npz",
            tokens_BT=tokens_BT,
            lengths_B=np.array(lengths, np.int32),
            logits_BTV=reference_logits(model, tokens_BT, lengths),
            greedy_BT=greedy,
        )
        print(
            f"{variant}: seed {seed}, closest call {closest:.1e}, {len(np.unique(greedy))} tokens"
        )
        versions[variant] = {"torch": torch.__version__, "transformers": transformers.__version__}
        VERSIONS.write_text(json.dumps(versions, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
