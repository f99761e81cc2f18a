"""Which held-out problems a training set has seen: shared n-grams of words, as in arXiv:2005.14165.

A benchmark whose problems were trained on measures memory. Text is compared without case,
punctuation and LaTeX's marks, so that a copy in other dress is found. One shared n-gram is a
reason to look, not a proof: "where m and n are relatively prime positive integers find m n" stands
in many problems. So each match says how much of the held-out problem the training problem holds.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

from luspo_jax.datasets.example import Example

NGRAM = 13  # words, of arXiv:2005.14165, appendix C
_WORD = re.compile(r"[a-z]+|\d+|[^\W\d_a-z]")  # the last: one letter of another script
_MARKS = re.compile(r"\\(?:text|mathrm|left|right|dfrac|tfrac|frac)(?![a-z])")


@dataclasses.dataclass(frozen=True)
class Match:
    """A held-out problem and the training problem that holds most of it.

    Attributes:
      held_out: the held-out example's id.
      trained: the training example's id.
      share: share of the held-out problem's n-grams that the training problem has.
    """

    held_out: int
    trained: int
    share: float


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What two sets share.

    Attributes:
      num_held_out: held-out problems.
      num_trained: training problems.
      ngram: words.
      matches: the best match of each held-out problem that has one, in the order of these.
    """

    num_held_out: int
    num_trained: int
    ngram: int
    matches: tuple[Match, ...]

    def at_least(self, share: float) -> list[Match]:
        """Matches that hold so much of the held-out problem."""
        return [match for match in self.matches if match.share >= share]

    def __str__(self) -> str:
        return (
            f"{len(self.matches):,} of {self.num_held_out:,} held-out problems share "
            f"{self.ngram} words in a row with one of {self.num_trained:,} training problems; "
            f"{len(self.at_least(0.5)):,} are held by half or more, {len(self.at_least(1)):,} whole"
        )


def words(text: str) -> tuple[str, ...]:
    """Words, numbers and other letters of a text in lower case; Chinese counts by character."""
    return tuple(_WORD.findall(_MARKS.sub(" ", text.lower())))


def overlap(
    held_out: Sequence[Example], trained: Iterable[Example], *, ngram: int = NGRAM
) -> Overlap:
    """Held-out problems that share an n-gram of words with a training problem.

    A problem of fewer than n words is one n-gram, and found as a whole problem only.

    Raises:
      ValueError: n is not positive.
    """
    if ngram < 1:
        raise ValueError(f"ngram={ngram} must be at least 1 word")
    sizes, holders = {}, collections.defaultdict(list)
    for example in held_out:
        grams = _grams(words(example.problem), ngram)
        sizes[example.id] = len(grams)
        for gram in grams:
            holders[gram].append(example.id)
    best: dict[int, Match] = {}
    num_trained = 0
    for example in trained:
        num_trained += 1
        shared = collections.Counter(
            held for gram in _grams(words(example.problem), ngram) for held in holders.get(gram, ())
        )
        for held, count in shared.items():
            share = count / sizes[held]
            if held not in best or share > best[held].share:
                best[held] = Match(held, example.id, share)
    matches = tuple(best[example.id] for example in held_out if example.id in best)
    return Overlap(len(held_out), num_trained, ngram, matches)


def _grams(said: tuple[str, ...], ngram: int) -> set[tuple[str, ...]]:
    return {said[start : start + ngram] for start in range(max(1, len(said) - ngram + 1))}
