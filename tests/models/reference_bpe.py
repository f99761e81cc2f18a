"""Byte-level tokenization in plain Python, by llama.cpp's expressions: for tests of GGUF files."""

import functools
import itertools
import unicodedata

import regex

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Of `llm_tokenizer_bpe` in llama.cpp's llama-vocab.cpp; each cuts what the one before left.
EXPRESSIONS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [_WORDS % "{1,3}"],
    "qwen2": [_WORDS % ""],
}


class ReferenceBpe:
    """A byte-level tokenizer of a GGUF file's metadata.

    Args:
      values: metadata by key.
    """

    def __init__(self, values):
        tokens = values["tokenizer.ggml.tokens"]
        types = values["tokenizer.ggml.token_type"]
        self._expressions = EXPRESSIONS[values["tokenizer.ggml.pre"]]
        self._nfc = values["tokenizer.ggml.pre"] == "qwen2"
        self._whole_words = values["tokenizer.ggml.pre"] == "llama-bpe"
        kept = {token for token, kind in zip(tokens, types, strict=True) if kind in (3, 4)}
        self._kept = "|".join(map(regex.escape, sorted(kept, key=len, reverse=True)))
        self._ids = {
            token: number
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind != 5
        }
        merges = values["tokenizer.ggml.merges"]
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self._merged = functools.cache(self._merge)

    def __call__(self, text):
        """Returns the ids of a text, without a first or last token."""
        ids = []
        for part in regex.split(f"({self._kept})", text):
            if regex.fullmatch(self._kept, part):
                ids.append(self._ids[part])
            else:
                for piece in self._cut(unicodedata.normalize("NFC", part) if self._nfc else part):
                    ids += self._merged(piece)
        return ids

    def _cut(self, text):
        pieces = [text]
        for expression in self._expressions:
            pieces = [x for piece in pieces for x in regex.split(f"({expression})", piece) if x]
        return pieces

    def _merge(self, piece):
        # A byte that has no token is left out, as `tokenizers` does without an unknown token.
        parts = [letter for byte in piece.encode() if (letter := _letters()[byte]) in self._ids]
        if self._whole_words and "".join(parts) in self._ids:
            return [self._ids["".join(parts)]]
        while True:
            ranked = [
                (self._ranks[pair], place)
                for place, pair in enumerate(itertools.pairwise(parts))
                if pair in self._ranks
            ]
            if not ranked:
                return [self._ids[part] for part in parts]
            place = min(ranked)[1]
            parts[place : place + 2] = ["".join(parts[place : place + 2])]


@functools.cache
def _letters():
    """GPT-2's printable letter of each byte."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]
