"""A tokenizer laid out as DeepSeek-R1-Distill-Qwen's, whose chat template opens the reasoning.

The published files are not at hand: the tokens, their order and flags, `add_bos_token`, the class
that the file names, and what the template renders are theirs; the template's text is ours.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

END, USER, ASSISTANT = "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
BEGIN, THINK, THOUGHT = "<｜begin▁of▁sentence｜>", "<think>", "</think>"
ADDED = (END, USER, ASSISTANT, BEGIN, "<|EOT|>", THINK, THOUGHT)  # in the order of their ids
OPEN = f"{ASSISTANT}{THINK}\n"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}"
    "{% for m in messages if m['role'] == 'user' %}"
    "{{ '<｜User｜>' + m['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(
    folder: pathlib.Path,
    *,
    vocab: Mapping[str, int] | None = None,
    merges: Sequence[tuple[str, str]] = (),
    special: Sequence[str] = (END, BEGIN),
) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json; returns the ids of the added tokens.

    Args:
      folder: an existing folder.
      vocab: byte-level tokens, before the added ones; bytes alone if None.
      merges: of the vocabulary.
      special: added tokens that are special.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = dict(vocab or {character: index for index, character in enumerate(alphabet)})
    tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token in ADDED:  # one by one: each gets the next id
        tokenizer.add_tokens([AddedToken(token, special=token in special, normalized=False)])
    ids = {token: tokenizer.token_to_id(token) for token in ADDED}
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, ids[BEGIN])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": None}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": True,
                "add_eos_token": False,
                "clean_up_tokenization_spaces": False,
                "legacy": True,
                "model_max_length": 16384,
                "tokenizer_class": "LlamaTokenizerFast",
                "chat_template": CHAT_TEMPLATE,
                **named,
            }
        )
    )
    return ids


def write_qwens(folder: pathlib.Path, qwen: pathlib.Path) -> dict[str, int]:
    """Writes such a tokenizer with the words of Qwen's vocab.json and merges.txt, as published."""
    lines = (qwen / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return write_tokenizer(
        folder,
        vocab=json.loads((qwen / "vocab.json").read_text(encoding="utf-8")),
        merges=merges,
    )


def write_model(folder: pathlib.Path, **options: Any) -> dict[str, int]:
    """Writes such a tokenizer and the `config.json` of the 1.5B with a small model's sizes.

    Args:
      folder: an existing folder.
      **options: as for `write_tokenizer`.

    Returns:
      The ids of the added tokens.
    """
    from luspo_jax.models.locate import architecture

    ids = write_tokenizer(folder, **options)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": max(ids.values()) + 9,  # padded, as the published one
        "max_position_embeddings": 512,
        "bos_token_id": ids[END],  # as published: the model's own begin is its end
        "eos_token_id": ids[END],
    }
    values = architecture("hub:deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B") | sizes
    (folder / "config.json").write_text(json.dumps(values))
    return ids
