"""The fields of a mixture of experts: read in both spellings, other mixtures refused by name."""

import dataclasses
import json

import pytest

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models.decoder_config import Stack, decoder_config, hf_config
from tests.models.test_decoder_config import QWEN2, QWEN3

MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 5,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def test_experts_are_read():
    c = decoder_config(MOE)
    assert (c.num_experts, c.experts_per_token, c.expert_dim, c.norm_topk) == (6, 2, 24, True)
    assert (c.qk_norm, c.qkv_bias, c.mlp_dim, c.dense_layers) == (True, False, 80, ())
    assert c.stacks == (Stack("layers", 0, 5, True),)
    assert c.num_expert_layers == 5
    assert decoder_config(MOE | {"norm_topk_prob": False}).norm_topk is False
    assert decoder_config(MOE | {"mlp_only_layers": None}) == c


@pytest.mark.parametrize(
    ("step", "listed", "dense"),
    [
        (1, [], ()),
        (2, [], (0, 2, 4)),
        (3, [], (0, 1, 3, 4)),
        (1, [0, 4], (0, 4)),
        (1, [3, 1, 3], (1, 3)),
        (2, [3, 0], (0, 2, 3, 4)),
    ],
)
def test_which_layers_are_dense(step, listed, dense):
    config = decoder_config(MOE | {"decoder_sparse_step": step, "mlp_only_layers": listed})
    assert config.dense_layers == dense
    experts = [stack.experts for stack in config.stacks for _ in range(stack.count)]
    assert experts == [layer not in dense for layer in range(5)]
    assert [stack.start for stack in config.stacks] == [
        layer for layer in range(5) if layer == 0 or experts[layer] != experts[layer - 1]
    ]
    assert config.num_expert_layers == 5 - len(dense)


def test_names_of_stacks_are_those_of_their_first_layers():
    config = decoder_config(MOE | {"mlp_only_layers": [0, 3]})
    assert config.stacks == (
        Stack("layers_000", 0, 1, False),
        Stack("layers_001", 1, 2, True),
        Stack("layers_003", 3, 1, False),
        Stack("layers_004", 4, 1, True),
    )
    assert decoder_config(QWEN3).stacks == (Stack("layers", 0, 2, False),)


def test_a_file_of_transformers_5_is_read():
    """As `Qwen3MoeForCausalLM.save_pretrained` of 5.24 writes it: another name, no old base."""
    hf = {k: v for k, v in MOE.items() if k not in ("num_experts", "rope_theta", "rope_scaling")}
    hf |= {
        "num_local_experts": 6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_window": None,
        "pad_token_id": None,
        "dtype": "bfloat16",
        "torch_dtype": None,
        "transformers_version": "5.24.0",
    }
    assert decoder_config(hf) == decoder_config(MOE)
    assert decoder_config(hf | {"num_experts": 6}) == decoder_config(MOE)


def test_transformers_reads_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    hf = MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1], "attention_bias": True}
    config = decoder_config(hf)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read).__name__ == "Qwen3MoeConfig"
    expected = {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "attention_bias": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 1, 2, 4],
    }
    assert {name: getattr(read, name) for name in expected} == expected
    assert decoder_config(read.to_dict()) == config  # and what it writes back
    read.save_pretrained(tmp_path / "again")
    assert decoder_config(json.loads((tmp_path / "again" / "config.json").read_text())) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": None}, "num_experts is missing"),
        ({"num_experts": 0}, "num_experts must be a positive integer, not 0"),
        ({"num_experts": 6.0}, "num_experts must be a positive integer, not 6.0"),
        ({"num_experts": True}, "num_experts must be a positive integer, not True"),
        ({"num_local_experts": 8}, "'num_experts': 6, 'num_local_experts': 8} contradict"),
        ({"num_experts_per_tok": 7}, r"experts_per_token \(num_experts_per_tok\) 7 must be <= "),
        ({"num_experts_per_tok": 0}, r"\(num_experts_per_tok\) must be a positive integer, not 0"),
        ({"num_experts_per_tok": "2"}, "num_experts_per_tok"),
        ({"moe_intermediate_size": 0}, r"\(moe_intermediate_size\) must be a positive integer"),
        ({"moe_intermediate_size": -8}, "moe_intermediate_size"),
        ({"norm_topk_prob": 1}, r"norm_topk \(norm_topk_prob\) must be true or false, not 1"),
        ({"norm_topk_prob": None}, "norm_topk_prob is missing"),
        ({"decoder_sparse_step": None}, "decoder_sparse_step is missing"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer, not 0"),
        ({"decoder_sparse_step": 1.0}, "decoder_sparse_step must be a positive integer, not 1.0"),
        ({"decoder_sparse_step": True}, "decoder_sparse_step"),
        ({"decoder_sparse_step": 6}, "none of the 5 layers has experts"),
        ({"mlp_only_layers": [0, 1, 2, 3, 4]}, "none of the 5 layers has experts"),
        ({"mlp_only_layers": [5]}, r"mlp_only_layers must list some of .* 0 to 4, not \[5\]"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers"),
        ({"mlp_only_layers": [1.0]}, "mlp_only_layers"),
        ({"mlp_only_layers": 0}, "mlp_only_layers"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers"),
        ({"num_hidden_layers": "5"}, "num_hidden_layers"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
        ({"n_shared_experts": 1}, "n_shared_experts = 1 is not implemented, only 0"),
        ({"num_shared_experts": 1}, "num_shared_experts"),
        ({"n_group": 4}, "n_group = 4 is not implemented, only 1"),
        ({"topk_group": 2}, "topk_group"),
        ({"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5"),
        ({"use_routing_bias": True}, "use_routing_bias"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace"),
        ({"e_score_correction": True}, "e_score_correction"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "must be a Qwen3MoeForCausalLM"),
    ],
)
def test_mixtures_that_are_not_implemented_are_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=named):
        decoder_config(MOE | changes)


@pytest.mark.parametrize(
    ("model_type", "field"),
    [
        ("qwen2_moe", "num_experts"),
        ("qwen3_next", "num_experts"),
        ("qwen3_5_moe", "num_experts"),
        ("mixtral", "num_local_experts"),
        ("deepseek_v3", "n_routed_experts"),
        ("olmoe", "num_experts"),
        ("gpt_oss", "num_local_experts"),
        ("qwen3_vl_moe", "text_config"),
    ],
)
def test_other_families_of_mixtures_are_told_which_is_implemented(model_type, field):
    with pytest.raises(ConfigError, match=f"model_type '{model_type}' is not .*only qwen3_moe"):
        decoder_config({"model_type": model_type, field: 8})
    with pytest.raises(ConfigError, match="'gemma' is not implemented") as error:
        decoder_config({"model_type": "gemma"})
    assert "experts" not in str(error.value)


@pytest.mark.parametrize(
    ("hf", "changes", "named"),
    [
        (QWEN3, {"num_experts": 4}, "num_experts: a qwen3 has no experts; use model_type 'qwen3_m"),
        (QWEN2, {"dense_layers": (0,)}, "dense_layers: a qwen2 has no experts"),
        (MOE, {"dense_layers": (2, 1)}, "in order, as a tuple, not"),
        (MOE, {"dense_layers": [1]}, "as a tuple, not"),
        (MOE, {"dense_layers": (5,)}, "layers 0 to 4"),
        (MOE, {"num_experts": 0}, "num_experts must be a positive integer, not 0"),
        (MOE, {"num_layers": 2, "dense_layers": (0, 1)}, "none of the 2 layers has experts"),
    ],
)
def test_configurations_made_by_hand_are_checked_too(hf, changes, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(decoder_config(hf), **changes)


@pytest.mark.parametrize(
    "changes", [{}, {"decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": False}]
)
def test_written_config_reads_back(changes):
    config = decoder_config(MOE | changes)
    assert decoder_config(hf_config(config)) == config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen3-30B-A3B", (48, 2048, 128, 8, 768)),
        ("Qwen3-235B-A22B", (94, 4096, 128, 8, 1536)),
    ],
)
def test_hub_configs_of_mixtures(shared_data, name, expected):
    hf = json.loads((shared_data / "qwen" / "configs" / f"{name}.config.json").read_text())
    c = decoder_config(hf)
    got = (c.num_layers, c.embed_dim, c.num_experts, c.experts_per_token, c.expert_dim)
    assert got == expected
    assert (c.norm_topk, c.dense_layers, c.num_expert_layers) == (True, (), c.num_layers)
    assert decoder_config(hf_config(c)) == c
