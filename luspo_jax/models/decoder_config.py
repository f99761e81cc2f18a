"""Decoder configuration from a Hugging Face `config.json`, read in full or refused by name."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import expert_config, rope, vision_config
from luspo_jax.models.expert_config import is_int, required
from luspo_jax.models.rope import RopeScaling
from luspo_jax.models.vision_config import VisionConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Stack:
    """Consecutive layers of one kind, with parameters stacked under one name.

    Attributes:
      name: key in the parameters.
      start: index of the first layer.
      count: layers.
      experts: whether their MLPs are mixtures of experts.
    """

    name: str
    start: int
    count: int
    experts: bool


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """All settings of the decoder's parameters and arithmetic; hashable, static under jit.

    Attributes:
      qkv_bias: query, key and value projections have a bias (Qwen2, Qwen2.5).
      out_bias: the attention's output projection has a bias (Qwen3 with `attention_bias`).
      qk_norm: queries and keys are RMS-normalised over head_dim before rotation (Qwen3).
      tie_embeddings: the head is the embedding matrix.
      max_position: longest sequence in the weights' training.
      rope_scaling: how rotary frequencies are stretched; None leaves them plain.
      eos_token_ids: every token that ends a response, sorted.
      dtype: type declared by the checkpoint, or None; the caller chooses the type to load.
      num_experts: experts in every layer but `dense_layers`; 0 = none.
      experts_per_token: experts chosen per token.
      expert_dim: width of each expert.
      norm_topk: whether the weights of a token's experts are divided by their sum.
      dense_layers: indices of layers with an ordinary MLP of width mlp_dim.
      mrope_section: numbers of the head_dim / 2 rotations that use the position in time, the row
        and the column; empty if a position is one number.
      vision: configuration of the image tower; None in a text model.
      image_token_id: placeholder of an image embedding; the checkpoint's `video_token_id` is
        refused.
      vision_start_token_id: precedes an image's tokens; `vision_end_token_id` follows them.
    """

    model_type: str
    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    max_position: int
    out_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_dim: int = 0
    norm_topk: bool = False
    dense_layers: tuple[int, ...] = ()
    mrope_section: tuple[int, ...] = ()
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        if self.model_type not in ARCHITECTURES:
            raise ConfigError(
                f"model_type {self.model_type!r} is not implemented; use one of "
                f"{sorted(ARCHITECTURES)}"
            )
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} must be even for rotary positions")
        special = {*self.eos_token_ids, self.bos_token_id, self.pad_token_id} - {None}
        outside = sorted(token for token in special if not 0 <= token < self.vocab_size)
        if outside:
            raise ConfigError(
                f"eos_token_ids, bos_token_id and pad_token_id must lie in the vocabulary of "
                f"{self.vocab_size}, {outside} do not"
            )
        expert_config.check_experts(self)
        vision_config.check_vision(self)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Returns runs of layers of one kind, in order; one stack, "layers", if all are alike."""
        kinds = [
            self.num_experts > 0 and layer not in self.dense_layers
            for layer in range(self.num_layers)
        ]
        starts = [i for i in range(self.num_layers) if i == 0 or kinds[i] != kinds[i - 1]]
        ends = [*starts[1:], self.num_layers]
        return tuple(
            Stack(
                "layers" if len(starts) == 1 else f"layers_{start:03d}",
                start,
                end - start,
                kinds[start],
            )
            for start, end in zip(starts, ends, strict=True)
        )

    @property
    def num_expert_layers(self) -> int:
        """Counts the layers with experts."""
        return sum(stack.count for stack in self.stacks if stack.experts)


_POSITIVE = (
    "vocab_size",
    "num_layers",
    "embed_dim",
    "mlp_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position",
)
_OF_EXPERTS = ("num_experts", "experts_per_token", "expert_dim")  # 0 without experts
_NUMBERS = ("rope_theta", "rms_norm_eps")
_SWITCHES = ("qkv_bias", "out_bias", "qk_norm", "tie_embeddings", "norm_topk")
_BIASED = ("qwen2", "qwen2_5_vl")  # projections always have a bias
_QWEN3 = ("qwen3", "qwen3_moe")
_TOKENS = ("bos_token_id", "pad_token_id")

# Our field → its name in config.json. All are required.
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_position": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}

# Read by the functions below, each with its own rule.
_RULED = {
    "model_type",
    "architectures",
    "head_dim",
    "attention_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "torch_dtype",
    "dtype",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "layer_types",
}

# Switches for which only one value is implemented.
_ONLY = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "mlp_bias": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_decoder": False,
    "chunk_size_feed_forward": 0,
    "use_mrope": False,
    "rope_interleaved": False,
    "pretraining_tp": 1,
    **expert_config.NEUTRAL,
}

# The forward pass does not depend on these. `sliding_window` and `max_window_layers` act through
# `use_sliding_window`; this port never applies dropout.
_INERT = {
    "sliding_window",
    "max_window_layers",
    "attention_dropout",
    "initializer_range",
    "use_cache",
    "transformers_version",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "id2label",
    "label2id",
    "problem_type",
    "tokenizer_class",
    "unsloth_fixed",
    "unsloth_version",
    "is_llama_config",
    "transformers.js_config",
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Returns the DecoderConfig of a Hugging Face `config.json` (transformers 4 or 5 style).

    Raises ConfigError, naming the field, if a field is missing or asks for something that this
    decoder does not compute: nothing is ignored, and no default replaces an absent value.
    """
    model_type = hf.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model_type {model_type!r} is not implemented; use a checkpoint of one of "
            f"{sorted(ARCHITECTURES)}{expert_config.mixture_hint(hf)}"
        )
    seeing = model_type == vision_config.MODEL_TYPE
    hf = vision_config.flat(hf) if seeing else hf
    _refuse_unimplemented(hf, model_type)
    values = {ours: required(hf, name) for ours, name in _FIELDS.items()}
    rope_theta, rope_scaling = rope.read(hf, () if seeing else rope.KINDS)
    if model_type == "qwen3_moe":
        _check_type("num_layers", values["num_layers"])
        values |= expert_config.expert_fields(hf, values["num_layers"])
    values |= vision_config.decoder_fields(hf) if seeing else {}
    return DecoderConfig(
        model_type=model_type,
        head_dim=_head_dim(hf, model_type),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qk_norm=model_type in _QWEN3,
        qkv_bias=_attention_bias(hf) or model_type in _BIASED,
        out_bias=model_type not in _BIASED and _attention_bias(hf),
        eos_token_ids=_token_ids(hf.get("eos_token_id")),
        bos_token_id=hf.get("bos_token_id"),
        pad_token_id=hf.get("pad_token_id"),
        dtype=_dtype(hf),
        **values,
    )


def read_config(folder: str | pathlib.Path) -> DecoderConfig:
    """Returns the DecoderConfig of a checkpoint folder's `config.json`.

    The set of tokens that end a response comes from `generation_config.json` if that file exists.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    try:
        config = decoder_config(_read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return config
    values = _read_json(generation)
    changes = {}
    if values.get("eos_token_id") is not None:
        changes["eos_token_ids"] = _token_ids(values["eos_token_id"])
    if values.get("pad_token_id") is not None:
        changes["pad_token_id"] = values["pad_token_id"]
    return dataclasses.replace(config, **changes)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `config.json` of a configuration: `decoder_config(hf_config(c)) == c`.

    Both spellings of the rotary base and of the type are written, for transformers 4 and 5 and
    other readers.
    """
    values = {name: getattr(config, ours) for ours, name in _FIELDS.items()}
    values |= {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        **rope.hf_fields(config.rope_theta, config.rope_scaling),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
    }
    if config.model_type != "llama":
        values |= {
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": config.num_layers,
        }
    if config.model_type not in _BIASED:
        values["attention_bias"] = config.qkv_bias
    if config.num_experts:
        values |= {name: getattr(config, ours) for ours, name in expert_config.FIELDS.items()}
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
    if config.vision is not None:
        values |= vision_config.hf_fields(config)
    if config.dtype is not None:
        values["torch_dtype"] = config.dtype
    return dict(sorted(values.items()))


def _check_type(name, value):
    """Refuses a field of the wrong type or range, naming both of its names."""
    theirs = (_FIELDS | expert_config.FIELDS).get(name, name)
    both = f"{name} ({theirs})" if theirs != name else name
    if name in _POSITIVE and not (is_int(value) and value > 0):
        raise ConfigError(f"{both} must be a positive integer, not {value!r}")
    if name in _OF_EXPERTS and not (is_int(value) and value >= 0):
        raise ConfigError(f"{both} must be a positive integer, not {value!r}")
    if name in _NUMBERS and not ((is_int(value) or isinstance(value, float)) and value > 0):
        raise ConfigError(f"{both} must be a positive number, not {value!r}")
    if name in _SWITCHES and not isinstance(value, bool):
        raise ConfigError(f"{both} must be true or false, not {value!r}")
    if name in _TOKENS and not (value is None or is_int(value)):
        raise ConfigError(f"{both} must be a token number, not {value!r}")


def _refuse_unimplemented(hf, model_type):
    for name, allowed in _ONLY.items():
        value = hf.get(name)
        if value is not None and value != allowed:
            raise ConfigError(
                f"{name} = {value!r} is not implemented, only {allowed!r}; "
                f"use a checkpoint without it"
            )
    architectures = hf.get("architectures") or [ARCHITECTURES[model_type]]
    if list(architectures) != [ARCHITECTURES[model_type]]:
        raise ConfigError(
            f"architectures = {architectures!r} is not implemented; a {model_type} checkpoint "
            f"must be a {ARCHITECTURES[model_type]}"
        )
    layer_types = set(hf.get("layer_types") or ())
    if layer_types - {"full_attention"}:
        raise ConfigError(
            f"layer_types {sorted(layer_types)} are not implemented, only 'full_attention'; "
            f"use a checkpoint without sliding windows"
        )
    known = {*_FIELDS.values(), *_RULED, *_ONLY, *_INERT}
    known |= expert_config.KNOWN if model_type == expert_config.MODEL_TYPE else set()
    known |= vision_config.KNOWN if model_type == vision_config.MODEL_TYPE else set()
    for name, value in hf.items():
        if name not in known and not name.startswith("_") and value is not None:
            mixture = name in expert_config.KNOWN
            raise ConfigError(
                f"{name} = {value!r} is not known to the {model_type} decoder; "
                + (f"the one with experts is {expert_config.MODEL_TYPE}; " if mixture else "")
                + "if it changes nothing that the model computes, delete it from config.json"
            )


def _head_dim(hf, model_type):
    if hf.get("head_dim") is not None:
        return hf["head_dim"]
    if model_type in _QWEN3:  # cannot be derived: Qwen3's differs from D/N by design
        return required(hf, "head_dim")
    embed_dim, num_heads = required(hf, "hidden_size"), required(hf, "num_attention_heads")
    _check_type("embed_dim", embed_dim)
    _check_type("num_heads", num_heads)
    if embed_dim % num_heads:
        raise ConfigError(
            f"num_attention_heads {num_heads} does not divide hidden_size {embed_dim}; "
            f"add head_dim to config.json"
        )
    return embed_dim // num_heads


def _attention_bias(hf):
    value = hf.get("attention_bias")
    if not isinstance(value, bool | None):
        raise ConfigError(f"attention_bias must be true or false, not {value!r}")
    if value is False and hf["model_type"] in _BIASED:
        raise ConfigError(
            f"attention_bias = false is not implemented for {hf['model_type']}; remove it"
        )
    return bool(value)


def _dtype(hf):
    found = {}
    for name in ("torch_dtype", "dtype"):
        if hf.get(name) is not None:
            found[name] = str(hf[name]).removeprefix("torch.")
    if len(set(found.values())) > 1:
        raise ConfigError(f"{found} contradict each other; keep the right one")
    value = next(iter(found.values()), None)
    if value is not None and value not in DTYPES:
        raise ConfigError(f"dtype {value!r} is not implemented; use one of {list(DTYPES)}")
    return value


def _token_ids(value):
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ConfigError(f"eos_token_id must hold token numbers, not {token!r}")
    return tuple(sorted(set(ids)))


def _read_json(path):
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; give a folder that holds a Hugging Face checkpoint"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values
