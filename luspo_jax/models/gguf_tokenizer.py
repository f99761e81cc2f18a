"""The tokenizer of a GGUF file: vocabulary, merges and the rule that cuts text before them.

transformers has a conversion of its own. It is not used: it knows no rule for SmolLM2 (`smollm`)
and then merges digits that the model has never seen merged, it spells DeepSeek's control tokens as
bytes, and it adds no first token. A rule that is not in this table is refused, because another one
gives other tokens than those of the training, and no error.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from luspo_jax.models.safetensors_folder import WeightsError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # token types; 1 normal, 2 unknown, 6 byte

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a byte-level tokenizer cuts text before it merges.

    Attributes:
      pattern: of the pieces; empty for GPT-2's.
      single_digits: every digit is a piece, before all else.
      nfc: characters are composed first (Unicode's form C).
      whole_words: a piece that is a token stays one, whatever the merges say.
      starts: a text begins with the bos token, unless the file says otherwise.
    """

    pattern: str = ""
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    starts: bool = False


_LLAMA3 = Cut(_WORDS.format(digits="{1,3}"), whole_words=True, starts=True)
_QWEN2 = Cut(_WORDS.format(digits=""), nfc=True)
# Values of tokenizer.ggml.pre, named in llama.cpp's convert_hf_to_gguf.py; the patterns and
# switches are those of the models' own tokenizer.json.
CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def tokenizer(metadata: Mapping[str, Any], *, vocab_size: int) -> Any:
    """Returns the tokenizer of a GGUF file's metadata, as transformers has it.

    Args:
      metadata: of the file.
      vocab_size: rows of the embedding.

    Raises:
      WeightsError: no tokenizer, one of a kind that is not read, or not of this vocabulary.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import

    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    _check_vocabulary(own, vocab_size)
    if own["model"] == "gpt2":
        backend, starts = _byte_level(own)
    elif own["model"] == "llama":
        backend, starts = _sentencepiece(own), True
    else:
        raise WeightsError(
            f"tokenizer.ggml.model = {own['model']!r} is not read, only 'gpt2' (byte-level) and "
            "'llama' (SentencePiece)"
        )
    _add_special(backend, own)
    backend.post_processor = _framed(own, starts)
    named = {
        "bos_token": own.get("bos_token_id"),
        "eos_token": own.get("eos_token_id"),
        "unk_token": own.get("unknown_token_id"),
        "pad_token": own.get("padding_token_id"),
    }
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: own["tokens"][number] for name, number in named.items() if number is not None},
    )
    made.chat_template = metadata.get("tokenizer.chat_template")
    return made


def _check_vocabulary(own, vocab_size):
    if "model" not in own or "tokens" not in own:
        raise WeightsError("the file holds no tokenizer: take one made of a whole model")
    tokens = own["tokens"]
    if len(tokens) != vocab_size:
        raise WeightsError(
            f"its tokenizer has {len(tokens)} tokens and its embedding {vocab_size} rows: they do "
            "not belong together"
        )
    for name, value in own.items():
        if name.endswith("_token_id") and not 0 <= value < len(tokens):
            raise WeightsError(
                f"tokenizer.ggml.{name} = {value} is not in the vocabulary of {len(tokens)}"
            )


def _types(own):
    return own.get("token_type") or [1] * len(own["tokens"])


def _vocabulary(own):
    """Returns ids by token; rows that only pad the embedding have none."""
    pairs = zip(own["tokens"], _types(own), strict=True)
    return {token: number for number, (token, kind) in enumerate(pairs) if kind != _UNUSED}


def _byte_level(own):
    """Returns (a byte-level BPE tokenizer as of GPT-2, whether a text begins with bos)."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    name = own.get("pre", "default")
    if name not in CUTS:
        raise WeightsError(
            f"tokenizer.ggml.pre = {name!r} is not known, and cut otherwise text has other tokens; "
            f"known are {', '.join(sorted(CUTS))}"
        )
    cut = CUTS[name]
    if "merges" not in own:
        raise WeightsError("tokenizer.ggml.merges is missing: take a file that has them")
    merges = [tuple(merge.split(" ", 1)) for merge in own["merges"]]
    try:
        model = models.BPE(_vocabulary(own), merges, ignore_merges=cut.whole_words)
    except Exception as error:  # the package raises no kind of its own
        raise WeightsError(
            f"tokenizer.ggml.merges do not fit its tokens ({error}): make the file again"
        ) from None
    backend = Tokenizer(model)
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pieces(cut)
    backend.decoder = decoders.ByteLevel()
    return backend, cut.starts


def _pieces(cut):
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut.pattern)
    first = []
    if cut.single_digits:
        first.append(pre_tokenizers.Digits(individual_digits=True))
    if cut.pattern:
        first.append(pre_tokenizers.Split(Regex(cut.pattern), behavior="isolated"))
    return pre_tokenizers.Sequence([*first, byte_level])


def _sentencepiece(own):
    """Returns a BPE tokenizer as of Llama 2: spaces are ▁, unknown characters bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = own["tokens"][own.get("unknown_token_id", 0)]
    model = models.BPE(
        _vocabulary(own), _merges(own), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    prefix = own.get("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend


def _merges(own):
    """Returns the merges that the scores imply: every way to join two tokens, best score first."""
    if "scores" not in own:
        raise WeightsError("tokenizer.ggml.scores is missing: take a file that has them")
    numbers = _vocabulary(own)
    found = []
    for token, number in numbers.items():
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            if left in numbers and right in numbers:
                found.append((-own["scores"][number], numbers[left], numbers[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_special(backend, own):
    """Adds the tokens that are never cut: those of control, and those that users defined."""
    from tokenizers import AddedToken

    # One after another, since ids follow the order.
    for token, kind in zip(own["tokens"], _types(own), strict=True):
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])


def _framed(own, starts):
    """Returns a post-processor that puts bos before a text, and eos behind, as the file asks."""
    from tokenizers import processors

    wanted = {
        "bos": own.get("add_bos_token", starts),
        "eos": own.get("add_eos_token", False),
    }
    ids = {name: own.get(f"{name}_token_id") for name, yes in wanted.items() if yes}
    used = {
        name: (own["tokens"][number], number) for name, number in ids.items() if number is not None
    }
    if not used:
        return None
    first, last = ([used[name][0]] if name in used else [] for name in ("bos", "eos"))
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{x}:1" for x in first), "$B:1", *(f"{x}:1" for x in last)],
        special_tokens=list(used.values()),
    )
