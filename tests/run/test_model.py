"""Tokenizer, stop tokens and text of a model whose chat template opens the reasoning."""

import dataclasses
import json

import numpy as np
import pytest
import transformers

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import quantised
from luspo_jax.models.locate import architecture
from luspo_jax.run import fields
from luspo_jax.run.model import Model, load_model
from tests import reasoning_cases as r1


def _load(folder):
    config = fields.default_config()
    config.model.path, config.model.random_weights = str(folder), True
    return load_model(config)


@pytest.fixture
def distilled(tmp_path):
    ids = r1.write_model(tmp_path)
    return _load(tmp_path), ids


def test_the_end_of_sentence_ends_a_response_and_nothing_else_does(distilled):
    model, ids = distilled
    assert model.stop_token_ids == (ids[r1.END],)
    assert model.config.qkv_bias
    assert model.tokenizer.bos_token_id == ids[r1.BEGIN]


@pytest.mark.parametrize("special", [(r1.END, r1.BEGIN), (r1.END, r1.BEGIN, r1.THINK, r1.THOUGHT)])
def test_the_tags_stay_in_the_text_also_where_they_are_special(special, tmp_path):
    ids = r1.write_model(tmp_path, special=special)
    model = _load(tmp_path)
    text = "2 + 2 is 4.\n</think>\n\nIt is \\boxed{4}."
    own = model.tokenizer.encode(text + r1.END, add_special_tokens=False)
    assert own[-1] == ids[r1.END]
    assert ids[r1.THOUGHT] in own
    assert model.decode(np.array(own, np.int32)) == text
    # What transformers says of it by itself, where the tags are special.
    bare = model.tokenizer.decode(own, skip_special_tokens=True)
    assert (bare == text) == (len(special) == 2)


def test_other_special_tokens_are_dropped_either_way(tmp_path):
    for number, special in enumerate([(r1.END, r1.BEGIN), (r1.END, r1.BEGIN, r1.THOUGHT)]):
        (folder := tmp_path / str(number)).mkdir()
        ids = r1.write_model(folder, special=special)
        model = _load(folder)
        tokens = [ids[r1.BEGIN], *model.tokenizer.encode(" a b", add_special_tokens=False)]
        assert model.decode(np.array([*tokens, ids[r1.END]])) == " a b"


def test_the_text_is_decoded_as_its_file_says(distilled, tmp_path):
    from tokenizers import Tokenizer

    model, _ = distilled
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (
        "If x = 3,\n then y.",
        "  two  spaces, ünïcödé, 中文 and \t tabs",
        "a</think>\n\nb",
    ):
        tokens = model.tokenizer.encode(text, add_special_tokens=False)
        assert tokens == own.encode(text, add_special_tokens=False).ids
        assert model.decode(np.array(tokens)) == text


def test_a_tokenizer_that_loses_the_spaces_of_its_file_is_refused(tmp_path, monkeypatch):
    r1.write_model(tmp_path)
    # As transformers 5.0 read it.
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", transformers.LlamaTokenizer.from_pretrained
    )
    with pytest.raises(ConfigError, match="was read as a LlamaTokenizer, which loses spaces"):
        _load(tmp_path)
    # The remedy that the message names.
    monkeypatch.undo()
    path = tmp_path / "tokenizer_config.json"
    named = {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    assert _load(tmp_path).stop_token_ids


def test_a_tokenizer_of_few_characters_is_not_accused():
    config = fields.default_config()
    config.model.path = "embedded:label_sums"
    model = load_model(config)
    assert model.tokenizer.decode(model.tokenizer.encode("If a + b")) != "If a + b"


def test_decoding_needs_no_table_of_added_tokens():
    class Plain:
        def decode(self, tokens, skip_special_tokens):
            return f"{list(tokens)} {skip_special_tokens}"

    model = Model(None, None, Plain())
    assert model.decode(np.array([1])) == dataclasses.replace(model).decode(np.array([1]))
    assert model.decode(np.array([1, 2])).endswith("True")


def test_the_published_ids_are_those_after_qwens_vocabulary(shared_data, tmp_path):
    """With Qwen's own words the added tokens have the ids that the published files state."""
    qwen = shared_data / "qwen" / "Qwen3-1.7B"
    ids = r1.write_qwens(tmp_path, qwen)
    values = architecture("hub:deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert ids == dict(zip(r1.ADDED, range(151_643, 151_650), strict=True))
    model = _load(tmp_path)
    assert model.stop_token_ids == (151_643,)
    reference = transformers.AutoTokenizer.from_pretrained(qwen)
    text = "Let $x_1 = \\frac{3}{4}$, and\n\n  find 12345 + ünïcödé."
    expected = reference.encode(text, add_special_tokens=False)
    assert model.tokenizer.encode(text, add_special_tokens=False) == expected


def test_weights_of_int8_that_do_not_cover_the_model_are_refused_by_name(tmp_path, monkeypatch):
    """As a kernel of a new family would be: no rule says what its products sum over."""
    r1.write_model(tmp_path)
    rules = {k: v for k, v in quantised._CONTRACTED.items() if k != "gate"}
    monkeypatch.setattr(quantised, "_CONTRACTED", rules)
    config = fields.default_config()
    config.model.path, config.model.random_weights = str(tmp_path), True
    config.model.rollout_dtype = "int8"
    with pytest.raises(
        ConfigError,
        match=r"^model.rollout_dtype=int8: int8 covers no kernel 'layers/mlp/gate/kernel' of a "
        r"qwen2 model: use bfloat16$",
    ):
        load_model(config)
    config.model.rollout_dtype = "bfloat16"
    load_model(config)
