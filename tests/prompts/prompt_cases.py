"""Problems, tokenizers of a character a token, and what their tokens say."""

from luspo_jax.datasets import Example
from luspo_jax.prompts import Renderer


class Characters:
    """A tokenizer of one token a character; the chat template marks roles."""

    chat_template = "roles in angle brackets"

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt, **extra):
        assert not tokenize
        assert add_generation_prompt
        turns = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return turns + "<assistant>" + "".join(f"[{k}={v}]" for k, v in extra.items())

    def __call__(self, texts, add_special_tokens):
        marks = [1] if add_special_tokens else []
        return {"input_ids": [marks + [ord(c) for c in text] for text in texts]}


class NoChat(Characters):
    chat_template = None


EXAMPLES = [Example(100 + n, f"problem {n}", str(n)) for n in range(23)]

PLAIN = Renderer(NoChat(), "plain")


def ids(records):
    return [record.prompt_id for record in records]


VISION = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]

START, PAD, END = 1, 2, 3


def asking(number, problem, *names):
    references = [{"row": number, "path": f"{name}.png"} for name in names]
    return Example(number, problem, "", {"images": references} if names else {})


def shape(tokens):
    """Tokens as text, each image as [number of its tokens]."""
    found, count = "", 0
    for token in tokens.tolist():
        if token == START:
            count = 0
        elif token == PAD:
            count += 1
        elif token == END:
            found += f"[{count}]"
        else:
            found += chr(token - 5 + 32)
    return found
