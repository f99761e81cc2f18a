"""Tokenizer files of a small character-level vocabulary, in the format of `AutoTokenizer`.

Every character is a token, and so is `####`, which announces an answer in GSM8K's format. The files
are written directly and are byte for byte the same under every library version.
"""

import pathlib

from luspo_jax.hosts import files

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2
ANSWER_MARK = "####"

# The content of one message verbatim, so that chat and plain prompts have the same tokens.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# Tokens of a model that reads images; also special, after all others.
IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# A message is a text, or a list of images and texts; an image is one placeholder.
IMAGE_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def vocabulary(characters: str, *, images: bool = False) -> list[str]:
    """Returns tokens by id: three special ones, the answer mark, characters, those of images."""
    if len(set(characters)) != len(characters):
        raise ValueError(f"a character occurs twice in {characters!r}")
    return [PAD, END, UNKNOWN, ANSWER_MARK, *characters, *(IMAGE_TOKENS if images else ())]


def write_tokenizer(
    folder: pathlib.Path, characters: str, *, max_length: int, images: bool = False
) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
      folder: an existing folder.
      characters: all characters of texts; any other becomes one <|unknown|>.
      max_length: tokens that the model can hold.
      images: whether to add IMAGE_TOKENS and a chat template that supports images.
    """
    files.write_json(folder / "tokenizer.json", _tokenizer(vocabulary(characters, images=images)))
    files.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": END,
            "unk_token": UNKNOWN,
            "bos_token": None,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "chat_template": IMAGE_CHAT_TEMPLATE if images else CHAT_TEMPLATE,
        },
    )


def _tokenizer(tokens):
    special = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, token in enumerate(tokens)
        if token in (PAD, END, UNKNOWN, *IMAGE_TOKENS)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": f"{ANSWER_MARK}|[\\s\\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "unk_token": UNKNOWN,
        },
    }
