"""Live parity of adapters with `peft` on torch: logits, gradients of A and B, and a real step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="live parity needs torch (pip install '.[parity]')")
peft = pytest.importorskip("peft", reason="live parity of adapters needs peft")

import transformers  # noqa: E402

from luspo_jax.learner import optimizer  # noqa: E402
from luspo_jax.models import (  # noqa: E402
    adapter_files,
    decoder,
    decoder_weights,
    low_rank,
    vision,
)
from luspo_jax.models.forward import Forward  # noqa: E402
from tests.models.make_vision_goldens import CASES, inputs_of, rows_of  # noqa: E402
from tests.models.test_adapter_files import PICTURES, _model  # noqa: E402
from tests.models.test_low_rank import _made  # noqa: E402
from tests.models.test_vision import arrays_of, batch_of  # noqa: E402

# What peft reads of transformers, which renames it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

RATE = 1e-2
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def _ours(params, how, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    at = jnp.stack([positions] * 3, axis=-1) if how.model.vision else positions
    hidden = decoder.hidden_states(params, tokens, at, jnp.ones_like(tokens), how=how)
    return jnp.einsum("btd,vd->btv", hidden, decoder.head_kernel(params))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rslora"), [("dense", False), ("dense", True), ("mixture", False), ("pictures", False)]
)
def test_logits_gradients_and_a_step_are_those_of_peft(kind, rslora, tmp_path):
    model, adapter = _model(kind)
    adapter = dataclasses.replace(adapter, experts=False, rslora=rslora)
    if kind == "mixture":  # of any MLP's name, peft adapts what transformers 5 holds of all experts
        adapter = dataclasses.replace(adapter, targets=ATTENTION)
    base, made = _made(model, adapter)
    how = Forward(model, adapter=adapter)
    source = PICTURES if kind == "pictures" else None
    decoder_weights.export(tmp_path / "base", base, model, source=source)
    adapter_files.write(tmp_path / "adapter", made, model, adapter)

    kinds = transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM
    plain = kinds[kind != "pictures"].from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)
    named = {
        name.replace(".default", ""): p for name, p in theirs.named_parameters() if "lora_" in name
    }
    table = adapter_files.tensor_table(model, adapter)
    assert named.keys() == table.keys()
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 19, size=(2, 7))
    weights = rng.normal(size=(2, 7, model.vocab_size)).astype(np.float32)

    def ours(made):
        out = _ours(decoder.whole_params(base, made, how), how, jnp.asarray(tokens, jnp.int32))
        return jnp.sum(out * weights), out

    (_, found), grads = jax.value_and_grad(ours, has_aux=True)(made)
    out = theirs(input_ids=torch.tensor(tokens)).logits
    (out * torch.tensor(weights)).sum().backward()
    size = out.detach().abs().max().item()
    assert np.abs(found - out.detach().numpy()).max() <= 2e-5 * size
    compared = 0
    for name, (path, place, shape) in table.items():
        if path[0] == "vision":  # text shows it nothing
            continue
        ours_of = np.asarray(low_rank.at(grads, path))[place].reshape(shape[::-1]).T
        expected = named[name].grad.numpy()
        worst = np.abs(ours_of - expected).max()
        assert worst <= 1e-4 * max(np.abs(expected).max(), 1e-3), name
        compared += 1
    assert compared

    adamw = optimizer.adamw(**ADAM)
    new, _ = optimizer.apply(adamw, made, grads, adamw.init(made), rate=jnp.float32(RATE))
    step = torch.optim.AdamW(
        [p for name, p in named.items() if "visual" not in name],
        lr=RATE, betas=(ADAM["b1"], ADAM["b2"]), eps=ADAM["eps"], weight_decay=ADAM["weight_decay"],
    )  # fmt: skip
    step.step()
    after = theirs(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    assert np.abs(ours(new)[1] - after).max() <= 5e-4 * np.abs(after).max()
    assert np.abs(after - out.detach().numpy()).max() > 1e-2 * size
    merged = theirs.merge_and_unload()
    again = merged(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    whole = low_rank.merged_tree(decoder.whole_params(base, new, how))
    one = _ours(whole, Forward(model), jnp.asarray(tokens, jnp.int32))
    assert np.abs(one - again).max() <= 5e-4 * np.abs(again).max()


@pytest.mark.slow
def test_an_adapter_that_peft_saves_is_read(tmp_path):
    model, adapter = _model("dense")
    base, _ = _made(model, adapter)
    decoder_weights.export(tmp_path / "base", base, model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.targets),
        task_type="CAUSAL_LM",
        init_lora_weights=False,  # B random too
    )
    theirs = peft.get_peft_model(plain, config)
    theirs.save_pretrained(tmp_path / "theirs")
    read = adapter_files.read(tmp_path / "theirs", model, adapter)
    tokens = np.random.default_rng(2).integers(1, 19, size=(2, 7))
    how = Forward(model, adapter=adapter)
    found = _ours(decoder.whole_params(base, read, how), how, jnp.asarray(tokens, jnp.int32))
    out = theirs(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    assert np.abs(found - out).max() <= 2e-5 * np.abs(out).max()


@pytest.mark.slow
def test_gradients_of_the_towers_adapter_are_those_of_peft(tmp_path):
    """Of every A and B that images reach, tower and merger, and of the decoder behind them."""
    model, adapter = _model("pictures")
    base, made = _made(model, adapter)
    how = Forward(model, adapter=adapter)
    decoder_weights.export(tmp_path / "base", base, model, source=PICTURES)
    adapter_files.write(tmp_path / "adapter", made, model, adapter)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)
    named = {
        name.replace(".default", ""): p for name, p in theirs.named_parameters() if "lora_" in name
    }
    rows = rows_of(CASES["mixed_batch"], plain.config, seed=3)
    batch = batch_of(rows, model)
    weights = np.random.default_rng(5).normal(size=(*batch.tokens_BT.shape, model.vocab_size))
    weights = np.where(batch.segments_BT[..., None] > 0, weights, 0).astype(np.float32)

    def ours(made):
        params = decoder.whole_params(base, made, how)
        units = vision.encode(params["vision"], *arrays_of(batch.patches), how=how)
        hidden_BTD = decoder.hidden_states(
            params,
            batch.tokens_BT,
            batch.positions_BT3,
            batch.segments_BT,
            how=how,
            images=(units.reshape(-1, model.embed_dim), batch.index_BT),
        )
        out = jnp.einsum("btd,vd->btv", hidden_BTD, decoder.head_kernel(params))
        return jnp.sum(out * weights), out

    (_, found), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(made)
    out = theirs(**inputs_of(rows, plain.config)).logits
    (out * torch.tensor(weights)).sum().backward()
    expected = out.detach().numpy()
    own = batch.segments_BT > 0
    assert np.abs(found - expected)[own].max() <= 2e-5 * np.abs(expected).max()
    seen = 0
    for name, (path, place, shape) in adapter_files.tensor_table(model, adapter).items():
        ours_of = np.asarray(low_rank.at(grads, path))[place].reshape(shape[::-1]).T
        of_peft = named[name].grad.numpy()
        size = np.abs(of_peft).max()
        assert size > 1e-3, name
        assert np.abs(ours_of - of_peft).max() <= 1e-4 * size, name
        seen += path[0] == "vision"
    # qkv, proj and an MLP of three in each block; the two of the merger.
    assert seen == 2 * (5 * model.vision.depth + 2)
