"""The scorer that each task of reasoning-gym brings along, on the answer that a response states.

A task may give part of the credit: 0.05 for a readable but wrong Countdown expression, or the share
of letters in their places. `reasoning_gym` keeps the task's score as the reward;
`reasoning_gym_solved` is 1 for the full score and 0 for anything less, which accuracy needs: a part
counts as right above 0.5.

Some scorers evaluate the answer as Python or through sympy's parser, which does. Such an answer is
refused unread if it could call anything but a mathematical function.
"""

import functools
import json
import re

from luspo_jax.rewards import gym_tasks
from luspo_jax.rewards.answers.extraction import after_reasoning, boxed_answer, plain_signs
from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "1"
LONGEST = 20_000  # characters of an answer
_FULL = 1 - 1e-9  # sums of fractions may miss 1 by rounding

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")

# Tasks whose scorer evaluates the answer → names that may be called in it.
_FUNCTIONS = frozenset(
    (
        *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
        *("asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs"),
    )
)
EVALUATED: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ("binary_matrix", "countdown", "n_queens", "puzzle24", "spiral_matrix", "string_insertion"),
        frozenset(),
    ),
    **dict.fromkeys(
        ("intermediate_integration", "polynomial_multiplication", "simple_integration"), _FUNCTIONS
    ),
}
_BEFORE_BRACKET = re.compile(r"(\w+|[)\]}'\"])\s*\(")
_ATTRIBUTE = re.compile(r"\.\s*[^\W\d]")


def answer_tag(text: str) -> str | None:
    """Returns the content of the last `<answer>…</answer>`."""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, answer = before.rpartition("<answer>")
    return answer if closed and opened else None


def last_line(text: str) -> str | None:
    """Returns the last line that is not empty."""
    return text.strip().rpartition("\n")[2]


def last_number(text: str) -> str | None:
    """Returns the last number, without commas between thousands."""
    found = _NUMBER.findall(plain_signs(text))
    return found[-1].replace(",", "") if found else None


def full(text: str) -> str | None:
    """Returns the whole text."""
    return text


# Name → how the answer is read from what follows the reasoning, and what is missing without one.
EXTRACTIONS = {
    "answer_tag": (answer_tag, "no <answer>…</answer> in the response"),
    "boxed": (boxed_answer, "no \\boxed{…} in the response"),
    "full": (full, "nothing in the response but reasoning"),
    "last_line": (last_line, "nothing in the response but reasoning"),
    "last_number": (last_number, "no number in the response"),
}


def may_call(text: str, functions: frozenset[str] = frozenset()) -> bool:
    """Whether a text, evaluated as Python, could call anything but these functions."""
    if "(" not in text:
        return False
    if "#" in text or "\\" in text or _ATTRIBUTE.search(text):
        return True
    called = _BEFORE_BRACKET.findall(text)
    return any(name not in functions and not name.isdecimal() for name in called)


def check(sample: Sample, *, extract: str, solved: bool) -> Verdict:
    """Returns the task's score of the answer; unparsed if there is none or it must not be read."""
    find, missing = EXTRACTIONS[extract]
    prediction = (find(after_reasoning(sample.response)) or "").strip()
    if not prediction:
        return Verdict(0.0, "unparsed", detail=missing)
    if len(prediction) > LONGEST:
        detail = f"the answer has {len(prediction)} characters"
        return Verdict(0.0, "unparsed", prediction[:200], detail)
    if not {"task", "options", "number"} <= set(sample.meta):
        return Verdict(0.0, "error", prediction, "the problem is none of data.name=reasoning_gym")
    task, options = sample.meta["task"], sample.meta["options"]
    try:
        entry = _entry(task, gym_tasks.as_text(options), sample.meta["number"])
        asked = sample.problem or entry["question"]
        if (entry["question"], str(entry["answer"])) != (asked, sample.answer):
            raise ValueError(
                "the item drawn again is another one: its problem was drawn by another version of "
                f"{gym_tasks.PACKAGE}, or with another PYTHONHASHSEED"
            )
        if task in EVALUATED and may_call(prediction, EVALUATED[task]):
            detail = f"task {task!r} would run the answer as code, and it could call something"
            return Verdict(0.0, "unparsed", prediction, detail)
        score = _grade(task, options, entry, prediction)
    except Exception as error:
        return Verdict(0.0, "error", prediction, _said(task, error))
    if isinstance(score, Exception):
        return Verdict(0.0, "unparsed", prediction, _said(task, score))
    return Verdict(float(score >= _FULL) if solved else score, prediction=prediction)


def _grade(task, options, entry, prediction) -> float | Exception:
    """Returns the score, or what the task's scorer raised because of this answer.

    Some scorers raise on an answer of another form, such as a word for a number. If the reference
    can be scored, the answer is at fault, and it must not leave the loss: most early ones are such.

    Raises:
      Exception: what the scorer raises for the reference too.
    """
    try:
        return gym_tasks.grade(task, options, entry, prediction)
    except Exception as error:
        gym_tasks.grade(task, options, entry, str(entry["answer"]))
        return error


def _said(task, error) -> str:
    return f"task {task!r}: {type(error).__name__}: {error}"[:500]


@functools.lru_cache(maxsize=64)
def _entry(task, options, number):
    """Draws an item: the responses of a group come one after another."""
    return gym_tasks.item(task, json.loads(options), number)


def reasoning_gym(extract: str = "answer_tag", *, solved: bool = False) -> Verifier:
    """Returns the isolated verifier; its version names that of the package.

    Args:
      extract: which text after the reasoning is the answer: `answer_tag`, the last
        `<answer>…</answer>`; `boxed`, the last box; `last_line`; `last_number`; `full`, all of it.
      solved: whether only the full score counts.

    Raises:
      ValueError: an unknown extraction, or the package is not installed.
    """
    if not isinstance(extract, str) or extract not in EXTRACTIONS:
        raise ValueError(f"unknown extraction {extract!r}; known: {', '.join(EXTRACTIONS)}")
    name = "reasoning_gym_solved" if solved else "reasoning_gym"
    bound = functools.partial(check, extract=extract, solved=solved)
    return Verifier(
        f"{name}[{extract}]",
        f"{VERSION}+{gym_tasks.version()}",
        bound,
        isolated=True,
        warm_up=_warm_up(),
    )


def reasoning_gym_solved(extract: str = "answer_tag") -> Verifier:
    """Returns the verifier that gives 1 for a task's full score and 0 for less."""
    return reasoning_gym(extract, solved=True)


def _warm_up() -> Sample:
    """Returns a sample whose scoring imports the package."""
    item = {"task": "chain_sum", "options": {}, "number": 1}
    return Sample("<answer>1</answer> \\boxed{1}\n1", "1", meta=item)
