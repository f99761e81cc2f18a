"""The decoder configuration of a GGUF file, from its metadata; read in full or refused by name."""

from typing import Any

import numpy as np

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import rope
from luspo_jax.models.decoder_config import DecoderConfig, decoder_config
from luspo_jax.models.gguf_file import GgufFile
from luspo_jax.models.rope import RopeScaling
from luspo_jax.models.safetensors_folder import WeightsError

# llama.cpp's name → `model_type`.
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
ROPE_FACTORS = "rope_freqs.weight"  # by which Llama 3 divides its rotary frequencies

# Field of config.json → key of the metadata after the architecture's name. All are required.
_FIELDS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_EXPERT_FIELDS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
# Read by the functions below, each with its own rule.
_RULED = {
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
}
# Keys of which only one value is implemented.
_ONLY = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_count": 0,
    "leading_dense_block_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "use_parallel_residual": False,
}
_INERT = {"rope.scaling.finetuned", "tensor_data_layout"}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Those of Llama 3.1 to 3.3; a file holds the factors that come of them, not these three.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}


def gguf_config(file: GgufFile) -> DecoderConfig:
    """Returns the DecoderConfig of a GGUF file, in float32.

    Raises:
      WeightsError: a family that is not read, or a field that is missing or asks for something that
        the decoder does not compute; it names the field.
    """
    if file.architecture not in FAMILIES:
        raise WeightsError(
            f"{file.path}: the architecture {file.architecture!r} is not read; these are: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    _refuse_unknown(file)
    try:
        return decoder_config(_fields(file))
    except ConfigError as error:
        raise WeightsError(f"{file.path}: {error}") from None


def _fields(file):
    """Returns the fields of config.json."""
    experts = file.architecture == "qwen3moe"
    names = _FIELDS | (_EXPERT_FIELDS if experts else {})
    values = {name: _required(file, key) for name, key in names.items()}
    head_dim = _head_dim(file, values)
    theta = _short(_own(file, "rope.freq_base", 10_000.0))  # the format's default
    vocabulary = file.tensors.get("token_embd.weight")
    if vocabulary is None:
        raise WeightsError(f"{file.path} holds no token_embd.weight: take a file of a whole model")
    size = _own(file, "vocab_size", vocabulary.shape[0])
    if size != vocabulary.shape[0]:
        raise WeightsError(
            f"{file.path}: {file.architecture}.vocab_size is {size} and token_embd.weight has "
            f"{vocabulary.shape[0]} rows: they do not belong together"
        )
    values |= {
        "model_type": FAMILIES[file.architecture],
        "vocab_size": vocabulary.shape[0],
        "num_key_value_heads": _own(file, "attention.head_count_kv", values["num_attention_heads"]),
        "head_dim": head_dim,
        "rms_norm_eps": _short(values["rms_norm_eps"]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **rope.hf_fields(theta, _scaling(file, head_dim, theta)),
        **_token_ids(file),
        "torch_dtype": "float32",
    }
    if values["model_type"] != "qwen2":  # which always has the biases
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if experts:  # llama.cpp always divides the weights of a token's experts by their sum
        values |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return values


def _own(file, key, default=None):
    return file.metadata.get(f"{file.architecture}.{key}", default)


def _required(file, key) -> Any:
    value = _own(file, key)
    if value is None:
        raise WeightsError(f"{file.path}: the metadata lack {file.architecture}.{key}")
    return value


def _short(value) -> float:
    """Returns the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _refuse_unknown(file):
    start = f"{file.architecture}."
    known = {*_FIELDS.values(), *_RULED, *_INERT}
    known |= set(_EXPERT_FIELDS.values()) if file.architecture == "qwen3moe" else set()
    for name, value in file.metadata.items():
        key = name.removeprefix(start)
        if not name.startswith(start) or key in known:
            continue
        if key not in _ONLY:
            raise WeightsError(f"{file.path}: {name} = {value!r} is not known to this decoder")
        if value != _ONLY[key]:
            raise WeightsError(
                f"{file.path}: {name} = {value!r} is not implemented, only {_ONLY[key]!r}"
            )


def _head_dim(file, values):
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if not isinstance(heads, int):
        raise WeightsError(f"{file.path}: layers differ in their attention heads, {heads}")
    head_dim = _own(file, "attention.key_length", width // heads if heads else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _own(file, key, head_dim) != head_dim:
            raise WeightsError(
                f"{file.path}: {file.architecture}.{key} = {_own(file, key)} is not implemented, "
                f"only the size of a head, {head_dim}"
            )
    return head_dim


def _scaling(file, head_dim, theta):
    """Returns how rotary frequencies are stretched; None if they are not."""
    factor = _own(file, "rope.scaling.factor", _own(file, "rope.scale_linear", 0.0))
    # A factor without a type is linear, as llama.cpp reads it.
    kind = _own(file, "rope.scaling.type", "linear" if factor else "none")
    if ROPE_FACTORS in file.tensors:
        if kind == "yarn":
            raise WeightsError(f"{file.path} has both yarn and {ROPE_FACTORS}: it may have one")
        return _llama3(file, head_dim, theta)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind != "yarn":
        raise WeightsError(
            f"{file.path}: rotary scaling of type {kind!r} is not implemented, only 'yarn' and "
            "that of Llama 3"
        )
    context = _required(file, "rope.scaling.original_context_length")
    return RopeScaling("yarn", _short(_required(file, "rope.scaling.factor")), context)


def _llama3(file, head_dim, theta):
    """Returns the scaling whose divisors the file holds; its largest is the factor."""
    stored = file.tensors[ROPE_FACTORS].values()
    scaling = RopeScaling("llama3", _short(stored.max()), **_LLAMA3)
    plain = rope.frequencies(head_dim, theta)
    made = plain / rope.frequencies(head_dim, theta, scaling)
    if stored.shape != made.shape or not np.allclose(stored, made, rtol=1e-4):
        raise WeightsError(
            f"{file.path}: {ROPE_FACTORS} are not those of Llama 3 (factor {scaling.factor}, "
            f"{_LLAMA3}), others are not implemented"
        )
    return scaling


def _token_ids(file):
    ids = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in _ENDS}
    return {
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": sorted({value for value in ids.values() if value is not None}) or None,
    }
