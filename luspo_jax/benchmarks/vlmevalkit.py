"""VLMEvalKit's rules that several benchmarks share, mistakes included.

Source: github.com/open-compass/VLMEvalKit at commit e8e78f05, `vlmeval/utils/matching_util.py` and
`vlmeval/dataset/utils/mathv.py`. Model text is never evaluated: a small arithmetic evaluator of our
own replaces Python's `eval`.
"""

import ast
import operator
import re
from collections.abc import Mapping

from luspo_jax.rewards.answers.latex import tidy
from luspo_jax.rewards.answers.plain_numbers import exact_number

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILURE = "Failed to obtain answer via API"
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# No word boundary follows: "the answer is a circle" means A.
_VERBOSE = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


def inferred_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Applies `can_infer`: returns the option a text means; "Z" for a refusal, None if none."""
    return _by_letter(answer, options) or _by_text(answer, options)


def _by_letter(answer: str, options: Mapping[str, str]) -> str | None:
    if _API_FAILURE in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(_PUNCTUATION).split()
    present = [letter for letter in options if letter in words]
    if len(present) == 1 and words.index(present[0]) > len(words) - 5:
        return present[0]  # a letter counts only among the last four words
    if not present and "Z" in words:
        return "Z"
    verbose = _VERBOSE.search(answer)
    return verbose[1].upper() if verbose and verbose[1].upper() in options else None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(len(option) for option in options.values()):
        return None
    present = [letter for letter, option in options.items() if option.lower() in answer]
    return present[0] if len(present) == 1 else None


def equal_answers(prediction: str, gold: str) -> bool:
    """Applies MathVision's `is_equal`: equal lower-cased strings, or numbers within 1e-6.

    A reference with a root, π or a variable is matched as a string only: there, VLMEvalKit
    evaluates function names that it has not imported, and treats the exception as "no".
    """
    prediction, gold = prediction.lower().strip(), gold.lower().strip()
    if prediction == gold:
        return True
    for value in (arithmetic, _latex_value):
        a, b = value(gold), value(prediction)
        if a is not None and b is not None and abs(a - b) < 1e-6:
            return True
    return False


def _latex_value(text: str) -> float | None:
    """Returns the value of a rational number in LaTeX."""
    text = tidy(text)
    exact = exact_number(text)
    if exact is not None:
        return float(exact)
    braces = {"{": "(", "}": ")", r"\times": "*", r"\cdot": "*", r"\div": "/", "^": "**"}
    for old, new in braces.items():
        text = text.replace(old, new)
    return arithmetic(text)


_LONGEST = 100  # characters
_CHARACTERS = re.compile(r"[\d\s.+\-*/()^eE]+")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.BitXor: operator.xor,  # `^` in Python
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def arithmetic(text: str) -> float | None:
    """Evaluates Python arithmetic on plain numbers; None for anything else."""
    if len(text) > _LONGEST or not _CHARACTERS.fullmatch(text):
        return None
    try:
        value = float(_value(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value


def _value(node):
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and not (abs(left) <= 1e6 and abs(right) <= 100):
            raise ValueError("too large a power")
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError("no arithmetic")
