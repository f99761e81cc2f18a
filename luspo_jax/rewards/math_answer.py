"""Mathematical equality of a response's final answer and the reference answer."""

import functools
import re

from luspo_jax.rewards.answers.extraction import after_reasoning, boxed_answer, final_answer
from luspo_jax.rewards.answers.math_equal import LONGEST, VERSION, equal
from luspo_jax.rewards.answers.symbolic import text_ends_on
from luspo_jax.rewards.record import Sample, Verdict, Verifier

# Words before a formula or a number: the text is a sentence that contains its answer.
_SAYS = re.compile(r"(?<![\\A-Za-z{])(?!and\b|or\b)[A-Za-z']{2,}[\s:]")
WARM_UP = Sample(r"$\boxed{\frac{x}{2}}$", "0.5x")


def check(sample: Sample, *, extract) -> Verdict:
    """1 if the extracted answer equals the reference, else 0; unparsed if there is none."""
    prediction = extract(sample.response)
    if not prediction:
        return Verdict(0.0, "unparsed", detail="the response states no final answer")
    if len(prediction) > LONGEST:
        reason = f"the answer has {len(prediction)} characters"
        return Verdict(0.0, "unparsed", prediction[:200], reason)
    gold, allowed = whole(sample.answer), tolerances(sample.meta.get("precision"))
    correct = equal(gold, prediction, tolerances=allowed)
    if not correct and extract is whole and _SAYS.search(prediction):
        correct = text_ends_on(prediction, gold)  # `So $x$ is 5.`
    return Verdict(float(correct), prediction=prediction)


def tolerances(precision) -> tuple[float, ...]:
    """Returns a problem's `precision` as absolute errors: a number, its text, or a list of them."""
    if precision is None:
        return ()
    return tuple(float(p) for p in (precision if isinstance(precision, list) else [precision]))


def whole(text: str) -> str:
    """Returns the announced answer, or else the text itself: an already extracted answer."""
    spoken = after_reasoning(text)
    return final_answer(spoken) or spoken.strip()


EXTRACTIONS = {"final": final_answer, "boxed": boxed_answer, "whole": whole}


def math_answer(extract: str = "final") -> Verifier:
    """Returns the isolated verifier.

    Args:
      extract: which text is the answer: `final`, the one that the response announces, boxed or not;
        `boxed`, the last box only; `whole`, the response itself.
    """
    if extract not in EXTRACTIONS:
        raise ValueError(f"unknown extraction {extract!r}; known: {', '.join(EXTRACTIONS)}")
    bound = functools.partial(check, extract=EXTRACTIONS[extract])
    return Verifier(f"math_answer[{extract}]", VERSION, bound, isolated=True, warm_up=WARM_UP)
