"""The vision tower's configuration, and the fields Qwen2.5-VL adds to a decoder's `config.json`.

Two formats are read: the hub's, with the decoder's fields at the top level, and transformers 5's,
with the decoder's in `text_config`. Every field is read, or refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models.expert_config import is_int, required

MODEL_TYPE = "qwen2_5_vl"
ROPE_THETA = 10_000.0  # of the tower; not in the checkpoints
NORM_EPS = 1e-6  # likewise


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """All settings of the tower's parameters and arithmetic; hashable, static under jit.

    Attributes:
      depth: blocks.
      embed_dim: width of a patch inside the tower.
      mlp_dim: width of a block's MLP.
      num_heads: attention heads, each with its own keys.
      out_dim: width of the tower's output, equal to the decoder's.
      full_layers: blocks in which a patch sees its whole image; in the others, its window.
      patch_size: pixels along the side of a patch.
      merge_size: patches along the side of a unit, which becomes one token.
      window_size: pixels along the side of a window.
      temporal_patch_size: frames in a patch; an image is repeated that often.
      in_channels: colours.
    """

    depth: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    out_dim: int
    full_layers: tuple[int, ...]
    patch_size: int = 14
    merge_size: int = 2
    window_size: int = 112
    temporal_patch_size: int = 2
    in_channels: int = 3

    def __post_init__(self):
        for ours, theirs in FIELDS.items():
            value = getattr(self, ours)
            if not (is_int(value) and value > 0):
                raise ConfigError(
                    f"vision_config: {_both(ours, theirs)} must be a positive integer, "
                    f"not {value!r}"
                )
        if self.embed_dim % self.num_heads or self.head_dim % 4:
            raise ConfigError(
                f"vision_config: hidden_size {self.embed_dim} over num_heads {self.num_heads} must "
                f"be a multiple of 4, for rotary positions in two directions"
            )
        if self.window_size % (self.patch_size * self.merge_size):
            raise ConfigError(
                f"vision_config: window_size {self.window_size} must be a multiple of patch_size "
                f"{self.patch_size} times spatial_merge_size {self.merge_size}"
            )
        full = self.full_layers
        if not isinstance(full, tuple) or list(full) != [i for i in range(self.depth) if i in full]:
            raise ConfigError(
                f"vision_config: full_layers (fullatt_block_indexes) must be some of the blocks 0 "
                f"to {self.depth - 1}, in order, not {full!r}"
            )

    @property
    def head_dim(self) -> int:
        """Returns the width of a head."""
        return self.embed_dim // self.num_heads

    @property
    def unit_patches(self) -> int:
        """Returns the number of patches that become one token."""
        return self.merge_size**2

    @property
    def window_units(self) -> int:
        """Returns the number of units along the side of a window."""
        return self.window_size // (self.patch_size * self.merge_size)

    @property
    def window_slots(self) -> int:
        """Returns the number of patches in a window."""
        return self.window_units**2 * self.unit_patches

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """Returns a patch's shape in the image processor: colours, frames, rows, columns."""
        return (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)


# Our field → its name in `vision_config`. All are required.
FIELDS = {
    "depth": "depth",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_heads",
    "out_dim": "out_hidden_size",
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "window_size": "window_size",
    "temporal_patch_size": "temporal_patch_size",
    "in_channels": "in_channels",
}
_CHANNELS = ("in_channels", "in_chans")  # transformers 5 and the hub
_FULL = "fullatt_block_indexes"
# For videos, which this port refuses, and for HF's own training.
_INERT = {"tokens_per_second", "initializer_range", "transformers_version"}
_ONLY = {
    "hidden_act": ("silu",),
    "model_type": (MODEL_TYPE, "qwen2_5_vl_vision"),
}

# Our field of a DecoderConfig → its name in config.json. All are required.
TOKENS = {
    "image_token_id": "image_token_id",
    "video_token_id": "video_token_id",
    "vision_start_token_id": "vision_start_token_id",
    "vision_end_token_id": "vision_end_token_id",
}
# Names at the top level, after `flat`, that a text model lacks; nothing reads `vision_token_id`.
KNOWN = {*TOKENS.values(), "vision_config", "vision_token_id", "mrope_section"}


def flat(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the decoder's fields of a Qwen2.5-VL `config.json` to the top level.

    It merges `text_config` and takes `mrope_section` out of `rope_scaling` or `rope_parameters`;
    the rest of these is ordinary rotary positions.

    Raises:
      ConfigError: the two levels contradict each other, or sections are missing or several.
    """
    flat = {name: value for name, value in hf.items() if name != "text_config"}
    inner = dict(hf.get("text_config") or {})
    kind = inner.pop("model_type", None)
    if kind not in (None, MODEL_TYPE, "qwen2_5_vl_text"):
        raise ConfigError(f"text_config: model_type {kind!r} is not implemented, only 'qwen2_5_vl'")
    tied = "tie_word_embeddings"  # older files state it inside, newer ones do not
    for name in ("architectures", "transformers_version", "dtype", "torch_dtype"):
        value = inner.pop(name, None)  # the whole model's values are outside
        if "dtype" in name and not {"dtype", "torch_dtype"} & hf.keys():
            flat[name] = value
    for name, value in inner.items():
        outer = flat.get(name)
        if value is not None and outer is not None and outer != value and name != tied:
            raise ConfigError(
                f"{name} is {outer!r} and in text_config {value!r}; keep the right one"
            )
        if outer is None or (name == tied and value):
            flat[name] = value
    found = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = dict(flat.get(name) or {})
        if rope.get("mrope_section") is not None:
            found[name] = list(rope.pop("mrope_section"))
            for key in ("type", "rope_type"):
                rope = rope | {key: "default"} if rope.get(key) == "mrope" else rope
            flat[name] = rope
    if not found:
        raise ConfigError("mrope_section is missing from rope_scaling; add it to config.json")
    if len({str(sections) for sections in found.values()}) > 1:
        raise ConfigError(f"mrope_section contradicts itself: {found}; keep the right one")
    return flat | {"mrope_section": next(iter(found.values()))}


def decoder_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the DecoderConfig fields that a text model lacks, from the output of `flat`."""
    values = {ours: required(hf, theirs) for ours, theirs in TOKENS.items()}
    vision = required(hf, "vision_config")
    if not isinstance(vision, Mapping):
        raise ConfigError(f"vision_config must be a JSON object, not {vision!r}")
    return values | {"mrope_section": tuple(hf["mrope_section"]), "vision": vision_config(vision)}


def vision_config(hf: Mapping[str, Any]) -> VisionConfig:
    """Returns the VisionConfig of the `vision_config` in a Hugging Face `config.json`.

    Raises ConfigError, naming the field, if a field is missing or asks for something that this
    tower does not compute.
    """
    try:
        return _vision_config(dict(hf))
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if "vision_config" in text else f"vision_config: {text}") from None


def _vision_config(hf):
    for name, allowed in _ONLY.items():
        if hf.get(name) is not None and hf[name] not in allowed:
            raise ConfigError(f"{name} = {hf[name]!r} is not implemented, only {allowed[0]!r}")
    spatial = hf.pop("spatial_patch_size", None)  # written by the hub, never read
    if spatial is not None and spatial != hf.get("patch_size"):
        raise ConfigError(f"spatial_patch_size {spatial} must be patch_size {hf.get('patch_size')}")
    channels = {name: hf[name] for name in _CHANNELS if hf.get(name) is not None}
    if len(set(channels.values())) > 1:
        raise ConfigError(f"{channels} contradict each other; keep the right one")
    hf["in_channels"] = next(iter(channels.values()), None)
    _check_rope(hf.get("rope_parameters"))
    known = {*FIELDS.values(), *_CHANNELS, _FULL, *_ONLY, *_INERT, "rope_parameters"}
    known |= {"dtype", "torch_dtype"}
    for name, value in hf.items():
        if name not in known and not name.startswith("_") and value is not None:
            raise ConfigError(
                f"{name} = {value!r} is not known to the tower; if it changes nothing that the "
                f"model computes, delete it from config.json"
            )
    full = required(hf, _FULL)
    if not isinstance(full, list | tuple) or not all(is_int(layer) for layer in full):
        raise ConfigError(f"{_FULL} must be a list of blocks, not {full!r}")
    values = {ours: required(hf, theirs) for ours, theirs in FIELDS.items()}
    return VisionConfig(**values, full_layers=tuple(sorted(full)))


def _check_rope(rope):
    expected = {"rope_theta": ROPE_THETA, "rope_type": "axial"}
    wrong = {
        name: value
        for name, value in (rope or {}).items()
        if value is not None and value != expected.get(name)
    }
    if wrong:
        raise ConfigError(f"rope_parameters with {wrong} are not implemented, only {expected}")


def hf_fields(config) -> dict[str, Any]:
    """Returns the `config.json` fields that a DecoderConfig with a tower adds to a text model's.

    The number of colours is written in both spellings; the rest in the hub's, which transformers 4
    and 5 read.
    """
    tower = {theirs: getattr(config.vision, ours) for ours, theirs in FIELDS.items()}
    tower |= {name: config.vision.in_channels for name in _CHANNELS}
    tower |= {
        _FULL: list(config.vision.full_layers),
        "hidden_act": "silu",
        "spatial_patch_size": config.vision.patch_size,
        "tokens_per_second": 2,
        "model_type": MODEL_TYPE,
    }
    return {
        **{theirs: getattr(config, ours) for ours, theirs in TOKENS.items()},
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section)},
        "vision_config": dict(sorted(tower.items())),
    }


def with_dtype(hf: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a `config.json` whose nested parts declare `dtype` if they declare a type."""
    parts = {}
    for name in {"text_config", "vision_config"} & hf.keys():
        own = hf[name] or {}
        parts[name] = own | {key: dtype for key in {"dtype", "torch_dtype"} & own.keys()}
    return hf | parts


def check_vision(config) -> None:
    """Checks a DecoderConfig's vision fields against the others.

    Raises:
      ConfigError: a tower in a text model or none in a Qwen2.5-VL, or numbers that do not fit.
    """
    names = ("mrope_section", "vision", *TOKENS)
    if config.model_type != MODEL_TYPE:
        named = [name for name in names if getattr(config, name) not in (None, ())]
        if named:
            raise ConfigError(
                f"{', '.join(named)}: a {config.model_type} has no vision; use model_type "
                f"{MODEL_TYPE!r}, or leave them out"
            )
        return
    if not isinstance(config.vision, VisionConfig):
        raise ConfigError(f"vision must be a VisionConfig, not {config.vision!r}")
    if config.vision.out_dim != config.embed_dim:
        raise ConfigError(
            f"vision_config: out_dim (out_hidden_size) {config.vision.out_dim} must be the "
            f"decoder's embed_dim (hidden_size) {config.embed_dim}"
        )
    if config.num_heads * config.head_dim != config.embed_dim:
        raise ConfigError(
            f"head_dim {config.head_dim} times num_heads {config.num_heads} must be embed_dim "
            f"(hidden_size) {config.embed_dim} in a {MODEL_TYPE}"
        )
    sections = config.mrope_section
    if (
        not isinstance(sections, tuple)
        or len(sections) != 3
        or not all(is_int(size) and size > 0 for size in sections)
        or 2 * sum(sections) != config.head_dim
    ):
        raise ConfigError(
            f"mrope_section must be three positive numbers, of time, rows and columns, whose sum "
            f"is half of head_dim {config.head_dim}, not {sections!r}"
        )
    tokens = {name: getattr(config, name) for name in TOKENS}
    for name, token in tokens.items():
        if not (is_int(token) and 0 <= token < config.vocab_size):
            raise ConfigError(
                f"{name} must be a token of the vocabulary of {config.vocab_size}, not {token!r}"
            )
    if len(set(tokens.values())) < len(tokens):
        raise ConfigError(f"{tokens} must all differ")


def _both(ours, theirs):
    return ours if ours == theirs else f"{ours} ({theirs})"
