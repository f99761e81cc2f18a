"""Rewards by name, and verifiers from a weighted list of names."""

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from luspo_jax.hosts.values import nearest
from luspo_jax.rewards.boxed_math import boxed_math
from luspo_jax.rewards.dapo_math import dapo_math
from luspo_jax.rewards.exact import exact
from luspo_jax.rewards.format import text_format
from luspo_jax.rewards.gsm8k import gsm8k
from luspo_jax.rewards.math_answer import math_answer
from luspo_jax.rewards.multiple_choice import multiple_choice
from luspo_jax.rewards.overlong import overlong
from luspo_jax.rewards.reasoning_gym import reasoning_gym, reasoning_gym_solved
from luspo_jax.rewards.record import Reward, Sample, Verifier, combine, run
from luspo_jax.rewards.user import is_user_reward, user_reward

# Name → function that returns the verifier for the reward's options.
REWARDS: dict[str, Callable[..., Verifier]] = {
    "boxed_math": boxed_math,
    "dapo_math": dapo_math,
    "exact": exact,
    "format": text_format,
    "gsm8k": gsm8k,
    "math_answer": math_answer,
    "multiple_choice": multiple_choice,
    "overlong": overlong,
    "reasoning_gym": reasoning_gym,
    "reasoning_gym_solved": reasoning_gym_solved,
    # For configurations whose keys cannot hold dots: options {"user": {"function": "file.py:f"}}.
    "user": user_reward,
}

Parts = Mapping[str, float] | Iterable[tuple[str, float]]
Options = Mapping[str, Mapping[str, Any]]


def verifier(name: str, options: Mapping[str, Any] | None = None) -> Verifier:
    """Returns the verifier of a registered name or of a user's `module:function`.

    Raises:
      ValueError: unknown name or option; the message lists the valid ones.
    """
    return named(name, options, REWARDS, user_reward, "reward")


def named(
    name: str,
    options: Mapping[str, Any] | None,
    known: Mapping[str, Callable[..., Any]],
    of_user: Callable[[str], Any],
    kind: str,
) -> Any:
    """Returns what a registered name or a user's `module:function` stands for.

    Args:
      name: of the reward.
      options: of it.
      known: name → function of the options.
      of_user: the same of a user's function.
      kind: what it is called in messages.

    Raises:
      ValueError: unknown name or option; the message lists the valid ones.
    """
    options = dict(options or {})
    if "function" in options:  # a user's reward under a short name
        function = options.pop("function")
        if not is_user_reward(function) or options:
            raise ValueError(
                f"{kind} {name!r}: its one option is function='module:function' or "
                f"'file.py:function', not {function!r}" + (f" and {options}" if options else "")
            )
        return of_user(function)
    if is_user_reward(name):
        if options:
            raise ValueError(f"{kind} {name!r} takes no options")
        return of_user(name)
    if name not in known:
        raise ValueError(
            f"unknown {kind} {name!r}: {nearest(name, known)}, or module:function, or "
            "file.py:function"
        )
    try:
        inspect.signature(known[name]).bind(**options)
    except TypeError as error:
        allowed = ", ".join(inspect.signature(known[name]).parameters) or "none"
        raise ValueError(f"{kind} {name!r}: {error} (options: {allowed})") from error
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} {name!r}: {error}") from error


def verifiers(parts: Parts, options: Options | None = None) -> dict[str, Verifier]:
    """Returns the verifier of each part.

    Raises:
      ValueError: no parts, a weight that is not a finite number, options for a missing part, or as
        `verifier`.
    """
    names = list(dict(parts))
    for name, weight in dict(parts).items():
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} must be a number, not {weight!r}")
    stray = set(options or {}) - set(names)
    if not names:
        raise ValueError("a reward needs at least one part")
    if stray:
        raise ValueError(f"options for {sorted(stray)}, which are no parts of the reward {names}")
    return {name: verifier(name, (options or {}).get(name)) for name in names}


def score(
    parts: Parts,
    response: str,
    answer: str,
    *,
    length: int | None = None,
    max_length: int | None = None,
    options: Options | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Reward:
    """Scores one response, in this process and without a time limit.

    For batches, and for any model output, use `Scorer`.
    """
    sample = Sample(response, answer, length, max_length, meta or {})
    checks = verifiers(parts, options)
    return combine(dict(parts), {name: run(check, sample) for name, check in checks.items()})
