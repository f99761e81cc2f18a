"""One response to one problem of a benchmark, with its verdict: a line of jsonl."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from luspo_jax.rewards import Reward

# Status of a verdict on a problem whose annotation allows no right response.
UNUSABLE = "unusable"


class BenchmarkError(ValueError):
    """A benchmark, protocol or stored result is unusable; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A stored response: enough to read it, score it again and compare it.

    Attributes:
      benchmark: the problem's benchmark.
      problem_id, sample_id: identify the response.
      prompt, response, answer: the texts; the answer is the reference.
      tokens: response token ids, stop token included; None for predictions from elsewhere.
      length: tokens; None if unknown.
      truncated: whether the response was truncated at the length limit; None if unknown.
      meta: the dataset's other fields of the problem.
      verdict: value, status, parts, prediction and detail.
      scorers: part, or rule → `id@version` of the scorer.
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
        """Whether the part of the verdict that defines accuracy is right."""
        return self.verdict.parts[part] > 0.5

    def to_json(self) -> str:
        """Returns one ASCII line: a model may write half a surrogate pair, invalid in UTF-8."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, line: str, place: str) -> "Record":
        """Parses a record from a line.

        Raises:
          BenchmarkError: the line is not a record; the message names the place.
        """
        try:
            values = json.loads(line)
            return cls(**(values | {"verdict": Reward(**values["verdict"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{place}: not a stored generation ({type(error).__name__}: {error}); delete the "
                "file and run the evaluation again to make it anew"
            ) from error
