"""One response to one problem of a benchmark, with its verdict: a line of jsonl."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from luspo_jax.rewards import Reward

# Status of a verdict on a problem whose annotation is such that no response can be right.
UNUSABLE = "unusable"


class BenchmarkError(ValueError):
    """A benchmark, a protocol or stored results that cannot be used; says which and what to do."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What is kept of a response: enough to read it, to score it again and to compare it.

    Attributes:
      benchmark: where the problem is from.
      problem_id, sample_id: which response it is.
      prompt, response, answer: the texts; the answer is the reference.
      tokens: response token ids, stop token included; None for predictions from elsewhere.
      length: tokens; None where unknown.
      truncated: whether the response was cut at the length limit; None where unknown.
      meta: what else the dataset says of the problem.
      verdict: value, status, parts, prediction and detail.
      scorers: part, or rule → `id@version` of what gave it.
      problem: the bare problem.
    """

    benchmark: str
    problem_id: int
    sample_id: int
    prompt: str
    response: str
    answer: str
    tokens: list[int] | None
    length: int | None
    truncated: bool | None
    meta: Mapping[str, Any]
    verdict: Reward
    scorers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    problem: str = ""

    def right(self, part: str) -> bool:
        """Whether the part of the verdict that stands for accuracy says so."""
        return self.verdict.parts[part] > 0.5

    def to_json(self) -> str:
        """One line, in ASCII: a model may write half a surrogate pair, which UTF-8 cannot."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, line: str, place: str) -> "Record":
        """The record of a line.

        Raises:
          BenchmarkError: the line holds no record; the message names the place.
        """
        try:
            values = json.loads(line)
            return cls(**(values | {"verdict": Reward(**values["verdict"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{place}: not a stored generation ({type(error).__name__}: {error}); delete the "
                "file and run the evaluation again to make it anew"
            ) from error
