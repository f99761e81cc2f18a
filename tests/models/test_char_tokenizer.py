"""Tokenizer files, as transformers reads them."""

import pytest
from transformers import AutoTokenizer

from luspo_jax.models import char_tokenizer

CHARACTERS = " =?.0123456789abc"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    char_tokenizer.write_tokenizer(folder, CHARACTERS, max_length=64)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_follow_the_vocabulary(tokenizer):
    vocabulary = char_tokenizer.vocabulary(CHARACTERS)
    assert len(tokenizer) == len(vocabulary) == 4 + len(CHARACTERS)
    assert tokenizer.convert_ids_to_tokens(range(len(vocabulary))) == vocabulary
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (
        char_tokenizer.PAD_ID,
        char_tokenizer.END_ID,
        char_tokenizer.UNKNOWN_ID,
    )
    assert tokenizer.model_max_length == 64


@pytest.mark.parametrize("text", ["a3b1?", "b1=4 c2=1 #### 1", "....#### 4", " a ?", "#### 4"])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.replace("####", "#"))
    assert tokenizer.decode(ids) == text
    ended = [*ids, char_tokenizer.END_ID]
    assert tokenizer.decode(ended, skip_special_tokens=True) == text
    assert tokenizer.encode(text + char_tokenizer.END) == ended


def test_characters_outside_the_vocabulary_are_unknown(tokenizer):
    assert tokenizer.encode("a#\né") == [tokenizer.encode("a")[0], *[char_tokenizer.UNKNOWN_ID] * 3]


def test_chat_template_is_the_content_alone(tokenizer):
    messages = [{"role": "user", "content": "a3b1?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "a3b1?"


def test_a_character_that_occurs_twice_is_refused():
    with pytest.raises(ValueError, match="occurs twice"):
        char_tokenizer.vocabulary("abca")


def test_image_tokens_come_last_and_chat_knows_of_images(tmp_path):
    char_tokenizer.write_tokenizer(tmp_path, CHARACTERS, max_length=64, images=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = char_tokenizer.vocabulary(CHARACTERS, images=True)
    assert vocabulary == [*char_tokenizer.vocabulary(CHARACTERS), *char_tokenizer.IMAGE_TOKENS]
    assert tokenizer.convert_ids_to_tokens(range(len(vocabulary))) == vocabulary
    start, end, image, _ = char_tokenizer.IMAGE_TOKENS
    parts = [{"type": "image"}, {"type": "text", "text": "a?"}]
    asked = [{"role": "user", "content": content} for content in (parts, "a?")]
    text = tokenizer.apply_chat_template(asked, tokenize=False)
    assert text == f"{start}{image}{end}a?a?"
    assert tokenizer.encode(text)[:3] == [vocabulary.index(token) for token in (start, image, end)]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "a?a?"
