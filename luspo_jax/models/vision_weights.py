"""The vision tower's tensors in a Hugging Face folder: names and places in the parameters.

`decoder_weights` reads and writes them by this table, like the decoder's own. Queries, keys and
values are one tensor there and one parameter here; a patch's kernel is a convolution's, with the
outputs first.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from luspo_jax.models import vision
from luspo_jax.models.vision_config import VisionConfig

_TOP = {
    "visual.patch_embed.proj.weight": ("patch", "kernel"),
    "visual.merger.ln_q.weight": ("merger", "norm", "scale"),
    "visual.merger.mlp.0.weight": ("merger", "hidden", "kernel"),
    "visual.merger.mlp.0.bias": ("merger", "hidden", "bias"),
    "visual.merger.mlp.2.weight": ("merger", "out", "kernel"),
    "visual.merger.mlp.2.bias": ("merger", "out", "bias"),
}
_BLOCK = {
    "norm1.weight": ("attention_norm", "scale"),
    "attn.qkv.weight": ("attention", "qkv", "kernel"),
    "attn.qkv.bias": ("attention", "qkv", "bias"),
    "attn.proj.weight": ("attention", "out", "kernel"),
    "attn.proj.bias": ("attention", "out", "bias"),
    "norm2.weight": ("mlp_norm", "scale"),
    "mlp.gate_proj.weight": ("mlp", "gate", "kernel"),
    "mlp.gate_proj.bias": ("mlp", "gate", "bias"),
    "mlp.up_proj.weight": ("mlp", "up", "kernel"),
    "mlp.up_proj.bias": ("mlp", "up", "bias"),
    "mlp.down_proj.weight": ("mlp", "down", "kernel"),
    "mlp.down_proj.bias": ("mlp", "down", "bias"),
}
COPIED_FILES = (  # record of how images were prepared
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
# Trainers that save their modules' own names write these instead of the hub's.
_OWN_NAMES = re.compile(r"^model\.(?:language_model\.(.*)|(visual\..*))$")


def weight_table(config: VisionConfig | None, make: Callable[..., Any]) -> dict[str, Any]:
    """Returns a tower's tensors: hub name → make(path, place, shape, hf_shape, transposed, merged).

    The arguments are the fields of `decoder_weights.Entry`; `place` is the block, (i,), or ()
    outside the blocks. Without a tower the table is empty.
    """
    if config is None:
        return {}
    tree = vision.abstract_params(config)
    table = {}
    for name, path in _TOP.items():
        shape = _leaf(tree, path).shape
        table[name] = make(("vision", *path), (), shape, *_stored(path, shape))
    for suffix, path in _BLOCK.items():
        path = ("blocks", *path)
        shape = _leaf(tree, path).shape[1:]
        for block in range(config.depth):
            name = f"visual.blocks.{block}.{suffix}"
            table[name] = make(("vision", *path), (block,), shape, *_stored(path, shape))
    return table


def hub_name(name: str) -> str:
    """Returns a tensor's hub name.

    That is `model.layers…` for `model.language_model.layers…`, and `visual…` for `model.visual…`.
    """
    match = _OWN_NAMES.match(name)
    return name if match is None else match[2] or f"model.{match[1]}"


def by_hub_names(tensors: dict[str, Any], config: VisionConfig | None) -> dict[str, Any]:
    """Maps the tensors of a folder by hub names; a text model's stay unchanged."""
    if config is None:
        return tensors
    return {hub_name(name): tensor for name, tensor in tensors.items()}


def _stored(path, shape):
    """Returns (hf_shape, transposed, merged): how a parameter of `shape` is stored as a tensor."""
    rank = len(shape)
    if path[-1] != "kernel":
        merged = ((0, rank),)
    elif path == ("patch", "kernel"):
        merged = ((rank - 1, rank), *((axis, axis + 1) for axis in range(rank - 1)))
    else:
        inputs = 2 if path[-2] == "out" and "attention" in path else 1  # contracted axes
        merged = ((inputs, rank), (0, inputs))
    hf_shape = tuple(math.prod(shape[first:last]) for first, last in merged)
    return hf_shape, path[-1] == "kernel", merged


def _leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree
