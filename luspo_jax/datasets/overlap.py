"""Held-out problems seen in a training set: shared word n-grams, as in arXiv:2005.14165.

A benchmark whose problems were trained on measures memory. Texts are compared without case,
punctuation and LaTeX markup, so that reformatted copies are found. One shared n-gram is a reason to
look, not a proof: "where m and n are relatively prime positive integers find m n" occurs in many
problems. So each match gives the share of the held-out problem found in the training problem. A
problem shorter than one n-gram is compared as a whole, including its signs: 5 − 9 is not 5 + 9.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Sequence

from tqdm import tqdm

from luspo_jax.datasets.example import Example

NGRAM = 13  # words; arXiv:2005.14165, appendix C
_WORD = re.compile(r"[a-z]+|\d+|[^\W\d_a-z]")  # the last: one letter of another script
_MARKS = re.compile(r"\\(?:text|mathrm|left|right|dfrac|tfrac|frac)(?![a-z])")

_TOKEN = re.compile(r"[a-z]+|\d+|\S")
_DRESS = frozenset(".,;:?$\\{}\"'`~_&")  # signs without meaning for the question
# Signs with several spellings; all other LaTeX names count as words.
_SIGNS = (
    (re.compile(r"\\[()\[\]]|(?<=[a-z]{2})-(?=[a-z]{2})"), " "),
    (re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)\s*(\d))"), r"\1\3 / \2\4"),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-z])|[×·⋅∗]"), " * "),
    (re.compile(r"\\div(?![a-z])|÷"), " / "),
    (re.compile("[−–‐‑]"), "-"),
)


@dataclasses.dataclass(frozen=True)
class Match:
    """A held-out problem and the training problem that contains most of it.

    Attributes:
      held_out: the held-out example's id.
      trained: the training example's id.
      share: share of the held-out problem's n-grams found in the training problem.
    """

    held_out: int
    trained: int
    share: float


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The overlap of two sets.

    Attributes:
      num_held_out: held-out problems.
      num_trained: training problems.
      ngram: words.
      matches: the best match of each held-out problem that has one, in the order of these problems.
    """

    num_held_out: int
    num_trained: int
    ngram: int
    matches: tuple[Match, ...]

    def at_least(self, share: float) -> list[Match]:
        """Returns the matches with at least this share of the held-out problem."""
        return [match for match in self.matches if match.share >= share]

    def __str__(self) -> str:
        return (
            f"{len(self.matches):,} of {self.num_held_out:,} held-out problems share "
            f"{self.ngram} words in a row with one of {self.num_trained:,} training problems; "
            f"{len(self.at_least(0.5)):,} are held by half or more, {len(self.at_least(1)):,} whole"
        )


def words(text: str) -> tuple[str, ...]:
    """Splits a text into lower-case words, numbers and other letters; Chinese by character."""
    return tuple(_WORD.findall(_MARKS.sub(" ", text.lower())))


def signed(text: str) -> tuple[str, ...]:
    """Splits a text into lower-case words, numbers and the signs between them."""
    text = text.lower()
    for pattern, replacement in _SIGNS:
        text = pattern.sub(replacement, text)
    return tuple(t for t in _TOKEN.findall(_MARKS.sub(" ", text)) if t not in _DRESS)


def overlap(
    held_out: Sequence[Example], trained: Iterable[Example], *, ngram: int = NGRAM
) -> Overlap:
    """Finds held-out problems that share an n-gram of words with a training problem.

    A problem of fewer than n words is matched only as a whole problem, including its signs.

    Raises:
      ValueError: n is not positive.
    """
    if ngram < 1:
        raise ValueError(f"ngram={ngram} must be at least 1 word")
    sizes, holders = {}, collections.defaultdict(list)
    vocabulary = {"times", "cdot", "ast", "div"}  # words to `words`, signs to `signed`
    for example in held_out:
        said = words(example.problem)
        vocabulary.update(said)
        grams = _grams(example.problem, said, ngram, vocabulary)
        sizes[example.id] = len(grams)
        for gram in grams:
            holders[gram].append(example.id)
    best: dict[int, Match] = {}
    num_trained = 0
    for example in tqdm(trained, "overlap", disable=None, delay=1, unit=" problems"):
        num_trained += 1
        grams = _grams(example.problem, words(example.problem), ngram, vocabulary)
        if grams.isdisjoint(holders):
            continue
        shared = collections.Counter(held for gram in grams for held in holders.get(gram, ()))
        for held, count in shared.items():
            share = count / sizes[held]
            if held not in best or share > best[held].share:
                best[held] = Match(held, example.id, share)
    matches = tuple(best[example.id] for example in held_out if example.id in best)
    return Overlap(len(held_out), num_trained, ngram, matches)


def _grams(
    text: str, said: tuple[str, ...], ngram: int, vocabulary: Collection[str]
) -> set[tuple[str, ...]]:
    """Returns a text's n-grams of words in the vocabulary, or the whole text if it is short."""
    strange = [place for place, word in enumerate(said) if word not in vocabulary]
    if len(said) < ngram:
        return set() if strange else {signed(text)}
    spans = itertools.pairwise([-1, *strange, len(said)])
    return {
        said[start : start + ngram]
        for before, after in spans
        for start in range(before + 1, after - ngram + 1)
    }
