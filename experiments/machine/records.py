"""What a checkup finds: a record for each kind of finding, and the outcome of each check."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

OK, FAIL, SKIPPED, ABSENT = "ok", "FAIL", "skipped", "not on this platform"

PARTS = {
    "machine": "The machine",
    "kernels": "Kernels against a plain computation in float64",
    "rates": "What the machine can do",
    "agreement": "Sampler against trainer",
    "decoding": "A decode step",
    "training": "A training step",
    "rehearsal": "What the rehearsal predicts of the measured step",
    "advice": "What to set",
}


class Absent(Exception):
    """What is to be checked does not exist here; the message says why."""


class Skipped(Exception):
    """A check is left out; the message says why."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """A property of the machine or of its software."""

    name: str
    value: str


@dataclasses.dataclass(frozen=True)
class Agreed:
    """A kernel beside a plain computation in float64.

    Attributes:
      error: largest |kernel − plain| over the largest |plain|, of its results.
      gradient_error: likewise, of the gradients by its inputs; None where it has none.
      tolerance: up to which both are sound.
      of: what the error is measured in, if not in shares of the largest value.
    """

    error: float
    tolerance: float
    gradient_error: float | None = None
    of: str = ""

    @property
    def passed(self) -> bool:
        """Whether the errors are numbers within the tolerance."""
        errors = [self.error] if self.gradient_error is None else [self.error, self.gradient_error]
        return all(error <= self.tolerance for error in errors)


@dataclasses.dataclass(frozen=True)
class Rate:
    """The best of several measurements of what the machine does in a second.

    Attributes:
      kind: "matrix product", in operations (two a multiplication and addition); or "reading" and
        "reading and writing" memory, in bytes.
      dtype: of the numbers.
      size: side of the square matrices; or bytes of the array.
      per_second: operations or bytes.
    """

    kind: str
    dtype: str
    size: int
    per_second: float


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A step of the sampler's own program.

    Attributes:
      model: whose shape.
      dtype: of weights, keys and values.
      rows: responses that are decoded together.
      context: tokens that each has when the measurement begins.
      seconds: of a step.
      bytes: of weights, live keys and values, and logits, that a step must move.
      bandwidth_s: seconds that these bytes take at the measured bandwidth.
      compute_s: seconds of its operations at the measured matrix rate.
    """

    model: str
    dtype: str
    rows: int
    context: int
    seconds: float
    bytes: float
    bandwidth_s: float
    compute_s: float

    @property
    def share(self) -> float:
        """Returns the share of the bandwidth bound that is reached."""
        return self.bandwidth_s / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Returns the tokens that all rows draw in a second."""
        return self.rows / self.seconds


@dataclasses.dataclass(frozen=True)
class Training:
    """An optimizer step of random weights.

    Attributes:
      model: whose shape, and how many of its layers.
      dtype: of the activations.
      how: attention and remat.
      rows, length: of the batch; no padding.
      microbatches: in which it is computed.
      seconds: of a step.
      flops: operations that the step needs: forward, twice that backward, nothing recomputed.
      computed_flops: operations that it makes, by the rehearsal's count.
      peak_rate: operations a second of a large matrix product in this type.
    """

    model: str
    dtype: str
    how: str
    rows: int
    length: int
    microbatches: int
    seconds: float
    flops: float
    computed_flops: float
    peak_rate: float

    @property
    def share(self) -> float:
        """Returns the share of the matrix rate that the needed operations reach."""
        return self.flops / self.seconds / self.peak_rate

    @property
    def tokens_per_second(self) -> float:
        """Returns the tokens trained on in a second."""
        return self.rows * self.length / self.seconds


@dataclasses.dataclass(frozen=True)
class Gap:
    """Log-probs of sampled tokens, by the sampler and by the trainer.

    Attributes:
      model: whose weights.
      dtype: of both.
      tokens: that were compared.
      largest, mean: of |sampler − trainer|, in nats.
      limit: of the largest; rollout.mismatch_limit's.
    """

    model: str
    dtype: str
    tokens: int
    largest: float
    mean: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the largest is a number within the limit."""
        return self.largest <= self.limit


@dataclasses.dataclass(frozen=True)
class Predicted:
    """A prediction of the rehearsal beside what was measured.

    Attributes:
      what: seconds or memory, of which step.
      unit: "s" or "bytes".
      predicted: by the rehearsal.
      measured: None where the platform does not tell.
      note: what either means.
    """

    what: str
    unit: str
    predicted: float
    measured: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Advised:
    """What to set for a configuration.

    Attributes:
      field: of the configuration.
      now: its value.
      value: what to set; equal to `now` if it is right, None if nothing fits.
      reason: the measurement or estimate that it rests on.
    """

    field: str
    now: Any
    value: Any
    reason: str


Record = Fact | Agreed | Rate | Decoding | Training | Gap | Predicted | Advised


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing to find out.

    Attributes:
      part: of the report, a key of PARTS.
      name: what is checked.
      about_s: seconds that it takes on two slow cores; left out when fewer are left.
      run: returns the records; raises Absent or Skipped.
    """

    part: str
    name: str
    about_s: float
    run: Callable[[Any], Sequence[Record]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a check ended.

    Attributes:
      part, name: of the check.
      status: OK, FAIL, SKIPPED or ABSENT.
      note: why, if not OK.
      seconds: that it took.
      records: what it found.
    """

    part: str
    name: str
    status: str
    note: str
    seconds: float
    records: tuple[Record, ...] = ()


def plain(value: Any) -> Any:
    """Returns JSON values of records: a number that is not finite is its name."""
    if dataclasses.is_dataclass(value):
        found = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        shares = {
            name: plain(getattr(value, name))
            for name, member in vars(type(value)).items()
            if isinstance(member, property)
        }
        return {"record": type(value).__name__.lower(), **found, **shares}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)
