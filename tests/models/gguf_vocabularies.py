"""Small vocabularies as a GGUF file's metadata has them."""

from tokenizers.pre_tokenizers import ByteLevel

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGES = ["t h", "th e", "Ġ the", "1 2", "12 3", "Ġ a", "Ġ 1", "a b", "i n"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_level(pre="smollm"):
    """Bytes, a few merges, three control tokens, a user's own, and two rows that only pad."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merged = [merge.replace(" ", "") for merge in _MERGES]
    tokens = [*special, *sorted(ByteLevel.alphabet()), *merged, "<think>", "[PAD0]", "[PAD1]"]
    types = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 6) + [USER_DEFINED, UNUSED, UNUSED]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def sentencepiece():
    """<unk>, <s>, </s>, all bytes, and pieces of a few words with their scores."""
    pieces = ["▁", *"abcdehinot", "th", "▁th", "he", "the", "▁the", "▁a", "in", "▁t", "at", "▁that"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    ranked = ["▁t", "he", "in", "th", "▁th", "▁the", "▁a", "at", "▁that", "the"]
    scores = [-float(ranked.index(x)) if x in ranked else -1000.0 for x in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
