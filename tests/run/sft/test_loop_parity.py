"""Live parity of a whole supervised run of chats with `transformers` (torch, float32).

The tokenizer says which tokens are an assistant's (`return_assistant_tokens_mask`), and torch
computes their cross-entropy under the exported weights.
"""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="live parity needs torch (pip install '.[parity]')")

import transformers  # noqa: E402

from luspo_jax.models import char_tokenizer, decoder, decoder_weights  # noqa: E402
from luspo_jax.models.decoder_config import DecoderConfig, hf_config  # noqa: E402
from luspo_jax.run import fields  # noqa: E402
from luspo_jax.run.sft.build import build, facts  # noqa: E402
from luspo_jax.run.sft.loop import fine_tune  # noqa: E402
from luspo_jax.run.workdir import Workdir  # noqa: E402

MODEL = DecoderConfig(
    model_type="qwen3", vocab_size=32, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=2,
    num_kv_heads=1, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6, qkv_bias=False, qk_norm=True,
    tie_embeddings=True, max_position=64, eos_token_ids=(char_tokenizer.END_ID,),
    pad_token_id=char_tokenizer.PAD_ID,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}={% generation %}{{ m['content'] }}"
    "<|end|>{% endgeneration %} {% else %}{{ m['content'] }}?{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture
def model_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    char_tokenizer.write_tokenizer(source, " =?.0123456789abcdefghij", max_length=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    (source / "config.json").write_text(json.dumps(hf_config(MODEL)))
    params = decoder.init_params(jax.random.key(1), MODEL)
    decoder_weights.export(tmp_path / "model", params, MODEL, source=source)
    return tmp_path / "model"


def _chats(path, seed, count):
    """Writes chats of one to three turns of unequal length, and returns them."""
    rng = np.random.default_rng(seed)
    said = lambda most: "".join(rng.choice(list("abc0123"), rng.integers(1, most + 1)))  # noqa: E731
    chats = [
        [
            {"role": role, "content": said(most)}
            for _ in range(rng.integers(1, 4))
            for role, most in (("user", 5), ("assistant", 9))
        ]
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return chats


def _torch_losses(folder, chats, turns):
    """(mean −log p over the assistants' tokens, mean over chats of their means)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    sums, counts = [], []
    for chat in chats:
        found = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor(found["input_ids"]), np.array(found["assistant_masks"], bool)
        if turns == "last":
            gaps = np.flatnonzero(np.diff(mask.astype(int)) == 1)
            mask[: gaps[-1] + 1] = False
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()
        sums.append(each[mask[1:]].sum(dtype=np.float64))
        counts.append(mask[1:].sum())
    return sum(sums) / sum(counts), np.mean(np.array(sums) / counts), sum(counts)


@pytest.mark.slow
@pytest.mark.parametrize(("turns", "packing"), [("all", True), ("last", False)])
def test_held_out_loss_is_that_of_transformers(turns, packing, model_folder, tmp_path):
    _chats(tmp_path / "train.jsonl", 0, 24)
    chats = _chats(tmp_path / "held_out.jsonl", 1, 11)
    config = fields.default_sft_config()
    config.num_steps = 3
    config.model.path = str(model_folder)
    config.data.path = str(tmp_path / "train.jsonl")
    config.data.held_out_path = str(tmp_path / "held_out.jsonl")
    config.data.messages_column, config.data.turns = "messages", turns
    config.data.max_length, config.data.too_long = 60, "refuse"
    config.train.batch_size, config.train.learning_rate = 8, 1e-2
    config.train.warmup_steps = 0
    config.train.packing = packing
    config.train.microbatch_tokens = 120 if packing else 0
    config.eval.num_generations = 0
    config.output.tensorboard = False
    run = build(config, jax.devices()[:1])
    workdir = Workdir(tmp_path / "run", config, facts(run))
    outcome = fine_tune(run, workdir)
    workdir.close()
    for found, folder in ((outcome.base, model_folder), (outcome.final, outcome.export)):
        loss, sequence_loss, count = _torch_losses(folder, chats, turns)
        assert found.num_tokens == count
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.sequence_loss == pytest.approx(sequence_loss, rel=1e-5)
    assert outcome.final.loss < outcome.base.loss - 0.1
