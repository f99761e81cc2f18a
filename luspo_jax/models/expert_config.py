"""Reads and checks the configuration fields of a mixture of experts.

Only Qwen3-MoE is implemented: a softmax over all experts of a layer, of which every token goes to
the most likely few; no expert is shared, and none drops a token.
"""

from collections.abc import Mapping
from typing import Any

from luspo_jax.hosts.values import ConfigError

MODEL_TYPE = "qwen3_moe"

# Our field → its name in config.json. All are required in a model with experts.
FIELDS = {
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_dim": "moe_intermediate_size",
    "norm_topk": "norm_topk_prob",
}

# Names in config.json that have a meaning only with experts.
KNOWN = {
    *FIELDS.values(),
    "num_local_experts",  # num_experts in transformers 5
    "decoder_sparse_step",
    "mlp_only_layers",
    "output_router_logits",  # for HF's own training, like its loss coefficient
    "router_aux_loss_coef",
}

# Fields of other mixtures of experts (Qwen2-MoE, DeepSeek, GLM …), with values that change nothing.
NEUTRAL = {
    "shared_expert_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0,
    "n_shared_experts": 0,
    "num_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "use_routing_bias": False,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}


def is_int(value: Any) -> bool:
    """Whether a JSON value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def required(hf: Mapping[str, Any], name: str) -> Any:
    """Returns a field of `config.json`. Raises ConfigError if it is absent or null."""
    if hf.get(name) is None:
        raise ConfigError(f"{name} is missing; add it to config.json")
    return hf[name]


def mixture_hint(hf: Mapping[str, Any]) -> str:
    """Returns a hint on the supported mixture, for a refused model type with experts."""
    if any("expert" in name for name in hf) or "moe" in str(hf.get("model_type")):
        return f"; of mixtures of experts only {MODEL_TYPE} (as Qwen3-30B-A3B) is implemented"
    return ""


def expert_fields(hf: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Returns the DecoderConfig fields of a model with experts, from a `config.json`.

    Raises:
      ConfigError: a missing field, or invalid `decoder_sparse_step` or `mlp_only_layers`.
    """
    spellings = ("num_experts", "num_local_experts")
    found = {name: hf[name] for name in spellings if hf.get(name) is not None}
    if len({repr(value) for value in found.values()}) > 1:
        raise ConfigError(f"{found} contradict each other; keep the right one")
    hf = {**hf, "num_experts": next(iter(found.values()), None)}
    values = {ours: required(hf, name) for ours, name in FIELDS.items()}
    return values | {"dense_layers": _dense_layers(hf, num_layers)}


def _dense_layers(hf, num_layers):
    """Returns layers without experts: `mlp_only_layers`, all but each `decoder_sparse_step`-th."""
    step, listed = required(hf, "decoder_sparse_step"), hf.get("mlp_only_layers")
    listed = [] if listed is None else listed
    if not is_int(step) or step < 1:
        raise ConfigError(f"decoder_sparse_step must be a positive integer, not {step!r}")
    if not isinstance(listed, list | tuple) or not all(
        is_int(layer) and 0 <= layer < num_layers for layer in listed
    ):
        raise ConfigError(
            f"mlp_only_layers must list some of the layers 0 to {num_layers - 1}, not {listed!r}"
        )
    return tuple(i for i in range(num_layers) if i in listed or (i + 1) % step)


def check_experts(config) -> None:
    """Checks a DecoderConfig's expert fields against the others.

    Raises:
      ConfigError: experts in a dense model or none in a mixture, or numbers that do not fit.
    """
    if config.model_type != MODEL_TYPE:
        named = [name for name in (*FIELDS, "dense_layers") if getattr(config, name)]
        if named:
            raise ConfigError(
                f"{', '.join(named)}: a {config.model_type} has no experts; use model_type "
                f"{MODEL_TYPE!r}, or leave them out"
            )
        return
    for name in ("num_experts", "experts_per_token", "expert_dim"):
        if getattr(config, name) < 1:
            both = name if FIELDS[name] == name else f"{name} ({FIELDS[name]})"
            raise ConfigError(f"{both} must be a positive integer, not {getattr(config, name)}")
    if config.experts_per_token > config.num_experts:
        raise ConfigError(
            f"experts_per_token (num_experts_per_tok) {config.experts_per_token} must be <= "
            f"num_experts {config.num_experts}"
        )
    dense = config.dense_layers
    if not isinstance(dense, tuple) or list(dense) != [
        layer for layer in range(config.num_layers) if layer in dense
    ]:
        raise ConfigError(
            f"dense_layers must be some of the layers 0 to {config.num_layers - 1}, in order, "
            f"as a tuple, not {dense}"
        )
    if len(dense) == config.num_layers:
        raise ConfigError(
            f"none of the {config.num_layers} layers has experts (decoder_sparse_step, "
            f"mlp_only_layers); a model without any is a qwen3"
        )
