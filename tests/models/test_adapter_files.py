"""Adapters in PEFT's format: what is written is read, and what does not belong is named."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from luspo_jax.models import adapter_files, decoder, decoder_weights, low_rank
from luspo_jax.models.decoder_config import read_config
from luspo_jax.models.forward import Forward
from luspo_jax.models.safetensors_folder import WeightsError
from tests.models import expert_cases
from tests.models.test_low_rank import ADAPTER, MODEL, _made

PICTURES = pathlib.Path(__file__).parent / "vision_goldens" / "untied"


def _model(kind):
    if kind == "dense":
        return MODEL, ADAPTER
    if kind == "mixture":
        model = expert_cases.config(4, 2, num_layers=3, dense_layers=(1,))
        return model, dataclasses.replace(ADAPTER, experts=True)
    return read_config(PICTURES), dataclasses.replace(ADAPTER, vision=True)


@pytest.mark.parametrize("kind", ["dense", "mixture", "pictures"])
def test_it_reads_what_it_writes(kind, tmp_path):
    model, adapter = _model(kind)
    base, made = _made(model, adapter)
    adapter_files.write(tmp_path / "adapter", made, model, adapter, base="some/model")
    read = adapter_files.read(tmp_path / "adapter", model, adapter)
    assert jax.tree.structure(read) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, read, made)
    # W + s · B · A of the stored tensors is the merged export's.
    stored = load_file(tmp_path / "adapter" / adapter_files.WEIGHTS)
    whole = low_rank.composed(base, made, adapter.scale)
    decoder_weights.export(tmp_path / "merged", whole, model)
    decoder_weights.export(tmp_path / "base", base, model)
    merged, plain = (
        load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base")
    )
    changed = 0
    for name, weight in plain.items():
        module = name.removesuffix(".weight")
        if kind == "pictures":
            module = module.replace("model.layers", "model.language_model.layers")
            module = module.replace("visual.", "model.visual.")
        prefix = f"base_model.model.{module}"
        if f"{prefix}.lora_A.weight" in stored:
            a, b = (stored[f"{prefix}.lora_{part}.weight"] for part in "AB")
            weight = weight + adapter.scale * b @ a
            changed += 2
        np.testing.assert_allclose(merged[name], weight, rtol=1e-5, atol=1e-6)
    assert changed == len(stored)


def test_an_adapter_of_another_base_is_named_at_once(tmp_path):
    _, made = _made()
    adapter_files.write(tmp_path / "adapter", made, MODEL, ADAPTER)
    file = tmp_path / "adapter" / adapter_files.WEIGHTS
    tensors = load_file(file)
    first = next(iter(tensors))
    tensors["base_model.model.model.layers.0.self_attn.odd.lora_A.weight"] = tensors.pop(first)
    second = next(iter(tensors))
    tensors[second] = tensors[second][:, 1:].copy()
    save_file(tensors, file)
    with pytest.raises(WeightsError) as error:
        adapter_files.read(tmp_path / "adapter", MODEL, ADAPTER)
    for name in (first, second, "self_attn.odd"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "rank 4"),
        ({"lora_alpha": 6}, "alpha 6"),
        ({"use_rslora": True}, "use_rslora True"),
        ({"use_dora": True}, "use_dora=True is not implemented"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_another_kind_of_adapter_is_refused(tmp_path, changes, message):
    _, made = _made()
    adapter_files.write(tmp_path / "adapter", made, MODEL, ADAPTER)
    file = tmp_path / "adapter" / adapter_files.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(WeightsError, match=message):
        adapter_files.read(tmp_path / "adapter", MODEL, ADAPTER)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"adapter_config\.json"):
        adapter_files.read(tmp_path, MODEL, ADAPTER)


def test_principal_parts_are_stored_beside_the_models_own_weights(tmp_path):
    adapter = dataclasses.replace(ADAPTER, init="pissa")
    params = decoder.init_params(jax.random.key(0), MODEL)
    base, begun = low_rank.begun(
        jax.random.key(1), dict(params), decoder.param_axes(MODEL), adapter, None
    )
    rng = np.random.default_rng(0)
    made = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), begun)
    twice, told = low_rank.difference(made, begun, adapter)
    adapter_files.write(tmp_path / "adapter", twice, MODEL, told)
    read = adapter_files.read(tmp_path / "adapter", MODEL, told)
    found = low_rank.merged_tree(low_rank.composed(params, read, told.scale))
    expected = low_rank.merged_tree(
        decoder.whole_params(base, made, Forward(MODEL, adapter=adapter))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
