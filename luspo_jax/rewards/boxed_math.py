"""Mathematical equality of the last `\\boxed{…}` and the gold answer, judged by Math-Verify.

Run it in a worker process: sympy can hang or fill memory on what a model writes, and Math-Verify's
own time limits are signals, which only a main thread receives. They are off here; the pool's hard
limit takes their place.
"""

import functools
import logging

from luspo_jax.rewards.extraction import boxed_contents
from luspo_jax.rewards.record import Sample, Verdict, Verifier

VERSION = "1"
LONGEST_ANSWER = 2_000  # characters; nothing longer is parsed


@functools.cache
def _math_verify():
    """The library and its two extraction settings, imported once and only where it is used."""
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    for part in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(part).setLevel(logging.ERROR)
    strict = NormalizationConfig(
        basic_latex=True,
        units=True,
        malformed_operators=False,
        nits=False,
        boxed="all",
        equations=False,
    )
    latex = math_verify.LatexExtractionConfig(
        boxed_match_priority=0, normalization_config=strict, try_extract_without_anchor=False
    )
    predicted = (latex, math_verify.ExprExtractionConfig())
    reference = (math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig())
    return math_verify, predicted, reference


@functools.lru_cache(maxsize=4096)
def _parse_gold(answer: str):
    library, _, reference = _math_verify()
    boxes = boxed_contents(answer)
    content = boxes[-1] if boxes else answer.strip().strip("$")
    return library.parse(f"\\boxed{{{content}}}", reference, parsing_timeout=None)


def check(sample: Sample) -> Verdict:
    """1 where the last box equals the gold answer, else 0; unparsed where no box can be read."""
    library, predicted, _ = _math_verify()
    boxes = boxed_contents(sample.response)
    if not boxes:
        return Verdict(0.0, "unparsed", detail="no closed \\boxed{…} in the response")
    content = boxes[-1].strip()
    if len(content) > LONGEST_ANSWER:
        reason = f"the boxed answer has {len(content)} characters"
        return Verdict(0.0, "unparsed", content[:200], reason)
    gold = _parse_gold(sample.answer)
    if not gold:
        return Verdict(0.0, "error", content, f"the reference {sample.answer!r} cannot be parsed")
    prediction = library.parse(f"\\boxed{{{content}}}", predicted, parsing_timeout=None)
    if not prediction:
        return Verdict(0.0, "unparsed", content, "the boxed answer cannot be parsed")
    return Verdict(
        float(library.verify(gold, prediction, timeout_seconds=None)), prediction=content
    )


def boxed_math() -> Verifier:
    """The verifier; isolated."""
    return Verifier("boxed_math", VERSION, check, isolated=True)
