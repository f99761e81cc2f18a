"""Settings of each side of the step's benchmark, and the search for its fastest ones.

Each library is timed at its best: first over the parts that its update is cut into, in ascending
order until parts no longer pay, then over what else it offers. A setting is judged by one whole
step after one that compiles.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.bench.step_task import Task
from experiments.bench.turns import OURS
from luspo_jax.run.sections import ModelSettings

TRL, TUNIX = "trl", "tunix"
_PARTS = (1, 2, 4, 8)
_WORSE = 1.05  # slower than the best by this: more parts are not tried
_LOGITS = 2**24  # that exist at once; smaller chunks of the head are not tried


@dataclasses.dataclass(frozen=True)
class Tried:
    """A setting of a side that was timed.

    Attributes:
      settings: of the side.
      seconds: of a step; None if it failed.
      phases: its parts.
      error: why it failed.
    """

    settings: dict[str, Any]
    seconds: float | None = None
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        if self.seconds is None:
            return f"{shown}: {self.error.splitlines()[-1][:120]}"
        parts = ", ".join(f"{name} {value:.2f}" for name, value in self.phases.items())
        return f"{shown}: {self.seconds:.2f} s ({parts})"


def parts(task: Task, side: str) -> list[dict[str, Any]]:
    """Returns the settings of a side that cut its update into more and more parts."""
    responses, prompts = len(task.flat_lengths), len(task.prompts)
    if side == OURS:
        return [{"train.num_microbatches": n} for n in _PARTS if responses % n == 0]
    if side == TRL:
        return [{"microbatches": n, "compile": False} for n in _PARTS if responses % n == 0]
    return [{"microbatches": n} for n in _PARTS if prompts % n == 0]


def others(task: Task, side: str, best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what else a side offers, around its best parts: torch.compile of TRL's; rows of ours
    that are packed."""
    if side == TRL:
        return [{**best, "compile": True}]
    if side == OURS:  # packed rows of a micro-batch each, with prompts once
        tokens = sum(
            len(prompt) + sum(n + 1 for n in group)
            for prompt, group in zip(task.prompt_tokens, task.lengths, strict=True)
        )
        least = task.longest_prompt + task.longest
        sizes = {max(least, -(-tokens // n)) for n in _PARTS}
        rows = sorted({-(-size // 32) * 32 for size in sizes})
        return [
            {"train.packing": True, "train.microbatch_tokens": row, "train.pack_length": row}
            for row in rows
        ]
    return []


def chunks(task: Task, side: str, best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what is tried around the best rows of ours: a smaller chunk of the head, where the
    logits of the ordinary one are many. The other sides have no such setting."""
    if side != OURS:
        return []
    fitting = max(128, _LOGITS // task.model.vocab_size // 32 * 32)
    if fitting >= ModelSettings.head_chunk_tokens:
        return []
    return [{**best, "model.head_chunk_tokens": fitting}]


def search(
    task: Task, side: str, start: Callable[[dict[str, Any]], Any], say: Callable[[str], Any]
) -> tuple[Any, list[Tried]]:
    """Starts a side with its fastest settings; returns it and all that was tried.

    Args:
      task: what a step does.
      side: its name.
      start: starts it with settings; it has `step` and `close`.
      say: called with each line to print.

    Raises:
      RuntimeError: every setting failed.
    """
    tried: list[Tried] = []
    best = None
    for settings in parts(task, side):
        best = _faster(best, settings, start, tried)
        say(f"search    {side:10} {tried[-1]}")
        if best and (tried[-1].seconds or 0) > _WORSE * best[0]:
            break
    if best is None:
        raise RuntimeError(f"{side} failed: {tried[-1].error}")
    for further in (others, chunks):
        for settings in further(task, side, best[1]):
            best = _faster(best, settings, start, tried)
            say(f"search    {side:10} {tried[-1]}")
    return best[2], tried


def fastest(tried: Sequence[Tried]) -> Tried:
    """Returns the fastest of those that did not fail."""
    return min((t for t in tried if t.seconds is not None), key=lambda t: t.seconds)


def _faster(best, settings, start, tried):
    """Tries settings; returns (seconds, settings, side) of the better side and ends the other."""
    side = None
    try:
        side = start(settings)
        side.step()
        step = side.step()
    except RuntimeError as error:
        tried.append(Tried(settings, error=str(error)))
        if side is not None:
            side.close()
        return best
    tried.append(Tried(settings, step.seconds, step.phases))
    if best is not None and best[0] <= step.seconds:
        side.close()
        return best
    if best is not None:
        best[2].close()
    return step.seconds, settings, side
