"""Tokenizers of GGUF files against the models' own, and how text is cut before it is merged."""

import itertools
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from luspo_jax.models import gguf_tokenizer
from luspo_jax.models.safetensors_folder import WeightsError
from tests.models import gguf_vocabularies as vocabularies
from tests.models.reference_bpe import EXPRESSIONS, ReferenceBpe

TEXTS = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    "the  12345 th\n\n the\tabc don't I'LL",
    "é e\u0301 日本語 😀 ½",
    " leading and trailing ",
    "<|im_start|>user\nthe<|im_end|><think>the 12",
    "",
]


def _made(values):
    return gguf_tokenizer.tokenizer(values, vocab_size=len(values["tokenizer.ggml.tokens"]))


def _pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["Ġ", "123", "4", "Ġ1"]),
        ("smollm", ["Ġ", "1", "2", "3", "4", "Ġ", "1"]),
        ("qwen2", ["Ġ", "1", "2", "3", "4", "Ġ", "1"]),
        ("llama-bpe", ["Ġ", "123", "4", "Ġ", "1"]),
    ],
)
def test_digits(pre, expected):
    """The vocabulary can merge 1, 2, 3, and a space with 1: only GPT-2's rule allows the last."""
    assert _pieces(_made(vocabularies.byte_level(pre)), " 1234 1") == expected


@pytest.mark.parametrize("pre", sorted(EXPRESSIONS))
def test_ids_are_those_of_plain_python(pre):
    values = vocabularies.byte_level(pre)
    ours, theirs = _made(values), ReferenceBpe(values)
    parts = ["the", "th", "ab", "12", "345", "½", "Ⅷ", "٣", "é", "e\u0301", "日", "😀", "'S", "'ll"]
    parts += [" ", "  ", "\n", "\r\n", "\t", "\u3000", ".", "$", "<|im_end|>", "<think>", "in", "a"]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(parts, 12)) for _ in range(500)]
    for text in [*TEXTS, *texts]:
        assert ours(text, add_special_tokens=False).input_ids == theirs(text), text


def test_every_rule_is_compared():
    for pre, rule in gguf_tokenizer.CUTS.items():
        assert any(gguf_tokenizer.CUTS[name] == rule for name in EXPRESSIONS), pre


@pytest.mark.parametrize("pre", sorted(gguf_tokenizer.CUTS))
def test_text_comes_back(pre):
    tokenizer = _made(vocabularies.byte_level(pre))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        back = tokenizer.decode(ids)
        if gguf_tokenizer.CUTS[pre].nfc:
            assert back.replace("é", "e\u0301") == text.replace("é", "e\u0301")
        else:
            assert back == text


def test_special_tokens_stay_whole_and_padding_is_no_token():
    tokenizer = _made(vocabularies.byte_level())
    pieces = _pieces(tokenizer, TEXTS[4])
    assert pieces[:2] == ["<|im_start|>", "u"]
    assert {"<|im_end|>", "<think>"} <= set(pieces)
    assert tokenizer.decode(tokenizer(TEXTS[4]).input_ids, skip_special_tokens=True) == (
        "user\nthe<think>the 12"
    )
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    assert len(_pieces(tokenizer, "[PAD0]")) == 6
    assert len(tokenizer) == len(vocabularies.byte_level()["tokenizer.ggml.tokens"]) - 2


@pytest.mark.parametrize(
    ("pre", "changes", "starts", "ends"),
    [
        ("smollm", {}, False, False),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": None}, True, False),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, False, False),
        ("qwen2", {"tokenizer.ggml.add_bos_token": True}, True, False),
        ("qwen2", {"tokenizer.ggml.add_eos_token": True}, False, True),
    ],
)
def test_the_first_and_last_token_are_as_the_file_asks(pre, changes, starts, ends):
    values = vocabularies.byte_level(pre) | changes
    values = {key: value for key, value in values.items() if value is not None}
    ids = _made(values)("the").input_ids
    assert (ids[0] == 1, ids[-1] == 2, len(ids)) == (starts, ends, 1 + starts + ends)


def _best_first(text, scores):
    """SentencePiece's algorithm on characters: join the neighbours of the highest score, again."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        ranked = [
            (-scores[a + b], place)
            for place, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in scores
        ]
        if not ranked:
            return pieces
        place = min(ranked)[1]
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]


def test_sentencepiece_merges_by_score():
    values = vocabularies.sentencepiece()
    tokenizer = _made(values)
    scores = dict(
        zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"], strict=True)
    )
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("athe ind"), 20)) for _ in range(200)]
    for text in ["the hat", "that", *texts]:
        assert _pieces(tokenizer, text) == _best_first(text, scores), text


def test_sentencepiece_spells_what_it_does_not_know_in_bytes():
    tokenizer = _made(vocabularies.sentencepiece())
    assert _pieces(tokenizer, "té") == ["▁t", "<0xC3>", "<0xA9>"]
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id == 1
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_scores_are_needed():
    values = vocabularies.sentencepiece()
    del values["tokenizer.ggml.scores"]
    with pytest.raises(WeightsError, match="scores is missing"):
        _made(values)


def _qwen3(folder):
    """A GGUF file's metadata made of Qwen3's own vocabulary, as the converter would."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    added = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    declared = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    size = 151936
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [vocabularies.UNUSED] * size
    for token, number in (vocabulary | added).items():
        tokens[number], types[number] = token, vocabularies.NORMAL
    for number, token in declared.items():
        special = token["special"]
        types[int(number)] = vocabularies.CONTROL if special else vocabularies.USER_DEFINED
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [line for line in lines if not line.startswith("#version")],
        "tokenizer.ggml.eos_token_id": 151645,
    }


def test_qwen3_has_the_tokens_of_its_own_files(shared_data):
    folder = shared_data / "qwen" / "Qwen3-1.7B"
    ours, theirs = _made(_qwen3(folder)), AutoTokenizer.from_pretrained(folder)
    golden = shared_data / "qwen" / "llamacpp_tokenizer_golden" / "ggml-vocab-qwen2.gguf.inp"
    texts = [*TEXTS, *golden.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")]
    assert len(texts) > 40
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert len(ours) == len(theirs)
