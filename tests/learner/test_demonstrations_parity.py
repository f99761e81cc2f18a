"""Live parity of a supervised step with `transformers` (torch, float32): `labels` and backward."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="live parity needs torch (pip install '.[parity]')")

import transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from luspo_jax.learner import optimizer  # noqa: E402
from luspo_jax.learner.demonstrations import nll_objective, update  # noqa: E402
from luspo_jax.learner.logprobs import LogprobRule  # noqa: E402
from luspo_jax.learner.programs import StepPrograms  # noqa: E402
from luspo_jax.learner.rows import Planner  # noqa: E402
from luspo_jax.learner.state import UpdateRule, initial_state  # noqa: E402
from luspo_jax.models import decoder, decoder_weights  # noqa: E402
from luspo_jax.models.forward import Forward  # noqa: E402
from tests.learner.test_demonstrations import MODEL, PLAIN, _shown  # noqa: E402

assert PLAIN is optimizer.adamw(b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("pack_length", [0, 32])
def test_loss_and_gradient_are_those_of_transformers(pack_length, tmp_path):
    model = dataclasses.replace(MODEL, dtype="float32")
    params, shown = decoder.init_params(jax.random.key(0), model), _shown()
    decoder_weights.export(tmp_path / "model", params, model)
    rule = UpdateRule(
        LogprobRule(Forward(model), head_chunk_tokens=16), nll_objective(), PLAIN, 0.0
    )
    planner = Planner(model, 16, 4, 2 if pack_length else 6, pack_length)
    state = initial_state(params, rule)
    state, metrics = update(StepPrograms(rule), planner, state, shown, rate=1.0)
    grads = jax.tree.map(np.asarray, state.opt_state[0].mu)
    decoder_weights.export(tmp_path / "grads", grads, model)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )
    total, count = 0.0, sum(int(one.trained.sum()) for one in shown)
    for one in shown:
        labels = torch.tensor(np.where(one.trained, one.tokens, -100))[None].long()
        tokens = torch.tensor(one.tokens)[None].long()
        loss = theirs(input_ids=tokens, labels=labels).loss * one.trained.sum() / count
        loss.backward()
        total += loss.item()
    assert metrics["sft/loss"] == pytest.approx(total, rel=1e-5)
    ours = load_file(tmp_path / "grads" / "model.safetensors")
    named = dict(theirs.named_parameters())
    assert ours.keys() == named.keys()
    for name, grad in ours.items():
        expected = named[name].grad.numpy()
        assert np.abs(grad - expected).max() <= 1e-5 * np.abs(expected).max(), name
