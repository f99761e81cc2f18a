"""config.json: hub spellings read, everything else refused by name."""

import dataclasses
import json

import pytest

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models.decoder_config import (
    DecoderConfig,
    decoder_config,
    hf_config,
    read_config,
)
from luspo_jax.models.rope import RopeScaling

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "sliding_window": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 50,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 16,
    "rope_scaling": None,
}


def test_qwen2_and_qwen3_switches():
    qwen2, qwen3 = decoder_config(QWEN2), decoder_config(QWEN3)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.out_bias, qwen2.head_dim) == (
        True,
        False,
        False,
        12,
    )
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.out_bias, qwen3.head_dim) == (
        False,
        True,
        False,
        16,
    )
    biased = decoder_config(QWEN3 | {"attention_bias": True})
    assert (biased.qkv_bias, biased.out_bias) == (True, True)
    assert qwen2.dtype == "bfloat16"
    assert hash(qwen2) == hash(decoder_config(dict(QWEN2)))


def test_scaled_rotary_positions_are_read_in_both_spellings_and_written_back():
    llama = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}  # fmt: skip
    old = QWEN3 | {"rope_scaling": {"rope_type": "llama3", **llama}}
    new = {k: v for k, v in QWEN3.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_type": "llama3", "rope_theta": QWEN3["rope_theta"], **llama}
    config = decoder_config(old)
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 8192)
    assert decoder_config(new) == config
    assert decoder_config(hf_config(config)) == config
    # As Qwen2.5 folders say it; without a length of its own, that of the weights is meant.
    yarn = decoder_config(QWEN3 | {"rope_scaling": {"type": "yarn", "factor": 4}})
    assert yarn.rope_scaling == RopeScaling("yarn", 4, QWEN3["max_position_embeddings"])
    assert decoder_config(hf_config(yarn)) == yarn
    with pytest.raises(ConfigError, match="contradict"):
        decoder_config(old | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}})


def test_llama_is_the_decoder_without_norms_of_queries_and_with_biases_where_it_says_so():
    llama = {k: v for k, v in QWEN3.items() if k != "head_dim"}
    llama |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False,
              "pretraining_tp": 1, "rope_interleaved": False, "is_llama_config": True}  # fmt: skip
    config = decoder_config(llama)
    assert (config.qk_norm, config.qkv_bias, config.out_bias) == (False, False, False)
    assert config.head_dim == config.embed_dim // config.num_heads
    biased = decoder_config(llama | {"attention_bias": True})
    assert (biased.qkv_bias, biased.out_bias) == (True, True)
    assert decoder_config(hf_config(biased)) == biased
    for field, value in (("mlp_bias", True), ("rope_interleaved", True), ("pretraining_tp", 2)):
        with pytest.raises(ConfigError, match=field):
            decoder_config(llama | {field: value})


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters", "rope_scaling", "both"])
def test_rope_theta_is_read_wherever_it_stands(spelling):
    hf = {key: value for key, value in QWEN3.items() if key not in ("rope_theta", "rope_scaling")}
    nested = {"rope_type": "default", "rope_theta": 4321.0}
    if spelling in ("rope_theta", "both"):
        hf["rope_theta"] = 4321.0
    if spelling in ("rope_parameters", "both"):
        hf["rope_parameters"] = nested
    if spelling == "rope_scaling":
        hf["rope_scaling"] = nested
    assert decoder_config(hf).rope_theta == 4321.0


def test_dtype_is_read_in_both_spellings():
    hf = {key: value for key, value in QWEN3.items() if key != "torch_dtype"}
    assert decoder_config(hf).dtype is None
    assert decoder_config(hf | {"dtype": "float16"}).dtype == "float16"
    assert decoder_config(hf | {"torch_dtype": "torch.float32"}).dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"type": "yarn"}}, "of type 'yarn' lacks factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True}}, "finetuned"),
        ({"rope_scaling": {"type": "yarn", "factor": -4.0}}, "factor must be a positive number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "mrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "dynamic"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "contradict"),
        ({"dtype": "float32"}, "contradict"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_experts": 8}, "num_experts = 8 .*the one with experts is qwen3_moe"),
        ({"num_local_experts": 8}, "num_local_experts = 8 .*the one with experts is qwen3_moe"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"moe_intermediate_size": 8}, "moe_intermediate_size"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"decoder_sparse_step": 1}, "decoder_sparse_step"),
        ({"mlp_only_layers": []}, "mlp_only_layers"),
        ({"router_aux_loss_coef": 0.0}, "router_aux_loss_coef"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"vocab_size": "50"}, "vocab_size"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"tie_word_embeddings": "no"}, "tie_embeddings"),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=named):
        decoder_config(QWEN3 | changes)


@pytest.mark.parametrize(
    "name",
    ["rope_theta", "rms_norm_eps", "tie_word_embeddings", "num_key_value_heads", "head_dim"],
)
def test_no_default_stands_in_for_a_missing_field(name):
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        decoder_config({key: value for key, value in QWEN3.items() if key != name})


def test_head_dim_is_derived_for_qwen2_only_if_it_divides():
    assert decoder_config(QWEN2 | {"head_dim": 20}).head_dim == 20
    with pytest.raises(ConfigError, match="add head_dim"):
        decoder_config(QWEN2 | {"num_attention_heads": 5, "num_key_value_heads": 5})


@pytest.mark.parametrize("changes", [{"num_attention_heads": 0}, {"attention_bias": False}])
def test_qwen2_is_checked_too(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        decoder_config(QWEN2 | changes)


@pytest.mark.parametrize(
    "hf",
    [
        QWEN2,
        QWEN3,
        QWEN3 | {"attention_bias": True},
    ],
)
def test_written_config_reads_back(hf):
    config = decoder_config(hf)
    assert decoder_config(hf_config(config)) == config


def _folder(path, config, generation=None):
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_stop_tokens_come_from_the_generation_config(tmp_path):
    assert read_config(_folder(tmp_path, QWEN2)).eos_token_ids == (2,)
    _folder(tmp_path, QWEN2, {"eos_token_id": [9, 2, 9], "pad_token_id": 4})
    config = read_config(tmp_path)
    assert (config.eos_token_ids, config.pad_token_id) == ((2, 9), 4)
    _folder(tmp_path, QWEN2, {"temperature": 0.7})
    assert read_config(tmp_path).eos_token_ids == (2,)


def test_a_stop_token_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="eos_token_ids"):
        read_config(_folder(tmp_path, QWEN2, {"eos_token_id": 50}))


def test_unreadable_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qw')
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: use_sliding_window"):
        read_config(_folder(tmp_path, QWEN2 | {"use_sliding_window": True}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen2.5-7B-Instruct", (28, 3584, 128, True, False, 1e6, False)),
        ("DeepSeek-R1-Distill-Qwen-32B", (64, 5120, 128, True, False, 1e6, False)),
        ("Qwen3-0.6B", (28, 1024, 128, False, True, 1e6, True)),
        ("Qwen3-8B", (36, 4096, 128, False, True, 1e6, False)),
    ],
)
def test_hub_configs(shared_data, name, expected):
    hf = json.loads((shared_data / "qwen" / "configs" / f"{name}.config.json").read_text())
    c = decoder_config(hf)
    got = (c.num_layers, c.embed_dim, c.head_dim, c.qkv_bias, c.qk_norm, c.rope_theta)
    assert (*got, c.tie_embeddings) == expected
    assert c.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["Qwen3-VL-30B-A3B-Instruct", "Qwen3-VL-8B-Instruct"])
def test_hub_configs_of_other_models_are_refused(shared_data, name):
    hf = json.loads((shared_data / "qwen" / "configs" / f"{name}.config.json").read_text())
    with pytest.raises(ConfigError, match="model_type"):
        decoder_config(hf)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        decoder_config(QWEN2).num_layers = 3
    assert isinstance(decoder_config(QWEN2), DecoderConfig)
