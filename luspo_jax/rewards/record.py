"""Records of a reward computation: samples, verdicts and the reward they add up to."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

# From best to worst; a reward carries the worst status among its parts.
STATUSES = ("ok", "unparsed", "timeout", "error")
FAILURES = ("timeout", "error")  # no verdict


@dataclasses.dataclass(frozen=True)
class Sample:
    """One response to score.

    Attributes:
      response: the decoded response.
      answer: the reference answer.
      length: response length in tokens, stop token included; None if unknown.
      max_length: the sampler's length limit, in tokens; None if unknown.
      meta: other data about the problem.
      problem: the bare problem; empty if unknown.
    """

    response: str
    answer: str
    length: int | None = None
    max_length: int | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One verifier's verdict on one sample.

    Attributes:
      value: the score, finite; 0 if the status is timeout or error.
      status: ok; unparsed (no answer was found, or it could not be read); timeout; error.
      prediction: the answer found in the response, as the verifier read it.
      detail: the reason, for a status other than ok.
    """

    value: float
    status: str = "ok"
    prediction: str | None = None
    detail: str | None = None

    def __post_init__(self):
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is none of {', '.join(STATUSES)}")
        if not math.isfinite(self.value):
            raise ValueError(f"a verdict's value must be finite, got {self.value}")


@dataclasses.dataclass(frozen=True)
class Verifier:
    """A named, versioned scoring rule.

    Attributes:
      id: name of the rule.
      version: changes whenever any verdict can change.
      check: the rule; its caller records an exception as an error.
      isolated: whether it can hang or fill memory and must run in a worker process.
      warm_up: a sample that triggers its imports; None if it has none.
    """

    id: str
    version: str
    check: Callable[[Sample], Verdict]
    isolated: bool = False
    warm_up: Sample | None = None

    @property
    def label(self) -> str:
        """The rule with its version, as runs and results carry it."""
        return f"{self.id}@{self.version}"


@dataclasses.dataclass(frozen=True)
class Reward:
    """A weighted sum of verdicts, and of rewards of the group once these are added.

    Attributes:
      value: Σ weight · part.
      status: the worst status among the parts.
      parts: each verifier's or group reward's value, before its weight.
      prediction: the first prediction that a part reports.
      detail: the reasons of the parts whose status is not ok.
      length: Σ weight · part over the group rewards alone; value − length is without them.
    """

    value: float
    status: str
    parts: dict[str, float]
    prediction: str | None = None
    detail: str | None = None
    length: float = 0.0

    @property
    def judged(self) -> bool:
        """Whether there is a verdict; without one the value says nothing about the response."""
        return self.status not in FAILURES


def combine(weights: Mapping[str, float], verdicts: Mapping[str, Verdict]) -> Reward:
    """Adds up a sample's verdicts to a reward, in the order of the weights."""
    ordered = {name: verdicts[name] for name in weights}
    details = [f"{name}: {v.detail}" for name, v in ordered.items() if v.detail]
    return Reward(
        value=math.fsum(weight * ordered[name].value for name, weight in weights.items()),
        status=max((v.status for v in ordered.values()), key=STATUSES.index),
        parts={name: float(v.value) for name, v in ordered.items()},
        prediction=next((v.prediction for v in ordered.values() if v.prediction is not None), None),
        detail="; ".join(details) or None,
    )


def run(verifier: Verifier, sample: Sample) -> Verdict:
    """Returns the verifier's verdict; an exception gives value 0 and status error."""
    try:
        return verifier.check(sample)
    except Exception as error:
        return failed(error)


def failed(error: BaseException) -> Verdict:
    """Returns the verdict for an exception that a verifier raised."""
    try:
        said = str(error)
    except Exception:
        said = "(its message cannot be read)"
    return Verdict(0.0, "error", detail=f"{type(error).__name__}: {said}"[:500])
