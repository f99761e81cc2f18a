"""Mathematical equality of the last `\\boxed{…}` and the reference, by Math-Verify."""

import functools

from luspo_jax.rewards.answers.extraction import boxed_answer
from luspo_jax.rewards.answers.math_equal import VERSION
from luspo_jax.rewards.math_answer import WARM_UP, check
from luspo_jax.rewards.record import Verifier


def boxed_math() -> Verifier:
    """Returns the isolated verifier. A response without a closed box is unparsed."""
    bound = functools.partial(check, extract=boxed_answer)
    return Verifier("boxed_math", VERSION, bound, isolated=True, warm_up=WARM_UP)
