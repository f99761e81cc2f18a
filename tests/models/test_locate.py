"""Sizes of public models without a network, and what is said where there are none."""

import importlib.util
import json

import pytest

from luspo_jax.models.decoder_config import decoder_config
from luspo_jax.models.decoder_weights import num_params
from luspo_jax.models.locate import (
    ARCHITECTURES,
    architecture,
    model_folder,
    shipped_architectures,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


# Bytes of the bfloat16 tensors, or millions of parameters where the model card has no more.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("Qwen/Qwen2.5-7B", 7615.6),
        ("Qwen/Qwen2.5-7B-Instruct", 7615.6),
        ("Qwen/Qwen3-0.6B", 596.0),
        ("Qwen/Qwen3-1.7B", 3441.149952 / 2),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134.515008),
        ("meta-llama/Llama-3.2-1B-Instruct", 1235.8144),
    ],
)
def test_dense_models_have_the_parameters_that_are_known_of_them(name, millions):
    config = decoder_config(architecture(f"hub:{name}"))
    assert num_params(config) / 1e6 == pytest.approx(millions, abs=0.05)


def test_all_that_is_shipped_can_be_read_and_its_revision_does_not_matter():
    assert len(shipped_architectures()) >= 4
    for name in shipped_architectures():
        values = architecture(f"hub:{name}")
        assert decoder_config(values).model_type == values["model_type"]
        assert values.get("use_sliding_window", False) is False  # Llama has no such field
        assert architecture(f"hub:{name}@main") == values


def test_base_and_instruct_differ_in_what_the_readme_says():
    base, instruct = (architecture(f"hub:Qwen/Qwen2.5-7B{x}") for x in ("", "-Instruct"))
    changed = {name: base[name] for name in base if base[name] != instruct[name]}
    assert changed == {"eos_token_id": 151643, "max_position_embeddings": 131072}


@pytest.mark.parametrize(
    ("size", "num_bytes", "parameters"),
    [("1.5B", 679, 1_777_088_000), ("7B", 680, 7_615_616_512)],
)
def test_distilled_models_are_the_files_of_the_hub(size, num_bytes, parameters):
    """The hub lists the sizes of its files; ours have the same text and indentation."""
    file = ARCHITECTURES / f"deepseek-ai--DeepSeek-R1-Distill-Qwen-{size}.json"
    assert file.stat().st_size == num_bytes
    values = architecture(f"hub:deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}")
    config = decoder_config(values)
    assert num_params(config) == parameters
    assert config.rope_theta == 10_000.0
    assert not config.tie_embeddings
    assert config.qkv_bias
    assert config.eos_token_ids == (151_643,)


def test_distilled_models_have_the_fields_of_their_larger_sibling(shared_data):
    name = "DeepSeek-R1-Distill-Qwen-32B.config.json"
    sibling = json.loads((shared_data / "qwen" / "configs" / name).read_text())
    for size in ("1.5B", "7B"):
        values = architecture(f"hub:deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}")
        assert values.keys() - sibling.keys() == {"use_mrope"}
        assert sibling.keys() <= values.keys()
        alike = {name for name in sibling if sibling[name] == values[name]}
        assert {"bos_token_id", "eos_token_id", "tie_word_embeddings", "model_type"} <= alike


def test_mixture_of_experts_is_read_as_it_is():
    values = architecture("hub:Qwen/Qwen3-30B-A3B")
    assert (values["num_experts"], values["num_experts_per_tok"]) == (128, 8)
    later = architecture("hub:Qwen/Qwen3-30B-A3B-Instruct-2507")
    assert {k for k in later if later[k] != values[k]} == {"max_position_embeddings"}


def test_copies_are_those_of_the_shared_files(shared_data):
    for name in ("Qwen2.5-7B-Instruct", "Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-30B-A3B"):
        original = shared_data / "qwen" / "configs" / f"{name}.config.json"
        assert architecture(f"hub:Qwen/{name}") == json.loads(original.read_text())


def test_embedded_models_and_folders_give_their_own_file(tmp_path):
    name = "embedded:label_sums"
    assert architecture(name) == json.loads((model_folder(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert architecture(str(tmp_path)) == {"model_type": "qwen3"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hub:Qwen/Qwen9-1T", "there are those of: .*Qwen/Qwen2.5-7B, .*meta-llama/Llama"),
        ("hub:Qwen--Qwen3-0.6B", "Qwen--Qwen3-0.6B are not in this package"),
        ("hub:somebody/Qwen3-0.6B", "somebody/Qwen3-0.6B are not in this package"),
        ("embedded:qwen", "no embedded model"),
        ("/no/such/folder", "no model folder at /no/such/folder"),
    ],
)
def test_what_is_not_there_is_named(path, message):
    with pytest.raises(FileNotFoundError, match=message):
        architecture(path)


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        architecture(str(tmp_path))
    for text, message in (("{", "is not JSON"), ("[]", "not a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            architecture(str(tmp_path))


def test_they_are_installed_with_the_package(monkeypatch):
    setuptools = pytest.importorskip("setuptools", reason="environments of Python 3.12 have none")

    from luspo_jax.models import locate

    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    root = locate.ARCHITECTURES.parents[2]
    spec = importlib.util.spec_from_file_location("setup_file", root / "setup.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    patterns = given["package_data"]["luspo_jax.models"]
    found = {file for pattern in patterns for file in locate.ARCHITECTURES.parent.glob(pattern)}
    assert set(locate.ARCHITECTURES.glob("*")) <= found


def test_a_prompt_needs_no_weights(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, **how: asked.append((repo, how["allow_patterns"])) or str(tmp_path),
    )
    for weights in (True, False):
        assert model_folder("hub:o/n", weights=weights) == tmp_path
    (_, everything), (_, rest) = asked
    assert set(everything) - set(rest) == {"*.safetensors"}
