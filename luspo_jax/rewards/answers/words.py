"""Answers in words: names, choices, number words and phrases that stand for a symbol."""

import re

from luspo_jax.rewards.answers.plain_numbers import exact_number

_TEXT = re.compile(r"\\(?:text|mbox)\s*\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b(?:the|an|a)\s+(?=[a-z]{3})")  # a bc is a product
_PHRASE = re.compile(r"[a-z]+(?:'[a-z]+)*(?: [a-z]+(?:'[a-z]+)*)*")
_HYPHEN = re.compile(r"(?<=[a-z]{3})-(?=[a-z]{3})")  # a difference of letters has none
_CALL = re.compile(r"(?<=[a-z]{4})!+$")  # n! is a factorial
_CHOICE = re.compile(
    r"(?i)(?:(?:option|choice)\s*)?(?:\(\s*([A-J])\s*\)|([A-J])\s*[.):](?!\s*=)|([A-J])(?=\s*$))\s*(.*)",
    re.DOTALL,
)
_BARE_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?")
_MORE_LETTERS = re.compile(r"(?:(?:[\s,;&/]|\band\b|\bor\b)*\(?[A-J]\b[).]?)+\s*")
_LETTERS = re.compile(r"\(?[A-J]\)?(?:(?:[\s,;&]|\band\b)+\(?[A-J]\)?)+|[A-J]{2,}")
_OPENING_VERDICT = re.compile(r"(yes|no|true|false)(?:[,.;:]|\s+(?:it|they|this|that|because)\b).*")

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70}
_TENS |= {"eighty": 80, "ninety": 90}
# Equivalent symbols and words.
_SYNONYMS = (
    (r"\emptyset", r"\{\}", "no solution", "no solutions", "no real solution", "no real solutions"),
    (r"\infty", "infinity", "infinite", "infinitely many", "infinitely many solutions"),
    (r"\mathbb{R}", "all real numbers", "all reals", "real numbers", r"(-\infty,\infty)"),
    ("undefined", "does not exist", "dne", "not defined"),
)


def plain(answer: str) -> str:
    """Opens the text commands of an answer and removes quotation marks and the full stop."""
    text = _TEXT.sub(r"\1", answer).strip().strip('"“”`*').rstrip(".").strip()
    quoted = re.fullmatch(r"'([^']*)'", text)  # a single one is a prime
    return quoted[1].rstrip(".").strip() if quoted else text


def phrase(answer: str) -> str | None:
    """Returns the words in one form, without article; None if the answer holds anything else."""
    words = _CALL.sub("", plain(answer).casefold())
    words = " ".join(_HYPHEN.sub(" ", words).split())
    return _ARTICLE.sub("", words) if _PHRASE.fullmatch(words) else None


def spelled(answer: str) -> int | None:
    """Returns the value of a number word below 100."""
    words = phrase(answer)
    if words is None:
        return None
    if words in _ONES:
        return _ONES.index(words)
    tens, _, ones = words.partition(" ")
    if tens not in _TENS or (ones and ones not in _ONES[1:10]):
        return None
    return _TENS[tens] + (_ONES.index(ones) if ones else 0)


def number_words_agree(gold: str, prediction: str) -> bool | None:
    """Whether a number word and a number agree; None if neither is a number word."""
    values = [spelled(answer) for answer in (gold, prediction)]
    if values == [None, None]:
        return None
    numbers = [
        exact_number(answer) if value is None else value
        for value, answer in zip(values, (gold, prediction), strict=True)
    ]
    return None if None in numbers else numbers[0] == numbers[1]


def choices_agree(gold: str, prediction: str) -> bool | None:
    """Whether the same choice letters are named; None if the gold is not a letter.

    The gold is `B`, `(B)` or several letters; the prediction may repeat the text of its choice.
    """
    gold, prediction = plain(gold), plain(prediction)
    if _LETTERS.fullmatch(gold) and _LETTERS.fullmatch(prediction):
        return _several_letters_agree(gold, prediction)
    letter, found = _BARE_CHOICE.fullmatch(gold), _CHOICE.fullmatch(prediction)
    if letter is None:  # the gold includes its text: only a lone letter is decided here
        labelled = re.fullmatch(r"\(([A-J])\)\s*\S.*", gold)
        bare = _BARE_CHOICE.fullmatch(prediction)
        return labelled[1] == bare[1] if labelled and bare else None
    if found is None:
        return None
    if _MORE_LETTERS.fullmatch(found[4]):
        return False  # a list of choices is not a choice
    return letter[1] == next(group for group in found.groups()[:3] if group).upper()


def _several_letters_agree(gold: str, prediction: str) -> bool:
    separated = [len(set(re.sub(r"[A-J]|and", "", a)) - set("() ")) > 0 for a in (gold, prediction)]
    letters = [re.findall(r"[A-J]", answer) for answer in (gold, prediction)]
    # ABC without separators may be a triangle or a ranking, so order counts.
    if any(separated) or "and" in gold + prediction:
        return sorted(letters[0]) == sorted(letters[1])
    return letters[0] == letters[1]


def phrases_agree(gold: str, prediction: str) -> bool | None:
    """Whether two answers are the same in words; None if they are not words."""
    meanings = [_meaning(answer) for answer in (gold, prediction)]
    if meanings[0] is not None and meanings[0] == meanings[1]:
        return True
    words = [phrase(answer) for answer in (gold, prediction)]
    opening = _OPENING_VERDICT.fullmatch(plain(prediction).casefold())
    if words[0] in ("yes", "no", "true", "false") and opening:
        return opening[1] == words[0]
    if None in words:
        return None
    if words[0] == words[1]:
        # In single letters, case distinguishes variables.
        return len(words[0]) > 1 or plain(gold) == plain(prediction)
    answers = zip((gold, prediction), words, strict=True)
    return False if any(_is_text(answer, found) for answer, found in answers) else None


def _meaning(answer: str) -> int | None:
    squeezed = answer.replace(" ", "").replace(r"\left", "").replace(r"\right", "")
    words = phrase(answer)
    squeezed = squeezed.replace("+", "")
    for group, forms in enumerate(_SYNONYMS):
        if words in forms or squeezed in forms:
            return group
    return None


def _is_text(answer: str, words: str) -> bool:
    """Whether these letters form a word: `odd`, but not the product `ab`."""
    return (
        max(map(len, words.split())) >= 4
        or bool(_TEXT.search(answer) and len(words) > 1)
        or re.fullmatch(r"[A-Z]{2,}", plain(answer)) is not None
    )
